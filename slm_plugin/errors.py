"""All errors of the package: each says what is wrong and where, and the remedy."""

from __future__ import annotations

from pathlib import Path

# Hint about a plugin that broke its contract.
TELL_ITS_AUTHOR = "tell its author; nothing that comes after it can be trusted"


class SlmError(Exception):
    """Base of all errors raised on purpose by slm_plugin.

    Args:
        message: One sentence that says what is wrong and where.
        hint: One sentence that says what to do about it.
        option: The option of a component that caused it, if any.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "", option: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.option = option

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UserError(SlmError):
    """An error that the user can fix: exit code 2."""

    exit_code = 2


class RecipeError(UserError):
    """A recipe that cannot be read or does not fit the schema; one line per problem."""


class TargetError(UserError):
    """A target that the model or the strategy cannot reach."""


class UnsupportedModelError(UserError):
    """A model whose architecture or layout is not supported."""


class ModelSourceError(UserError):
    """A model that cannot be found, fetched or read."""


class CalibrationError(UserError):
    """A calibration source that is missing, malformed or too short."""


class PlanError(UserError):
    """A plan that is malformed or was made for another model."""


class MissingExtraError(UserError):
    """A feature whose optional packages are not installed."""


class OutputError(UserError):
    """An output folder that exists already or cannot be written."""


class WriteError(OutputError):
    """An output that could not be written after work was done: a failed run."""

    exit_code = 1


class IncompleteError(SlmError):
    """A run that failed and kept its complete files.

    Attributes:
        kept: The folder with them.
    """

    def __init__(self, message: str, *, kept: Path, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.kept = kept


class NumericalError(SlmError):
    """NaN or infinity where a number was needed."""


class ContractError(SlmError):
    """A strategy, recovery, evaluator or exporter that broke its contract."""


class VerificationError(SlmError):
    """A result that does not compute what it should."""
