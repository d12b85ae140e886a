"""Checks of the user's lm-eval tasks when the recipe is read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slm_plugin.errors import UserError
from slm_plugin.evaluation.lm_eval_files import FunctionName, check_function, function_names

# Builders of the package datasets that read files named by the task.
FILE_BUILDERS = ("json", "csv", "parquet", "text", "arrow", "xml", "hdf5")


def check_config(config: dict[str, Any], file: Path, root: Path) -> None:
    """Check a task's or group's config without running its code.

    Args:
        config: What `read_task_file` returned.
        file: The task file.
        root: The folder of task files.

    Raises:
        UserError: A function is not there, data is missing, or the task would run code that
            nobody here has, as metrics and loading scripts of the Hub.
    """
    for wanted in function_names(config):
        check_function(wanted, file, root)
    check_code_keys(config, f"the task file {file}")
    _check_metrics(config, f"the task file {file}")
    for key in ("custom_dataset", "class"):
        if key in config and not isinstance(config[key], FunctionName):
            raise UserError(
                f"the task file {file}: {key} has to name code",
                hint=f"write it as `{key}: !function data.load`",
            )
    _check_data(config, file)


def check_code_keys(config: dict[str, Any], said: str) -> None:
    """Check that a task runs only installed code; this includes lm-eval's own tasks.

    Args:
        config: The task's keys; functions may be names or text.
        said: Start of the message.

    Raises:
        UserError: It does.
    """
    if config.get("unsafe_code", False) is not False:
        raise UserError(
            f"{said} is marked unsafe_code: it would run the programs that the model writes",
            hint="use lm-eval's own command in a sandbox for it",
        )
    for entry in _metrics(config):
        if entry.get("hf_evaluate"):
            raise foreign_metric(said, entry.get("metric"))


def foreign_metric(said: str, metric: Any) -> UserError:
    """The error about a metric that is not part of lm-eval."""
    return UserError(
        f"{said}: lm-eval has no metric '{metric}' of its own, and would fetch and run one from "
        "the Hub",
        hint="name a metric of lm-eval, or write one as `metric: !function code.metric`",
    )


def _check_metrics(config: dict[str, Any], said: str) -> None:
    from lm_eval.api import metrics  # noqa: F401 - fills the registry
    from lm_eval.api.registry import metric_registry

    # A task that computes its own scores may use its own names.
    for entry in _metrics(config) if config.get("process_results") is None else ():
        metric = entry.get("metric")
        if not isinstance(metric, FunctionName) and metric not in metric_registry:
            raise foreign_metric(said, metric)


def _metrics(config: dict[str, Any]) -> list[dict[str, Any]]:
    listed = config.get("metric_list")
    return [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []


def _check_data(config: dict[str, Any], file: Path) -> None:
    settings = config.get("dataset_kwargs")
    settings = settings if isinstance(settings, dict) else {}
    if settings.get("trust_remote_code"):
        raise UserError(
            f"the task file {file}: trust_remote_code would run a data set's own code",
            hint="remove it, and name a data set of plain files",
        )
    path = config.get("dataset_path")
    if not isinstance(path, str):
        return
    said = f"the task file {file}: dataset_path {path}"
    if path == "pandas":
        raise UserError(f"{said} reads pickles, which are code", hint="use json, csv or parquet")
    local = Path(path)
    if path.endswith(".py") or (local / f"{local.name}.py").is_file():
        raise UserError(
            f"{said} is a loading script, which is not run",
            hint="name a data set of plain files, or write `custom_dataset: !function data.load`",
        )
    if (local.is_absolute() or path.startswith(".")) and not local.exists():
        raise UserError(f"{said} does not exist", hint="paths start at the working directory")
    if path in FILE_BUILDERS:
        for name in _files(settings.get("data_files")):
            if not _there(name, settings.get("data_dir")):
                raise UserError(
                    f"the task file {file}: the data file {name} does not exist",
                    hint="paths start at the working directory",
                )


def _files(found: Any) -> Iterator[str]:
    """All names in data_files: one, a list, or either by split."""
    if isinstance(found, str):
        yield found
    elif isinstance(found, dict | list):
        for one in found.values() if isinstance(found, dict) else found:
            yield from _files(one) if not isinstance(one, dict) else ()


def _there(name: str, folder: Any) -> bool:
    """Whether a file exists; URLs and patterns are left to `datasets`."""
    if "://" in name or "::" in name or (isinstance(folder, str) and "://" in folder):
        return True
    path = Path(folder, name) if isinstance(folder, str) else Path(name)
    try:
        return any(sign in name for sign in "*?[") or path.exists() or Path(name).exists()
    except (OSError, ValueError):
        return False
