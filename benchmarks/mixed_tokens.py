"""Write token ids of several texts in turn, as one calibration set.

The samples alternate, so that the held-out ones (every fifth) are of all texts. A text whose KEY
is followed by `*3` has three samples in each turn. A recipe names the file as `calibration.source`,
with the same number of samples and length.

    python benchmarks/mixed_tokens.py --samples 32 --length 512 --output mixed.json \
        data/c4_en_train_1k.jsonl:text data/wikitext2_valid_pages.jsonl:page
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from slm_plugin.calibration.samples import CalibrationSource, draw
from slm_plugin.models.loading import ModelSource, load


def main() -> None:
    """Draw as many samples of each text, and write them in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "sources", nargs="+", help="FILE:KEY, the key of the text in a JSONL row; or FILE:KEY*SHARE"
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--samples", type=int, default=32, help="of all texts together")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--output", type=Path, required=True)
    asked = parser.parse_args()
    shares = [int(name.partition("*")[2] or 1) for name in asked.sources]
    turns, left = divmod(asked.samples, sum(shares))
    if left:
        parser.error(f"{asked.samples} samples are no multiple of {sum(shares)} in a turn")
    model, tokenizer, *_ = load(ModelSource(id=asked.model))
    drawn = []
    for name, share in zip(asked.sources, shares, strict=True):
        file, _, key = name.partition("*")[0].rpartition(":")
        source = CalibrationSource(
            source=file, text_field=key, samples=turns * share, length=asked.length, seed=asked.seed
        )
        samples = iter(draw(source, model, tokenizer, asked.seed).tolist())
        drawn += [samples] * share
    in_turn = chain.from_iterable(zip(*drawn, strict=True))
    asked.output.write_text(json.dumps(list(in_turn)), encoding="utf-8")
    sys.stdout.write(f"{asked.output}: {asked.samples} x {asked.length} tokens\n")


if __name__ == "__main__":
    main()
