"""How large the package is: modules, lines by folder, lengths of modules and functions.

    python benchmarks/code_size.py                     # this checkout
    python benchmarks/code_size.py ../other-checkout   # another one beside it

Lines are those of the files, docstrings and comments included; a function's are from its `def` to
its end. The last row is the share of showing and comparing results in all lines.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles

ROOT = Path(__file__).resolve().parents[1]
SHOWING = ("report", "comparison", "analysis")


def functions(tree: ast.AST) -> Iterator[int]:
    """Lines of every function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield (node.end_lineno or node.lineno) - node.lineno + 1


def measured(checkout: Path) -> dict[str, str]:
    """The rows of the table for one checkout."""
    package = checkout / "slm_plugin"
    texts = {path: path.read_text(encoding="utf-8") for path in package.rglob("*.py")}
    lines = {path: text.count("\n") for path, text in texts.items()}
    lengths = [n for text in texts.values() for n in functions(ast.parse(text))]
    folders: Counter[str] = Counter()
    for path, count in lines.items():
        parts = path.relative_to(package).parts
        folders[f"{parts[0]}/" if len(parts) > 1 else "top level"] += count
    sizes = sorted(lines.values())
    total = sum(sizes)
    # A comparison's or an analysis's only module may lie at the top.
    showing = sum(
        count
        for path, count in lines.items()
        if path.relative_to(package).parts[0].removesuffix(".py")
        in (*SHOWING, "compare", "analyze")
    )
    rows = {
        "modules": f"{len(texts):,}",
        "lines": f"{total:,}",
        "module, median and 95 %": f"{median(sizes):.0f}, {quantiles(sizes, n=20)[-1]:.0f}",
        "function, median and 95 %": f"{median(lengths):.0f}, {quantiles(lengths, n=20)[-1]:.0f}",
    }
    rows |= {f"lines of {name}": f"{count:,}" for name, count in sorted(folders.items())}
    return {**rows, "share of report, comparison, analysis": f"{showing / total:.1%}"}


def main() -> None:
    """Print a column for every checkout."""
    checkouts = [Path(given).resolve() for given in sys.argv[1:]] or [ROOT]
    columns = [measured(checkout) for checkout in checkouts]
    print("| | " + " | ".join(checkout.name for checkout in checkouts) + " |")
    print("|---" * (len(checkouts) + 1) + "|")
    for name in dict.fromkeys(name for column in columns for name in column):
        print(f"| {name} | " + " | ".join(column.get(name, "") for column in columns) + " |")


if __name__ == "__main__":
    main()
