"""How to load what a run exported, and how to make it again: text to copy."""

from __future__ import annotations

import json
from dataclasses import dataclass

import yaml

from slm_plugin.report.record import RunReport

_CLASSES = {
    "checkpoint": ("transformers", "AutoModelForCausalLM"),
    "onnx": ("optimum.onnxruntime", "ORTModelForCausalLM"),
}


@dataclass(frozen=True, slots=True)
class Snippet:
    """One way to load the model."""

    exporter: str
    code: str


def snippets(report: RunReport) -> list[Snippet]:
    """Code for every export that transformers or Optimum can load, the checkpoint first."""
    known = [record for record in report.exports if record.exporter in _CLASSES]
    known.sort(key=lambda record: list(_CLASSES).index(record.exporter))
    return [
        Snippet(record.exporter, _code(*_CLASSES[record.exporter], record.folder))
        for record in known
    ]


def recipe_yaml(report: RunReport) -> str:
    """The recipe as YAML, its keys in the order in which they were written."""
    recipe = report.model_dump(mode="json", include={"recipe"})["recipe"]
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)


def _code(module: str, name: str, folder: str) -> str:
    imports = (
        f"from transformers import {name}, AutoTokenizer"
        if module == "transformers"
        else f"from {module} import {name}\nfrom transformers import AutoTokenizer"
    )
    return f"""{imports}

# Inside the output folder of the run, or the Hub id under which you publish it.
folder = {json.dumps(folder, ensure_ascii=False)}
tokenizer = AutoTokenizer.from_pretrained(folder)
model = {name}.from_pretrained(folder)
inputs = tokenizer("The capital of France is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
"""
