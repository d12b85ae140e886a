"""Find lm-eval tasks without running their code, and load them for a run."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm_plugin.errors import UserError
from slm_plugin.evaluation import builtin_task
from slm_plugin.evaluation.lm_eval_checks import check_code_keys, check_config, foreign_metric
from slm_plugin.evaluation.lm_eval_files import function_names, read_task_file, stock_tasks
from slm_plugin.foreign import contained
from slm_plugin.progress import say


@dataclass(frozen=True, slots=True)
class FoundTasks:
    """Tasks that exist and were checked, before any of their code has run.

    Attributes:
        manager: lm-eval's task manager, whose index knows them; None where all are built in.
        names: The names in the recipe, without duplicates.
        code: Python files and installed modules that run on loading, besides lm-eval's own.
    """

    manager: Any
    names: tuple[str, ...]
    code: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LoadedTasks:
    """Tasks with their data.

    Attributes:
        found: The objects of lm-eval's task manager, for ``lm_eval.evaluate``.
        names: Tasks and groups in the order of the recipe, with tags replaced by their members.
    """

    found: dict[str, Any]
    names: tuple[str, ...]

    def set_shots(self, shots: int | None, seed: int) -> None:
        """Set the number of few-shot examples and the seed of their draw.

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


def needs_lm_eval(names: Sequence[str]) -> bool:
    """Whether lm-eval itself is asked to find tasks, and not only the built-in one is named."""
    return any(name != builtin_task.NAME for name in names)


def find_tasks(names: Sequence[str], include_path: str | None) -> FoundTasks:
    """Find tasks, groups and tags by name, and check the user's files.

    Raises:
        UserError: The folder is missing, a name is unknown, or a file is wrong.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(
            f"the lm_eval include_path {include_path} is not a folder",
            hint="name the folder that holds the task YAML files",
            option="include_path",
        )
    # To import lm-eval takes seconds, and the built-in task is in none of its indices.
    manager = _manager(names, include_path) if needs_lm_eval(names) else None
    code: dict[str, None] = {}
    for entry in _entries(manager, names):
        if entry.yaml_path is None or Path(entry.yaml_path).resolve().is_relative_to(stock_tasks()):
            check_code_keys(entry.cfg or {}, f"lm-eval's task '{entry.name}'")
            continue
        root = Path(str(include_path))
        config = read_task_file(Path(entry.yaml_path), root)
        check_config(config, Path(entry.yaml_path), root)
        for wanted in function_names(config):
            code[str(wanted.source() or f"the installed module {wanted.module}")] = None
    return FoundTasks(manager, tuple(dict.fromkeys(names)), tuple(code))


def load_tasks(wanted: FoundTasks) -> LoadedTasks:
    """Load tasks with their data. This runs their code, after a message.

    Raises:
        UserError: A task cannot be loaded, or two names bring the same task.
    """
    for place in wanted.code:
        say(f"lm_eval: running the task code of {place}")
    manager = wanted.manager or _manager(wanted.names, None)
    roots: list[Any] = []
    for name in wanted.names:
        roots += _load(manager, name)
    try:
        found = manager.load(roots)
    except ValueError as error:
        raise UserError(
            f"lm_eval cannot run these tasks together: {_first_line(error)}",
            hint="name a task once, alone or through its group",
        ) from error
    for name, task in found["tasks"].items():
        _refuse_missing_metrics(name, task)
    return LoadedTasks(found, tuple(map(_name, roots)))


def _refuse_missing_metrics(name: str, task: Any) -> None:
    """Check that no metric is None: it was not fetched, and would fail after the evaluation."""
    if getattr(task.config, "process_results", None) is None:
        for metric, function in getattr(task, "_metric_fn_list", {}).items():
            if function is None:
                raise foreign_metric(f"the task '{name}'", metric)


def _manager(names: Sequence[str], include_path: str | None) -> Any:
    """The smallest index with all names; lm-eval's 14,000 tasks take half a minute to index."""
    from lm_eval.tasks import TaskManager

    wanted = [name for name in names if name != builtin_task.NAME]
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if all(_complete(manager, name, set()) for name in wanted):
        return manager
    say("reading the index of lm-eval's own tasks")
    manager = TaskManager(include_path=include_path)
    known = [*manager.all_tasks, builtin_task.NAME]
    for name in wanted:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3)
            raise UserError(
                "; ".join(
                    (f"lm-eval knows no task, group or tag '{name}'", *_unreadable(include_path))
                ),
                hint=f"did you mean {' or '.join(close)}?"
                if close
                else "see `lm-eval ls tasks`, or give include_path",
            )
    return manager


def _unreadable(include_path: str | None) -> Iterator[str]:
    """Files that lm-eval's index skips silently; an unknown name may be in one."""
    if include_path is None:
        return
    for file in sorted(Path(include_path).rglob("*.yaml")):
        try:
            read_task_file(file, Path(include_path))
        except UserError as error:
            yield str(error)


def _complete(manager: Any, name: str, seen: set[str]) -> bool:
    """Whether an index has a name and all its members."""
    entry = manager.task_index.get(name)
    if entry is None:
        return False
    if name in seen:
        return True
    seen.add(name)
    return all(_complete(manager, member.name, seen) for member in _members(entry))


def _entries(manager: Any, names: Iterable[str]) -> Iterator[Any]:
    """The index's entries of names and of all their members.

    Raises:
        UserError: A group includes itself or names something that is unknown, or two of the names
            bring in the same task.
    """
    bringing: dict[str, str] = {}
    for name in dict.fromkeys(names):
        if name == builtin_task.NAME:
            continue
        for entry in _walk(manager, _Member(name, inline=False), (), set()):
            alone = not [*_members(entry)]
            if alone and bringing.setdefault(entry.name, name) != name:
                raise UserError(
                    f"lm_eval cannot run '{bringing[entry.name]}' and '{name}' together: both "
                    f"include the task '{entry.name}'",
                    hint="name a task once, alone or through its group",
                )
            yield entry


@dataclass(frozen=True, slots=True)
class _Member:
    """A name inside a group.

    Attributes:
        inline: It has keys of its own, so it is a task even if the index lacks it.
    """

    name: str
    inline: bool


def _walk(manager: Any, member: _Member, groups: tuple[str, ...], seen: set[str]) -> Iterator[Any]:
    """The entry of a name and all its members, without duplicates; ``groups`` contain it."""
    if member.name in groups:
        raise UserError(f"the lm-eval group '{member.name}' includes itself")
    if member.name in seen:
        return
    seen.add(member.name)
    entry = manager.task_index.get(member.name)
    if entry is not None:
        yield entry
        for one in _members(entry):
            yield from _walk(manager, one, (*groups, member.name), seen)
    elif not member.inline:
        raise UserError(
            f"the lm-eval group '{groups[-1]}' names '{member.name}', which is no task",
            hint="see `lm-eval ls tasks`, or put its file into include_path",
        )


def _members(entry: Any) -> Iterator[_Member]:
    """The members of a group or tag of the index; empty for a task."""
    if entry.cfg is None:
        yield from (_Member(name, inline=False) for name in sorted(entry.tags))
    else:
        yield from _listed(entry.cfg)


def _listed(config: dict[str, Any]) -> Iterator[_Member]:
    """Names that a group's YAML refers to.

    Raises:
        UserError: An entry is neither a name nor a mapping with one.
    """
    listed = config.get("task")
    for member in listed if isinstance(listed, list) else ():
        own = member
        if isinstance(member, dict):
            if "group" in member and isinstance(member.get("task"), list):
                yield from _listed(member)
                continue
            own = member.get("group", member.get("task"))
        if not isinstance(own, str):
            raise UserError(
                f"the lm-eval group '{config.get('group')}' has a member {str(member)[:80]!r}",
                hint="a member is a name, or a mapping with `task:` or `group:`",
            )
        yield _Member(own, inline=isinstance(member, dict))


def _load(manager: Any, name: str) -> list[Any]:
    """lm-eval's task or group of a name, or the tasks of a tag.

    The task's own code and data source may raise anything, hence the broad catch.
    """
    spec = builtin_task.task_config() if name == builtin_task.NAME else name
    hint = "see the task's own documentation; stock tasks fetch their data from the Hub"
    with contained(f"lm-eval cannot load '{name}'", UserError, hint):
        try:
            found = manager.load(spec)
        except Exception as error:
            raise UserError(
                f"lm-eval cannot load '{name}': {_first_line(error)}", hint=hint
            ) from error
    return [found["groups"][name]] if name in found["groups"] else [*found["tasks"].values()]


def _name(root: Any) -> str:
    return str(root.task_name if hasattr(root, "task_name") else root.name)


def _first_line(error: Exception) -> str:
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return text.splitlines()[0] if text else type(error).__name__
