"""What README.md and docs/ show works: code runs, recipes are valid, commands and links exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from safetensors.torch import save_file

from slm_plugin.cli.commands import app
from slm_plugin.comparison.configuration import Comparison
from slm_plugin.models import families
from slm_plugin.recipe import Recipe
from slm_plugin.registry import pruners
from tests.encoders import make_inputs
from tests.tiny import VOCABULARY, make_model, make_tokenizer

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
FENCED = re.compile(r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\]\((?!\w+:)([^)#]*)(?:#([^)]+))?\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
MARK = re.compile(r"<!-- not run: \S.* -->\n\Z")
FOLDERS = ("benchmarks/", "docs/", "integration/", "locks/", "recipes/", "slm_plugin/", "tests/")
COMMANDS: Any = typer.main.get_command(app)
FIXED = "version: 1\nmodel: {id: smollm2-135m}\noutput: runs/fragment\n"


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str
    runs: bool


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, each with the line on which its content begins."""
    text = page.read_text(encoding="utf-8")
    for match in FENCED.finditer(text):
        before = text[: match.start()]
        yield Block(page, before.count("\n") + 2, *match.groups(), not MARK.search(before))


def of_language(language: str) -> list[Any]:
    """All blocks of a language as test parameters."""
    found = [block for page in PAGES for block in blocks(page) if block.language == language]
    return [pytest.param(block, id=f"{block.page.name}:{block.line}") for block in found]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return FENCED.sub("", page.read_text(encoding="utf-8"))


def command_lines(text: str) -> Iterator[list[str]]:
    """The words of every command of a shell block; quoted words may span lines."""
    pending = ""
    for line in text.replace("\\\n", " ").splitlines():
        pending += line
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:
            pending += "\n"
            continue
        pending = ""
        if words:
            stops = (i for i, word in enumerate(words) if word in (">", "|", "&&"))
            yield words[: next(stops, len(words))]
    assert not pending, f"an open quotation: {pending}"


def check_names(words: list[str]) -> None:
    """The command and the options of a call of slm-plugin exist."""
    command = COMMANDS.commands[words[0]]
    known = {name for parameter in command.params for name in parameter.opts} | {"--help"}
    used = {word.partition("=")[0] for word in words[1:] if word.startswith("-")}
    assert used <= known, f"{words[0]} has no {used - known}"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found = HEADING.findall(prose(page))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in found}


@pytest.mark.parametrize("block", of_language("python"))
def test_python_blocks_run(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reload_here: None
) -> None:
    """Every Python block runs by itself on a tiny model, unless it is marked."""
    code = compile("\n" * (block.line - 1) + block.text, str(block.page), "exec")
    if not block.runs:
        pytest.skip("marked in the text")
    monkeypatch.chdir(tmp_path)
    # What a block registers is forgotten with it; the built-in strategies are imported once.
    monkeypatch.setattr(pruners, "_classes", pruners.usable())
    monkeypatch.setattr(families, "_known", dict(families._known))
    words = [f"w{3 + (i * i + 7 * i) % (VOCABULARY - 3)}" for i in range(1200)]
    exec(code, {
        "__name__": __name__,
        "model": make_model(max_position_embeddings=4096),
        "tokenizer": make_tokenizer(),
        "texts": [" ".join(words[i : i + 200]) for i in range(0, len(words), 200)],
    })  # fmt: skip


@pytest.mark.parametrize("block", of_language("yaml"))
def test_recipes_are_valid(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole recipes and comparisons are valid; so are their stages or methods alone."""
    monkeypatch.chdir(tmp_path)
    save_file(make_inputs("whisper_encoder"), "speech.safetensors")
    if re.search(r"^ *- onnx:", block.text, re.MULTILINE):
        pytest.importorskip("optimum.onnxruntime")
    keys = set(re.findall(r"^(\w+):", block.text, re.MULTILINE))
    kind = Comparison if "methods" in keys else Recipe
    if "version" in keys:
        kind.parse(block.text)
    elif keys & {"stages", "methods"}:
        kind.parse(FIXED + "calibration: {source: builtin}\n" + block.text)


@pytest.mark.parametrize("block", of_language("bash"))
def test_commands_exist(block: Block) -> None:
    """Calls of slm-plugin parse; scripts exist and know the options that are used."""
    for words in command_lines(block.text):
        if Path(words[0]).name == "slm-plugin":
            check_names(words[1:])
            COMMANDS.commands[words[1]].make_context(words[1], words[2:])
        elif words[0] == "python" and words[1] != "-m":
            source = (ROOT / words[1]).read_text(encoding="utf-8")
            assert [w for w in words if w.startswith("--") and f'"{w}"' not in source] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_in_the_text_exist(page: Path) -> None:
    """Relative links, anchors, paths and commands in the text lead somewhere."""
    text = prose(page)
    for target, anchor in LINK.findall(text):
        linked = (page.parent / target).resolve() if target else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), f"{target}#{anchor}"
    for span in SPAN.findall(text):
        words = span.split()
        if words[0].startswith(FOLDERS):
            assert (ROOT / words[0]).exists(), span
        elif words[0] == "slm-plugin" and words[1:]:
            check_names(words[1:])
