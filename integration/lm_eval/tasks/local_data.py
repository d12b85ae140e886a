"""Data source of the `local_*` tasks: JSONL files in the folder SLM_PLUGIN_EVAL_DATA.

lm-eval calls `load` through `custom_dataset: !function local_data.load`. The stock functions at
the bottom are only re-exported, so that a YAML next to this file can name them.
"""

import json
import os
from pathlib import Path
from typing import Any

import datasets
from lm_eval.tasks.hellaswag.utils import process_docs as hellaswag_process_docs
from lm_eval.tasks.winogrande.preprocess_winogrande import (
    doc_to_choice as winogrande_doc_to_choice,
)
from lm_eval.tasks.winogrande.preprocess_winogrande import (
    doc_to_target as winogrande_doc_to_target,
)
from lm_eval.tasks.winogrande.preprocess_winogrande import (
    doc_to_text as winogrande_doc_to_text,
)

__all__ = [
    "ENV_VAR",
    "hellaswag_process_docs",
    "load",
    "winogrande_doc_to_choice",
    "winogrande_doc_to_target",
    "winogrande_doc_to_text",
]

ENV_VAR = "SLM_PLUGIN_EVAL_DATA"


def load(
    local_file: str, local_split: str, local_fields: list[str], **_metadata: object
) -> dict[str, datasets.Dataset]:
    """Read one JSONL file of the data folder as the only split of a data set.

    The rows are held in memory: nothing is downloaded and no `datasets` cache is written or read.

    Args:
        local_file: File name inside the folder that SLM_PLUGIN_EVAL_DATA names.
        local_split: Name of the split that the task evaluates ("validation" or "test").
        local_fields: Fields that every row must have. lm-eval takes a prompt that names a missing
            field as literal text, so a missing one must not pass in silence.
        _metadata: Task metadata and model arguments, which lm-eval passes along; not used.

    Returns:
        A mapping from the split name to its rows.

    Raises:
        RuntimeError: If the environment variable is not set.
        FileNotFoundError: If the file does not exist.
        ValueError: If the file has no rows, a row is not a JSON object with all the fields, or a
            field changes its type from row to row.
    """
    folder = os.environ.get(ENV_VAR)
    if not folder:
        raise RuntimeError(
            f"The environment variable {ENV_VAR} is not set: "
            f"point it at the folder that holds {local_file}."
        )
    path = Path(folder).expanduser() / local_file
    if not path.is_file():
        raise FileNotFoundError(f"The task data file {path} does not exist ({ENV_VAR}={folder}).")
    rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                rows.append(_parse(line, local_fields, f"{path}, line {number}"))
    if not rows:
        raise ValueError(f"The task data file {path} has no rows.")
    try:
        return {local_split: datasets.Dataset.from_list(rows)}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: the rows differ in their types ({error}).") from None


def _parse(line: str, fields: list[str], where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON ({error}).") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: not a JSON object.")
    missing = [field for field in fields if field not in row]
    if missing:
        raise ValueError(f"{where}: missing field(s) {', '.join(missing)}.")
    # `idx` only goes into the logged samples, to join them with the official split.
    return {"idx": row.get("idx"), **{field: row[field] for field in fields}}
