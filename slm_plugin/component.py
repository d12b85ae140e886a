"""What strategies, recoveries, evaluators and exporters have in common."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel

from slm_plugin.record import Record

if TYPE_CHECKING:
    from slm_plugin.models.families.family import Family


class Options(Record):
    """Base of every component's options: unknown keys are errors, instances are immutable.

    Attributes:
        former: Keys that earlier versions knew, each with what holds instead.
    """

    former: ClassVar[Mapping[str, str]] = {}


class Component(ABC):
    """What a recipe names, with its options.

    Attributes:
        name: Its name in recipes, set when it is registered.
        extra: The optional dependencies that it needs, by the name of the extra.
        unlisted: It works on models of which only the stack of layers is known.
        whole_layers: It works on encoders, of which layers are only dropped or merged whole.
        streams: It works on a model whose layers are read from disk one at a time: it runs them
            through `run_batches` and reads no weights itself.
        Options: Its options, which become the keys of its entry in a recipe.

    Args:
        options: An instance of the class's ``Options``.
    """

    name: ClassVar[str]
    extra: ClassVar[str | None] = None
    unlisted: ClassVar[bool] = False
    whole_layers: ClassVar[bool] = False
    streams: ClassVar[bool] = False
    Options: ClassVar[type[BaseModel]] = Options

    def __init__(self, options: BaseModel) -> None:
        self.options = options

    @classmethod
    def unsuited(cls, family: Family, config: Mapping[str, Any]) -> str:
        """Why it cannot be used with a model, as half a sentence; empty where it can.

        Args:
            family: What is true of the model's class.
            config: Content of its ``config.json``.
        """
        return ""

    def unsuited_options(self, family: Family, config: Mapping[str, Any]) -> str:
        """Why it cannot be used with these options, as half a sentence; empty where it can.

        Args:
            family: What is true of the model's class.
            config: Content of its ``config.json``.
        """
        return ""

    @property
    def needs_calibration(self) -> bool:
        """Whether the component, with these options, reads the calibration set."""
        return False

    @property
    def without_calibration(self) -> str:
        """What else helps where calibration data is needed and missing; mostly nothing."""
        return ""

    @property
    def whole_model(self) -> str:
        """Why a component that streams does not with these options; empty where it does."""
        return ""
