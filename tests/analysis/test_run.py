"""An analysis from beginning to end, through Python and the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from slm_plugin import cli
from slm_plugin.analysis.record import Analysis
from slm_plugin.analysis.run import analyze
from slm_plugin.calibration.samples import digest
from slm_plugin.cli import writing
from slm_plugin.errors import OutputError
from slm_plugin.outputs.marker import MARKER
from tests.tiny import make_checkpoint, random_tokens


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tiny Llama with its tokenizer, on disk."""
    return make_checkpoint(tmp_path / "model", num_hidden_layers=3)


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "slm_plugin", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.process
def test_the_command_leaves_a_page_and_its_figures(
    checkpoint: Path, tokens: Path, tmp_path: Path
) -> None:
    """Two files, named on standard output; the protocol is that of the call."""
    output = tmp_path / "runs" / "analysis"
    done = command("analyze", checkpoint, "--source", tokens, "--output", output, "--seed", 5)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(output / "analysis.html"), str(output / "analysis.json")]
    assert sorted(p.name for p in output.iterdir()) == [MARKER, "analysis.html", "analysis.json"]
    found = Analysis.model_validate_json((output / "analysis.json").read_text(encoding="utf-8"))
    assert (found.calibration.samples, found.calibration.length) == (6, 24)
    assert found.calibration.sha256 == digest(random_tokens(6, 24))
    assert found.seed == found.calibration.seed == 5
    assert len(found.figures.cka.unbiased) == len(found.figures.block_influence) == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--samples", "3"], "--samples"),
        (["--length", "1"], "--length"),
        (["--source", "nowhere.txt"], "there is no file nowhere.txt"),
        (["--source", ""], "source: String should have at least 1 character"),
        (["--source", "{tokens}", "--samples", "7"], "has samples 6"),
        (["--source", "{few}"], "needs 4 samples or more; there are 3"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments: list[str],
    said: str,
    checkpoint: Path,
    tokens: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit code 2, a message that names the place, no folder."""
    few = tmp_path / "few.json"
    few.write_text(json.dumps(random_tokens(3, 24).tolist()))
    filled = [part.format(tokens=tokens, few=few) for part in arguments]
    before = sorted(tmp_path.iterdir())
    call = ["slm-plugin", "analyze", str(checkpoint), "--output", str(tmp_path / "out"), *filled]
    monkeypatch.setattr(sys, "argv", call)
    monkeypatch.setattr(writing, "quiet_libraries", lambda: None)
    with pytest.raises(SystemExit) as exited:
        cli.main()
    assert exited.value.code == 2
    shown = capsys.readouterr()
    assert said in shown.err and not shown.out
    assert sorted(tmp_path.iterdir()) == before


def test_an_existing_output_is_kept_before_any_work(
    checkpoint: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused while nothing is loaded yet; --overwrite replaces a former result, and no other."""
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("kept")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"no part of a former result: mine\.txt"):
            analyze(str(checkpoint), output, source=str(tokens), overwrite=overwrite)
    assert (output / "mine.txt").read_text() == "kept"
    (output / "mine.txt").unlink()
    analyze(str(checkpoint), output, source=str(tokens))
    with monkeypatch.context() as patched:
        patched.setattr(
            "slm_plugin.preparation.load", lambda _source: pytest.fail("the model was loaded")
        )
        with pytest.raises(OutputError, match="exists"):
            analyze(str(checkpoint), output, source=str(tokens))
    before = (output / "analysis.json").read_bytes()
    analyze(str(checkpoint), output, source=str(tokens), overwrite=True)
    assert (output / "analysis.json").read_bytes() != before
    assert sorted(p.name for p in output.iterdir()) == [MARKER, "analysis.html", "analysis.json"]


def test_text_gives_thirty_two_samples_unless_told(checkpoint: Path, tmp_path: Path) -> None:
    """The default of the command, not that of recipes."""
    text = tmp_path / "text.txt"
    lines = (" ".join(f"w{3 + (7 * i + j) % 125}" for j in range(12)) for i in range(40))
    text.write_text("\n\n".join(lines))
    found = analyze(str(checkpoint), tmp_path / "out", source=str(text), length=8)
    assert (found.calibration.samples, found.calibration.length) == (32, 8)
