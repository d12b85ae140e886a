"""Code that loads a run's exports, and the recipe that reproduces them."""

from __future__ import annotations

import json

import yaml

from slm_plugin.export.base import ExportRecord
from slm_plugin.models.dimensions import Dimensions
from slm_plugin.models.families import family_of, reads_tensors
from slm_plugin.report.record import RunReport

_CLASSES = {
    "checkpoint": ("transformers", "AutoModelForCausalLM"),
    "onnx": ("optimum.onnxruntime", "ORTModelForCausalLM"),
}


def snippets(report: RunReport) -> list[tuple[str, str]]:
    """Exporter and code of every export that can be loaded by a class, the checkpoint first."""
    return [
        (name, _code(export, report.after))
        for name in _CLASSES
        for export in report.exports
        if export.exporter == name
    ]


def _encoder_code(export: ExportRecord, architecture: str) -> str:
    return "\n".join(
        (
            f"from transformers import {architecture}",
            "",
            "# Inside the output folder of the run, or the Hub id under which you publish it.",
            f"folder = {json.dumps(export.folder, ensure_ascii=False)}",
            f"model = {architecture}.from_pretrained(folder)",
            "",
        )
    )


def recipe_yaml(report: RunReport) -> str:
    """The recipe as YAML, with keys in the original order."""
    recipe = report.model_dump(mode="json", include={"recipe"})["recipe"]
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)


def _code(export: ExportRecord, model: Dimensions) -> str:
    if reads_tensors(model.architecture, model.stack):
        return _encoder_code(export, model.architecture)
    module, name = _CLASSES[export.exporter]
    if module == "transformers":
        name = family_of(model.architecture).auto_class
    lines = [
        f"from transformers import {name}, AutoTokenizer"
        if module == "transformers"
        else f"from {module} import {name}\nfrom transformers import AutoTokenizer",
        "",
        "# Inside the output folder of the run, or the Hub id under which you publish it.",
        f"folder = {json.dumps(export.folder, ensure_ascii=False)}",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        f"model = {name}.from_pretrained(folder)",
    ]
    if module != "transformers" and model.hidden_size != model.attention_heads * model.head_dim:
        lines += [
            "# optimum-onnx 0.1 guesses the head size of a model with pruned heads wrong.",
            "model.embed_size_per_head = model.config.head_dim",
        ]
    lines += [
        'tokens = tokenizer("The capital of France is", return_tensors="pt").input_ids',
        "print(tokenizer.decode(model.generate(tokens, max_new_tokens=20)[0]))",
    ]
    return "\n".join(lines) + "\n"
