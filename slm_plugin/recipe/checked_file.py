"""What recipes and comparisons share: where they are read from, and the keys of every file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

from typing_extensions import Self

from slm_plugin.calibration.samples import CalibrationSource
from slm_plugin.evaluation.base import Evaluator
from slm_plugin.models.loading import ModelSource
from slm_plugin.outputs.place import Input
from slm_plugin.recipe.checking import validated
from slm_plugin.recipe.document import checked, checked_data, read_file
from slm_plugin.recipe.inputs import inputs_of, output_of
from slm_plugin.recipe.mistakes import Mistakes
from slm_plugin.recipe.parts import Common, in_memory, plain
from slm_plugin.texts import shown_path


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedFile:
    """A checked file with its components created.

    A subclass adds the fields of its own lists, and makes them in `_own_fields`.

    Attributes:
        name: Name in reports: the file's stem.
        model: The model to load; None where the caller passes a model in memory.
        calibration: Where calibration data come from; None where none are needed.
        evaluators: What is measured.
        output: The output folder; None where nothing is written.
        seed: Seed of everything random.
        data: The file as plain data, overrides included.
        inputs: Files that are read, which the output must not overwrite.
    """

    kind: ClassVar[str]
    first_keys: ClassVar[str]
    # The key that only this kind has, the one that only the other has, and the other's command.
    told_by: ClassVar[tuple[str, str, str]]
    frame: ClassVar[type[Common]]

    name: str
    model: ModelSource | None
    calibration: CalibrationSource | None
    evaluators: tuple[Evaluator, ...]
    output: Path | None
    seed: int
    data: Mapping[str, Any]
    inputs: tuple[Input, ...] = ()

    @classmethod
    def of(cls, given: Self | Mapping[str, Any] | str | Path) -> Self:
        """What a caller passes: a checked file as it is, data, or a path to read.

        Raises:
            RecipeError: The data or the file has mistakes.
        """
        if isinstance(given, Mapping):
            return cls.from_dict(given)
        return given if isinstance(given, cls) else cls.read(cast("str | Path", given))

    @classmethod
    def read(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read and check a file.

        Args:
            path: The YAML file.
            overrides: Settings as ``stages.0.target.ratio=0.2``; values are YAML.

        Raises:
            RecipeError: The file cannot be read or has mistakes; the message lists all of them,
                a line each, with file, line and column.
        """
        path = Path(path)
        text = read_file(path, cls.kind)
        return cls.parse(
            text, name=path.stem, origin=shown_path(path), overrides=overrides, file=path
        )

    @classmethod
    def parse(
        cls,
        text: str,
        *,
        name: str = "",
        origin: str = "",
        overrides: Sequence[str] = (),
        file: Path | None = None,
    ) -> Self:
        """Check a file that is given as YAML text.

        Args:
            text: The YAML text.
            name: Name in reports; by default ``recipe`` or ``comparison``.
            origin: Name of the text in messages, with the same default.
            overrides: Settings as ``stages.0.target.ratio=0.2``; values are YAML.
            file: The file with the text, which the output must not overwrite.

        Raises:
            RecipeError: The text has mistakes; the message lists all of them, a line each.
        """
        build = partial(cls._built, name or cls.kind, file, cls.frame)
        return checked(text, origin or cls.kind, overrides, build)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, name: str = "") -> Self:
        """Check what is given as Python data.

        Args:
            data: The keys of a file. ``version`` may be left out, ``model`` too when a model in
                memory is used, and ``output`` when nothing is to be written. Stages, evaluators
                and exporters may be objects.
            name: Name in reports and messages; by default ``recipe`` or ``comparison``.

        Raises:
            RecipeError: The data has mistakes; the message lists all of them, a line each.
        """
        name = name or cls.kind
        given = dict(data) if isinstance(data, Mapping) else data
        return checked_data(given, name, partial(cls._built, name, None, in_memory(cls.frame)))

    @classmethod
    def _own_fields(
        cls, frame: Any | None, data: dict[str, Any], mistakes: Mistakes
    ) -> dict[str, Any]:
        """The evaluators and the fields that the subclass adds.

        Args:
            frame: The keys at the top; None where they have mistakes. Lists are checked all the
                same, so that one run reports all mistakes.
            data: The data, in which components may be objects.
            mistakes: Grows by what is wrong.
        """
        raise NotImplementedError

    @classmethod
    def _built(
        cls,
        name: str,
        file: Path | None,
        keys: type[Common],
        data: Any,
        mistakes: Mistakes,
    ) -> Self | None:
        if not isinstance(data, dict):
            mistakes.add(f"a {cls.kind} is a mapping with the keys {cls.first_keys}, …")
            return None
        own, other, command = cls.told_by
        if other in data and own not in data:
            mistakes.add(f"no {cls.kind}: a file with `{other}` is for `slm-plugin {command}`")
            return None
        written = plain(data)
        frame = validated(keys, written, mistakes)
        fields = cls._own_fields(frame, data, mistakes)
        if frame is None:
            return None
        inputs = inputs_of(written, file)
        output = None if frame.output is None else output_of(frame.output, inputs, mistakes)
        if mistakes.found:
            return None
        return cls(
            name=name,
            model=frame.model,
            calibration=frame.calibration,
            output=output,
            seed=frame.seed,
            data=written,
            inputs=inputs,
            **fields,
        )
