"""A model in one GGUF file or in several: all parts are read, or none."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm_plugin.errors import ModelSourceError
from slm_plugin.models.gguf.header import Header, TensorPlace, read_header, shown

MERGE = "join the parts with llama-gguf-split --merge, or fetch all of them into one folder"
_PART = re.compile(
    r"(?P<stem>.*)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})(?P<suffix>\.gguf)", re.I
)
_SPLIT = "split."


@dataclass(frozen=True, slots=True)
class GgufModel:
    """What the files of one model state.

    Attributes:
        name: How messages name it.
        files: Its files, the one with the metadata first.
        fields: Metadata without those of the splitting.
        tensors: Places by name.
    """

    name: str
    files: tuple[Path, ...]
    fields: dict[str, Any]
    tensors: dict[str, TensorPlace]


def is_gguf(name: str) -> bool:
    """Whether a model's name means a GGUF file; a folder may be called as it likes."""
    if not name.lower().endswith(".gguf"):
        return False
    try:
        return not Path(name).expanduser().is_dir()
    except (OSError, RuntimeError):
        # Whoever loads it says what is wrong with the name.
        return True


def read_parts(path: Path) -> GgufModel:
    """Read the headers of a GGUF file and of the other parts of its model.

    Raises:
        ModelSourceError: A file is malformed, a part is missing, or the parts do not belong
            together.
    """
    header = read_header(path)
    count = header.fields.get("split.count", 0)
    files = _part_files(path, count) if count not in (0, 1) else [path]
    headers = [header if file == path else read_header(file) for file in files]
    if len(files) > 1:
        _check_parts(files, headers)
    fields: dict[str, Any] = {}
    tensors: dict[str, TensorPlace] = {}
    for file, part in zip(files, headers, strict=True):
        for key, value in part.fields.items():
            if key.startswith(_SPLIT):
                continue
            if key in fields and fields[key] != value:
                raise ModelSourceError(f"{file} states another {key} than {files[0]}", hint=MERGE)
            fields[key] = value
        for name, place in part.tensors.items():
            if tensors.setdefault(name, place) is not place:
                raise ModelSourceError(
                    f"{file} holds the tensor {name}, as {tensors[name].file} does", hint=MERGE
                )
    wanted = header.fields.get("split.tensors.count", len(tensors))
    if wanted != len(tensors):
        raise ModelSourceError(
            f"{path} holds {len(tensors)} tensors with all its parts, and states {shown(wanted)}",
            hint=MERGE,
        )
    return GgufModel(str(path), tuple(files), fields, tensors)


def _part_files(path: Path, count: Any) -> list[Path]:
    named = _PART.fullmatch(path.name)
    if named is None or type(count) is not int or count != int(named["count"]):
        raise ModelSourceError(
            f"{path} is one part of {shown(count)}, and its name does not say which (as in "
            "model-00001-of-00002.gguf)",
            hint=MERGE,
        )
    files = [
        path.with_name(f"{named['stem']}-{number:05}-of-{named['count']}{named['suffix']}")
        for number in range(1, count + 1)
    ]
    absent = [file for file in files if not file.is_file()]
    if absent:
        raise ModelSourceError(
            f"{path} is one part of {count}, and {len(absent)} are missing, first {absent[0].name}",
            hint=MERGE,
        )
    return files


def _check_parts(files: list[Path], headers: list[Header]) -> None:
    for number, (file, part) in enumerate(zip(files, headers, strict=True)):
        for key, wanted in (
            ("split.no", number),
            ("split.count", len(files)),
            ("split.tensors.count", headers[0].fields.get("split.tensors.count")),
        ):
            if part.fields.get(key) != wanted:
                raise ModelSourceError(
                    f"{file} states {key} {shown(part.fields.get(key))} instead of {shown(wanted)}",
                    hint=MERGE,
                )
