"""Finding and loading lm-eval tasks before there is a model to run them on."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm_plugin.errors import UserError
from slm_plugin.evaluation import builtin_task
from slm_plugin.progress import say


@dataclass(frozen=True, slots=True)
class LoadedTasks:
    """Tasks with their data.

    Attributes:
        found: What lm-eval's task manager makes of them, as ``lm_eval.evaluate`` takes it.
        names: Tasks and groups in the order of the recipe, the members of a tag in its place.
    """

    found: dict[str, Any]
    names: tuple[str, ...]

    def set_shots(self, shots: int | None, seed: int) -> None:
        """Fix the number of few-shot examples, and how they are drawn.

        As in lm-eval's command, a task that insists on none keeps to that.

        Args:
            shots: Examples per question; None leaves each task its own number.
            seed: Seed of the draw.
        """
        for task in self.found["tasks"].values():
            own = task.get_config("num_fewshot")
            if own is None or (shots is not None and own != 0):
                task.set_config(key="num_fewshot", value=shots or 0)
            task.set_fewshot_seed(seed=seed)


def load_tasks(names: Sequence[str], include_path: str | None) -> LoadedTasks:
    """Load tasks, groups and tags by name.

    Raises:
        UserError: The folder is missing, a name is unknown, a task cannot be loaded, or two names
            bring the same task.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(
            f"the lm_eval include_path {include_path} is not a folder",
            hint="name the folder that holds the task YAML files",
        )
    manager = _manager(names, include_path)
    roots: list[Any] = []
    for name in dict.fromkeys(names):
        roots += _load(manager, name)
    try:
        found = manager.load(roots)
    except ValueError as error:
        raise UserError(
            f"lm_eval cannot run these tasks together: {_first_line(error)}",
            hint="name a task once, alone or through its group",
        ) from error
    return LoadedTasks(found, tuple(map(_name, roots)))


def _manager(names: Sequence[str], include_path: str | None) -> Any:
    """The smallest index that knows all names: lm-eval's own 14,000 tasks take half a minute."""
    from lm_eval.tasks import TaskManager

    wanted = [name for name in names if name != builtin_task.NAME]
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if all(_complete(manager, name) for name in wanted):
        return manager
    say("reading the index of lm-eval's own tasks")
    manager = TaskManager(include_path=include_path)
    known = [*manager.all_tasks, builtin_task.NAME]
    for name in wanted:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3)
            raise UserError(
                f"lm-eval knows no task, group or tag '{name}'",
                hint=f"did you mean {' or '.join(close)}?"
                if close
                else "see `lm-eval ls tasks`, or give include_path",
            )
    return manager


def _complete(manager: Any, name: str) -> bool:
    """Whether an index knows a name and all that it brings in."""
    entry = manager.task_index.get(name)
    return entry is not None and all(
        _complete(manager, member) for member in _members(entry.cfg or {}) if member != name
    )


def _members(config: dict[str, Any]) -> Iterator[str]:
    """Names that a group's YAML refers to."""
    listed = config.get("task")
    for member in listed if isinstance(listed, list) else ():
        if isinstance(member, str):
            yield member
        elif "group" not in member:
            yield member["task"]
        elif isinstance(member.get("task"), list):
            yield from _members(member)
        else:
            yield member["group"]


def _load(manager: Any, name: str) -> list[Any]:
    """lm-eval's task or group of a name, or the tasks of a tag.

    Whatever a task's own code or data source raises ends up here, hence the broad catch.
    """
    try:
        spec = builtin_task.task_config() if name == builtin_task.NAME else name
        found = manager.load(spec)
    except Exception as error:
        raise UserError(
            f"lm-eval cannot load '{name}': {_first_line(error)}",
            hint="see the task's own documentation; stock tasks fetch their data from the Hub",
        ) from error
    return [found["groups"][name]] if name in found["groups"] else [*found["tasks"].values()]


def _name(root: Any) -> str:
    return str(root.task_name if hasattr(root, "task_name") else root.name)


def _first_line(error: Exception) -> str:
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return text.splitlines()[0] if text else type(error).__name__
