"""What a basis of every block is worth, beside one of the model, in hidden channels alone.

`hidden_score: pca_per_block` and `pca` at the same number of hidden channels, on the same samples;
nothing else is removed and nothing restored. Operators are counted as parameters.

    python benchmarks/stream_rotations.py --data data --kept 504 432
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from slm_plugin import Session
from slm_plugin.calibration.components import stream_components
from slm_plugin.calibration.samples import CalibrationSource, draw
from slm_plugin.models.loading import ModelSource, load
from slm_plugin.plans import KeepHidden, RotateHidden
from slm_plugin.pruners.width.hidden_scores import ROTATIONS
from slm_plugin.registry import evaluators
from slm_plugin.surgery import apply_operations


def main() -> None:
    """Print the perplexities of both rotations, for every number of components."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--kept", type=int, nargs="+", default=[504, 432])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    asked = parser.parse_args()
    calibration = CalibrationSource(
        source=str(asked.data / "c4_en_train_1k.jsonl"), samples=asked.samples, length=asked.length
    )
    kind = evaluators.get("perplexity")
    texts = [
        kind(kind.Options(source=str(asked.data / name), length=length, limit=limit))
        for name, length, limit in (
            ("wikitext2_raw_test.txt", 2048, 4),
            ("c4_en_dev_300.jsonl", 512, 32),
        )
    ]
    sys.stdout.write(
        "| kept | bases | parameters | WikiText-2, 2048 | C4 |\n|---|---|---|---|---|\n"
    )
    for kept in asked.kept:
        for per in ROTATIONS.values():
            model, tokenizer, *_ = load(ModelSource(id=asked.model, dtype="float32"))
            session = Session(model, tokenizer, draw(calibration, model, tokenizer, 1234))
            _, basis = stream_components(session.view, session.captured(), per, kept)
            operations = [
                RotateHidden(calibration=str(session.digest), per=per),
                KeepHidden(indices=tuple(range(kept))),
            ]
            apply_operations(model, operations, basis=basis)
            # Anew, because layers may not change within a session but by a plan.
            pruned = Session(model, tokenizer)
            values = [text.measure(pruned)[0].value for text in texts]
            size = pruned.view.dimensions().parameters
            sys.stdout.write(f"| {kept} | {per} | {size:,} | {values[0]:.1f} | {values[1]:.1f} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
