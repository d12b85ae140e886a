"""What cannot or must not be an output is refused before anything is computed."""

from __future__ import annotations

import os
import pwd
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import slm_plugin
from slm_plugin.errors import OutputError
from slm_plugin.outputs.place import (
    Input,
    local,
    located,
    refuse_existing,
    refuse_same,
    resolve_output,
)
from tests.outputs.conftest import as_nobody


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no name"),
        (" \t", "no name"),
        ("a\0b", "control character"),
        ("a\nb", "control character"),
        ("\x1b[31mred", "control character"),
        ("a\udc80b", "no Unicode text"),
        ("\ud83d", "no Unicode text"),
        ("~no-such-user/out", "no home folder ~no-such-user"),
    ],
)
def test_a_text_that_names_no_folder_is_refused(text: str, said: str) -> None:
    """One line that says what is wrong with it."""
    with pytest.raises(OutputError, match=said) as told:
        located(text)
    assert "\n" not in str(told.value) and str(told.value).isprintable()


@given(st.text(st.characters()))
def test_any_text_is_located_settled_or_refused(text: str) -> None:
    """Whatever stands in a recipe: a folder or an `OutputError`."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            place = resolve_output(Path(folder) / located(text))
        except OutputError:
            return
        assert not place.target.exists() or not any(place.target.iterdir())


def test_a_tilde_is_the_home_folder_of_the_environment_or_of_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without either, a path that needs none still works."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert located("~/out") == tmp_path / "out"
    monkeypatch.delenv("HOME")
    assert located("~/out") == Path(pwd.getpwuid(os.getuid()).pw_dir) / "out"

    def nobody(_: int) -> None:
        raise KeyError

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    with pytest.raises(OutputError, match="no home folder ~"):
        located("~/out")
    assert resolve_output(located(str(tmp_path / "out"))).target == tmp_path.resolve() / "out"


def test_the_places_of_the_user_are_never_an_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root, working directory, home, and whatever holds them, however they are spelled."""
    home, work, system = (tmp_path / name for name in ("home/me", "some/where", "other/me"))
    for folder in (home, work, system):
        folder.mkdir(parents=True)
    (tmp_path / "link").symlink_to(home)
    monkeypatch.setenv("HOME", str(home))
    entry = pwd.getpwuid(os.getuid())
    changed = pwd.struct_passwd((*entry[:5], str(system), entry[6]))
    monkeypatch.setattr(pwd, "getpwuid", lambda _: changed)
    monkeypatch.chdir(work)
    refused = {
        "root": ["/", "//", "/tmp/..", "../" * 40],
        "working directory": [".", "", "..", "x/..", "./", work, work / "..", tmp_path / "some"],
        "home folder": [home, f"{home}/", home.parent, tmp_path / "link", system, system.parent],
    }
    (work / "x").mkdir()
    for what, spellings in refused.items():
        for spelling in spellings:
            with pytest.raises(OutputError, match=what):
                resolve_output(Path(spelling))
    for free in ("out", home / "out", tmp_path / "link" / "out", system / "a" / "b"):
        resolve_output(Path(free))


def test_a_second_mount_of_the_home_folder_is_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: Callable[[Path], Path]
) -> None:
    """Names differ, the folder is the same."""
    (tmp_path / "top" / "me").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "top" / "me"))
    for path in (bound(tmp_path / "top" / "me"), bound(tmp_path / "top")):
        with pytest.raises(OutputError, match="home folder"):
            resolve_output(path)


def test_a_working_directory_that_was_deleted_harms_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full path works, a relative one is refused."""
    (tmp_path / "lost").mkdir()
    monkeypatch.chdir(tmp_path / "lost")
    (tmp_path / "lost").rmdir()
    resolve_output(tmp_path / "out")
    with pytest.raises(OutputError):
        resolve_output(Path("out"))


def test_an_input_is_left_alone(tmp_path: Path) -> None:
    """An output is not the model, does not hold it and does not lie in it."""
    model = tmp_path / "models" / "mine"
    model.mkdir(parents=True)
    (tmp_path / "link").symlink_to(model)
    gguf = tmp_path / "files" / "model.gguf"
    gguf.parent.mkdir()
    gguf.touch()
    inputs = (*local("the model", str(tmp_path / "link")), Input("the file", gguf))
    said = {
        model: "is the model",
        tmp_path / "link": "is the model",
        model / "out": "lies inside the model",
        tmp_path / "link" / "a" / "b": "lies inside the model",
        tmp_path / "models": "holds the model",
        gguf.parent: "holds the file",
        gguf: "is the file",
        Path(slm_plugin.__file__).parent / "out": "lies inside the installed package",
    }
    for folder, relation in said.items():
        with pytest.raises(OutputError, match=relation):
            resolve_output(folder, inputs)
    resolve_output(tmp_path / "models" / "other", inputs)
    resolve_output(gguf.parent / "out", inputs)
    assert local("x", "no/such\0file") == local("x", "~no-such-user/x") == ()


def test_links_are_followed_when_they_lead_somewhere(tmp_path: Path) -> None:
    """A link to a folder means that folder; a dangling or looping one is refused."""
    (tmp_path / "real").mkdir()
    (tmp_path / "to").symlink_to("real")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    assert resolve_output(tmp_path / "to").target == tmp_path.resolve() / "real"
    assert resolve_output(tmp_path / "to" / "new").target == tmp_path.resolve() / "real" / "new"
    for name in ("dangling", "loop", "one", "dangling/out", "loop/a/b"):
        with pytest.raises(OutputError, match="leads nowhere"):
            resolve_output(tmp_path / name)


def test_what_no_folder_can_be_is_refused(tmp_path: Path) -> None:
    """A file, what lies below one, a way through a folder that is not there, long names."""
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    said = {
        "file": "is a file",
        "pipe": "is a file",
        "file/below": "cannot write into",
        "file/below/deep": "cannot write into",
        "nowhere/../out": "no folder .*nowhere",
        "x" * 256: "too long",
        "x" * 240: "too long",
        "ä" * 120: "too long",
        "x" * 300 + "/out": "too long",
        "/".join(["deep" * 10] * 100): "too long",
    }
    for name, message in said.items():
        with pytest.raises(OutputError, match=message):
            resolve_output(tmp_path / name)
    resolve_output(tmp_path / ("x" * 230))


def test_a_folder_with_something_in_it_is_never_replaced(tmp_path: Path) -> None:
    """Not with overwrite either; hidden files count, a file manager's litter does not."""
    out = tmp_path / "out"
    out.mkdir()
    (out / ".DS_Store").touch()
    refuse_existing(resolve_output(out), overwrite=False)
    for name in (".hidden", "notes.txt", "sub/deep/file", "empty/"):
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if name.endswith("/") else path.touch()
        with pytest.raises(OutputError, match="no part of a former result: "):
            resolve_output(out)
        path.rmdir() if name.endswith("/") else path.unlink()
        if "sub" in name:
            (out / "sub/deep").rmdir()
            (out / "sub").rmdir()


def test_two_outputs_do_not_lie_in_each_other(tmp_path: Path) -> None:
    """As when plans are to go where the run writes."""
    (tmp_path / "link").symlink_to(tmp_path)
    for other in ("out", "out/plans", "", "link/out", "x/../out"):
        with pytest.raises(OutputError, match="the output"):
            refuse_same(tmp_path / other, tmp_path / "out", "the output")
    refuse_same(tmp_path / "out.plans", tmp_path / "out", "the output")


def test_a_folder_that_cannot_be_renamed_is_filled_in_place(
    tmp_path: Path, mount_point: Path
) -> None:
    """A mount point, and one whose parent is not ours; what lies beside them is not."""
    assert resolve_output(mount_point).inside
    assert not resolve_output(mount_point / "out").inside
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "mine").mkdir(mode=0o777)
    (tmp_path / "shared" / "mine").chmod(0o777)
    for above in tmp_path.parents:
        if above.owner() == "root" and len(above.parts) > 2:
            above.chmod(above.stat().st_mode | 0o011)
    tmp_path.chmod(0o755)
    assert as_nobody(lambda: str(resolve_output(tmp_path / "shared" / "mine").inside)) == "True"
    said = as_nobody(lambda: str(resolve_output(tmp_path / "shared" / "new")))
    assert said.startswith("OutputError: cannot write into")
    # As /tmp is: all may write, and rename what is theirs.
    (tmp_path / "shared").chmod(0o1777)
    assert as_nobody(lambda: str(resolve_output(tmp_path / "shared" / "mine").inside)) == "True"
    assert as_nobody(lambda: str(resolve_output(tmp_path / "shared" / "new").inside)) == "False"
    (tmp_path / "shared" / "mine").chmod(0o700)
    said = as_nobody(lambda: str(resolve_output(tmp_path / "shared" / "mine")))
    assert said.startswith("OutputError: cannot write into")
