"""The command line says what went wrong in one line, whatever it was."""

from __future__ import annotations

import pytest
import torch

from slm_plugin import cli
from slm_plugin.errors import NumericalError, OutputError


def _too_large() -> None:
    torch.empty(10**15)


def _raised(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("work", "code", "said"),
    [
        (_too_large, 1, "out of memory"),
        (lambda: _raised(MemoryError()), 1, "out of memory"),
        (lambda: _raised(torch.OutOfMemoryError("CUDA out of memory.")), 1, "out of memory"),
        (lambda: _raised(OutputError("no room in x", hint="free some")), 2, "no room in x"),
        (lambda: _raised(NumericalError("NaN in y")), 1, "NaN in y"),
        (lambda: _raised(KeyboardInterrupt()), 130, "interrupted"),
        (lambda: _raised(ValueError("a\nb")), 1, "internal error: ValueError: a"),
    ],
)
def test_every_failure_is_one_line(
    work: object,
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An error line that names the fault, an exit code for its kind, and no traceback."""

    def app(*, standalone_mode: bool) -> None:
        assert callable(work)
        work()

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == code
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert said in shown
    assert "Traceback" not in shown
