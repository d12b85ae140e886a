"""``python -m tests.fuzz``: try many damaged inputs and print a table of what became of them."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.fuzz.run import HEADER, fuzz
from tests.fuzz.targets import KINDS


def main() -> int:
    """Fuzz the kinds that are asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=2000, help="inputs of each kind")
    parser.add_argument("--first", type=int, default=0, help="seed of the first input")
    parser.add_argument("--kind", action="append", choices=sorted(KINDS), help="default: all")
    parser.add_argument("--show", type=int, default=5, help="failures of each kind to show")
    asked = parser.parse_args()
    counts = []
    for name in asked.kind or KINDS:
        with tempfile.TemporaryDirectory(prefix="slm-plugin-fuzz-") as folder:
            kind = KINDS[name](Path(folder))
            count = fuzz(kind, range(asked.first, asked.first + asked.count))
        counts.append(count)
        for seed, content, told in count.failures[: asked.show]:
            sys.stderr.write(f"\n{name}, seed {seed}: {content[:2000]!r}\n{told[-3000:]}\n")
    lines = [HEADER, *(count.row() for count in counts)]
    sys.stdout.write("\n".join(lines) + "\n")
    return int(any(count.failures for count in counts))


if __name__ == "__main__":
    sys.exit(main())
