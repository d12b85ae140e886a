"""Load a checkpoint with nothing but transformers and measure it against a reference.

Run in a process of its own, which has never seen the model in memory:
``python -m slm_plugin.export.reload FOLDER REFERENCE.safetensors`` prints one JSON object, either
the figures or ``{"error": "one sentence"}``.
"""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

from slm_plugin.export.encoder_parity import measure_encoder
from slm_plugin.export.layerwise import measure_streamed
from slm_plugin.export.parity import Reference, departure, encode
from slm_plugin.lazy import safetensors, transformers
from slm_plugin.models.fingerprint import fingerprint


def measure(folder: Path, reference_file: Path) -> dict[str, Any]:
    """Figures of the checkpoint in a folder; ``error`` alone when it does not load.

    Args:
        folder: A checkpoint.
        reference_file: What `slm_plugin.export.checkpoint.write_reference` wrote.
    """
    facts = facts_of(reference_file)
    if "named" in facts:
        return measure_encoder(folder, reference_file, facts) | _sentences(folder, facts)
    expected, facts = Reference.read(reference_file)
    if facts.get("memory") == "layerwise":
        streamed = measure_streamed(folder, expected, facts)
        return streamed if "error" in streamed else streamed | _sentences(folder, facts)
    model, misfit = loaded(facts["class"], folder, facts)
    if misfit:
        return {"error": misfit}
    return {
        **asdict(departure(model, expected, float(facts["tolerance"]))),
        **compared_weights(model, facts),
        **_sentences(folder, facts),
    }


def loaded(name: str, folder: Path, facts: dict[str, str]) -> tuple[Any, str]:
    """The checkpoint as a class of transformers reads it, and what `unfit_weights` says of it."""
    model, loading = getattr(transformers, name).from_pretrained(
        folder,
        dtype="auto",
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        attn_implementation=facts.get("attention"),
    )
    return model, unfit_weights(loading)


def compared_weights(model: Any, facts: dict[str, str]) -> dict[str, int]:
    """How the loaded weights differ from those in memory, in number and by their checksum."""
    return {
        "parameters": abs(sum(p.numel() for p in model.parameters()) - int(facts["parameters"])),
        "weights": int(fingerprint(model).weights != facts["weights"]),
    }


def facts_of(reference_file: Path) -> dict[str, str]:
    """What stands beside the tensors of a reference."""
    with safetensors.safe_open(reference_file, framework="pt") as stored:
        facts: dict[str, str] = stored.metadata()
        return facts


def _sentences(folder: Path, facts: dict[str, str]) -> dict[str, int]:
    if "sentences" not in facts:
        return {}
    return {"sentences": misread_sentences(folder, json.loads(facts["sentences"]))}


def unfit_weights(loading: dict[str, Any]) -> str:
    """One sentence on weights that the config does not account for; empty when all fit."""
    said = []
    for key, trouble in (
        ("mismatched_keys", "do not have the shape that config.json asks for"),
        ("missing_keys", "are missing"),
        ("unexpected_keys", "belong to nothing that config.json describes"),
    ):
        # transformers 5 gives each mismatched weight together with its two shapes.
        names = sorted(key if isinstance(key, str) else key[0] for key in loading[key])
        if names:
            said.append(f"{len(names)} weights {trouble}, first {names[0]}")
    return "; ".join(said)


def misread_sentences(folder: Path, ids: list[list[int]]) -> int:
    """Sentences that the checkpoint's tokenizer encodes otherwise than the one in memory."""
    from transformers import AutoTokenizer

    found = encode(
        AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    )
    return sum(mine != theirs for mine, theirs in zip(found, ids, strict=True))


def main(arguments: list[str]) -> None:
    """Print the figures as JSON, and nothing else, on standard output."""
    folder, reference_file = (Path(argument) for argument in arguments)
    with redirect_stdout(sys.stderr):
        try:
            figures = measure(folder, reference_file)
        except Exception as error:
            figures = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
