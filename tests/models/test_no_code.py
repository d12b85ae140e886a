"""No code of a checkpoint is run and nobody is asked to: not in a call, not on a terminal."""

from __future__ import annotations

import ast
import json
import os
import pty
import select
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import slm_plugin
from tests.tiny import make_checkpoint

PACKAGE = Path(slm_plugin.__file__).parent
CALLS = ("from_pretrained", "from_config")


def calls() -> list[tuple[str, ast.Call]]:
    """Every call in the package that loads something through transformers or Optimum."""
    found = []
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                called = ast.unparse(node.func)
                if node.func.attr in CALLS and "GenerationConfig" not in called:
                    found.append((f"{file.name}:{node.lineno}", node))
    return found


def test_every_call_says_that_code_is_not_trusted() -> None:
    """The libraries' default is to ask on the terminal."""
    assert len(calls()) >= 6
    for place, call in calls():
        trusted = [k.value for k in call.keywords if k.arg == "trust_remote_code"]
        assert trusted, f"{place} does not say trust_remote_code"
        assert all(isinstance(v, ast.Constant) and v.value is False for v in trusted), place


def on_a_terminal(folder: Path) -> bytes:
    """What loading a folder prints on a terminal, where every question is answered with yes."""
    script = (
        "import sys\nfrom slm_plugin.models.loading import ModelSource, load\n"
        "try: load(ModelSource(id=sys.argv[1], device='cpu'))\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, "-c", script, str(folder)])
    seen, start = b"", time.monotonic()
    while time.monotonic() - start < 60:
        if not select.select([terminal], [], [], 0.5)[0]:
            continue
        try:
            data = os.read(terminal, 4096)
        except OSError:
            break
        seen += data
        if not data:
            break
        if b"[y/N]" in data:
            os.write(terminal, b"y\n")
    os.waitpid(child, 0)
    os.close(terminal)
    return seen


@pytest.mark.process
@pytest.mark.parametrize("kind", ["model", "tokenizer", "stock"])
def test_nobody_is_asked_and_nothing_runs(tmp_path: Path, kind: str) -> None:
    """Config, tokenizer and a stock model with code beside it, each of them on a terminal."""
    folder, ran = make_checkpoint(tmp_path / "m"), tmp_path / "ran"
    (folder / "odd.py").write_text(f"open({str(ran)!r}, 'w').close()\nOdd = None\n")
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    tokenizer: dict[str, Any] = json.loads((folder / "tokenizer_config.json").read_text())
    if kind in ("model", "stock"):
        config["auto_map"] = {"AutoConfig": "odd.Odd", "AutoModelForCausalLM": "odd.Odd"}
    if kind == "model":
        config |= {"model_type": "odd", "architectures": ["OddForCausalLM"]}
    if kind in ("tokenizer", "stock"):
        tokenizer["auto_map"] = {"AutoTokenizer": ["odd.Odd", None]}
    if kind == "tokenizer":
        tokenizer["tokenizer_class"] = "Odd"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    seen = on_a_terminal(folder)
    assert b"[y/N]" not in seen and not ran.exists()
    expected = {"model": b"UnsupportedModelError", "tokenizer": b"ModelSourceError", "stock": b""}
    assert expected[kind] in seen and (kind != "stock" or b"Error" not in seen)
