"""Folders that this tool wrote are known by their marker, older ones by their report."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from slm_plugin.outputs.marker import MARKER, Contents, contents, mark


def folder_of(path: Path, **files: object) -> Path:
    """A folder with files: JSON for what is no text."""
    for name, content in files.items():
        file = path / name.replace("__", "/").replace("_json", ".json")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


PLAN = {"operations": [], "fingerprint": {}, "pruner": "slm"}
RUN = {"recipe": {}, "stages": [], "exports": [], "versions": {}}


def test_a_marked_folder_is_known(tmp_path: Path) -> None:
    """Nothing in it is a stranger, at any depth; the marker names tool, kind and version."""
    folder = folder_of(tmp_path / "out", report_json=RUN, checkpoint__weights="x")
    mark(folder, "run")
    assert contents(folder) == Contents(empty=False, known=True, strangers=())
    marker = json.loads((folder / MARKER).read_text())
    assert marker["tool"] == "slm-plugin" and marker["kind"] == "run" and marker["version"]
    mark(folder, "run")
    assert json.loads((folder / MARKER).read_text()) == marker


def test_what_a_user_adds_is_a_stranger(tmp_path: Path) -> None:
    """A file at any depth, a link, whatever its name; what a user deletes is no matter."""
    folder = folder_of(tmp_path / "out", a="x", checkpoint__weights="x")
    mark(folder, "run")
    (folder / "a").unlink()
    assert not contents(folder).strangers
    (folder / "checkpoint" / "notes").touch()
    (folder / "checkpoint" / ".hidden").touch()
    (folder / "link").symlink_to(tmp_path)
    assert contents(folder).strangers == ("checkpoint/.hidden", "checkpoint/notes", "link")


def test_a_folder_of_ours_that_became_a_link_is_a_stranger(tmp_path: Path) -> None:
    """What a link leads to was not written by us."""
    folder = folder_of(tmp_path / "out", checkpoint__weights="x")
    mark(folder, "run")
    (folder / "checkpoint").rename(tmp_path / "moved")
    (folder / "checkpoint").symlink_to(tmp_path / "moved")
    assert contents(folder).strangers == ("checkpoint",)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"tool": "slm-plugin"}', '{"tool": "other", "contents": []}',
             '{"tool": "slm-plugin", "contents": [1]}', "[" * 9999, "\x00"],
)  # fmt: skip
def test_a_damaged_marker_makes_nothing_ours(tmp_path: Path, text: str) -> None:
    """Then everything in the folder is a stranger."""
    folder = folder_of(tmp_path / "out", a="x")
    (folder / MARKER).write_text(text)
    assert contents(folder) == Contents(empty=False, known=False, strangers=(MARKER, "a"))


def test_a_copied_marker_does_not_give_other_files_away(tmp_path: Path) -> None:
    """It lists what was written; the photographs are not."""
    folder = folder_of(tmp_path / "out", a="x")
    mark(folder, "run")
    (folder_of(tmp_path / "photos", b="x") / MARKER).write_bytes((folder / MARKER).read_bytes())
    assert contents(tmp_path / "photos").strangers == ("b",)


def test_folders_of_before_the_marker_are_known_by_their_report(tmp_path: Path) -> None:
    """Runs, plans, applied plans, analyses and comparisons."""
    run = {**RUN, "stages": [{"plan": "plan-01-slm.json"}, {"plan": None}],
           "exports": [{"folder": "checkpoint", "size_bytes": 3}]}  # fmt: skip
    folders = [
        folder_of(tmp_path / "run", report_json=run, checkpoint__w="abc", **{
            "report.html": "", "README.md": "", "plan-01-slm.json": "{}"}),
        folder_of(tmp_path / "plans", **{"plan-01-slm.json": PLAN,
            "plan-03-wanda.json": {**PLAN, "pruner": "wanda"}}),
        folder_of(tmp_path / "applied", plan_json=PLAN, **{"checkpoint/model.safetensors": "x"}),
        folder_of(tmp_path / "analysis", **{"analysis.html": "", "analysis.json": {
            "calibration": {}, "figures": {}, "fingerprint": {}}}),
        folder_of(tmp_path / "compared", **{"comparison.md": "", "comparison.html": "",
            "comparison.json": {"comparison": {}, "cells": [], "fingerprint": {}}}),
    ]  # fmt: skip
    for folder in folders:
        assert contents(folder) == Contents(empty=False, known=True, strangers=()), folder
        (folder / "mine.txt").touch()
        assert contents(folder).strangers, folder


def test_an_export_that_has_grown_is_not_all_ours(tmp_path: Path) -> None:
    """Before the marker a run noted the size of its exports."""
    run = {**RUN, "exports": [{"folder": "checkpoint", "size_bytes": 3}, {"folder": "../x"}, 7]}
    folder = folder_of(tmp_path / "run", report_json=run, checkpoint__w="abc")
    assert not contents(folder).strangers
    folder_of(folder, checkpoint__mine="d")
    assert contents(folder).strangers == ("checkpoint/mine", "checkpoint/w")


@pytest.mark.parametrize(
    "files",
    [
        {"report.json": {"recipe": 1}},
        {"report.json": "{"},
        {"comparison.json": [1]},
        {"plan-01-x.json": {"operations": []}},
        {"plan-01-slm.json": PLAN, "notes": ""},
        {"plan.json": PLAN},
        {"checkpoint/model.safetensors": ""},
    ],
)
def test_what_only_looks_like_a_report_is_none(tmp_path: Path, files: dict[str, object]) -> None:
    """A report of another tool makes its folder none of ours."""
    assert not contents(folder_of(tmp_path / "x", **files)).known


def test_a_disk_mounted_in_a_former_result_is_a_stranger(mount_point: Path) -> None:
    """To delete the result would empty it."""
    folder = mount_point.parent
    (folder / MARKER).write_text('{"tool": "slm-plugin", "contents": {"disk/file": null}}')
    (mount_point / "file").touch()
    assert contents(folder).strangers == ("disk",)
    (mount_point / "file").unlink()
    assert contents(mount_point).empty


@pytest.mark.parametrize(
    "name",
    [
        "desktop.ini/precious",
        "lost+found/precious",
        ".slm-plugin.lock",
        ".slm-plugin.lock/precious",
        "checkpoint/lost+found/precious",
        "mine/precious",
    ],
)
def test_what_only_has_a_known_name_is_a_stranger(tmp_path: Path, name: str) -> None:
    """The name of litter, or of a lock, protects nothing: what is not looked at is not deleted."""
    folder = folder_of(tmp_path / "x", a="1")
    mark(folder, "run")
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("mine")
    assert contents(folder).strangers
    (folder / "a").unlink()
    (folder / MARKER).unlink()
    assert not contents(folder).empty


def test_empty_folders_of_the_user_are_strangers(tmp_path: Path) -> None:
    """They are somebody's plan."""
    folder = folder_of(tmp_path / "x", a="1")
    mark(folder, "run")
    (folder / "mine" / "todo").mkdir(parents=True)
    assert contents(folder).strangers == ("mine/todo",)


def test_what_changed_under_a_name_of_ours_is_a_stranger(tmp_path: Path) -> None:
    """A file that the user wrote anew since: by its size, or by its time alone."""
    folder = folder_of(tmp_path / "x", a="1", b="2")
    mark(folder, "run")
    assert contents(folder).strangers == ()
    (folder / "a").write_text("my notes")
    os.utime(folder / "b", ns=(1, 1))
    assert contents(folder).strangers == ("a (changed since)", "b (changed since)")


def test_of_a_checkpoint_without_a_marker_only_its_own_files_are_known(tmp_path: Path) -> None:
    """Notes and adapters beside the weights are the user's."""
    folder = folder_of(
        tmp_path / "x",
        plan_json=PLAN,
        **{"checkpoint/model.safetensors": "w", "checkpoint/adapter.safetensors": "w"},
    )
    assert contents(folder).strangers == ("checkpoint/adapter.safetensors",)
    edited = folder_of(tmp_path / "y", **{"plan-1-my-edited.json": PLAN})
    assert not contents(edited).known


def test_a_file_of_absurd_size_is_not_read(tmp_path: Path) -> None:
    """Not a report of ours, and no reason to run out of memory."""
    for name in (MARKER, "report.json"):
        folder = folder_of(tmp_path / name.strip("."), other="1")
        with (folder / name).open("wb") as file:
            file.truncate(300 << 30)
        assert not contents(folder).known
