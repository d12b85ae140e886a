"""Whatever a library raises is one line; what is meant for the caller passes."""

from __future__ import annotations

import pytest

from slm_plugin.errors import ModelSourceError, UnsupportedModelError
from slm_plugin.models.border import reading


class PanicException(BaseException):
    """As pyo3 names a panic in Rust."""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("first\nsecond"), "cannot read m: first"),
        (KeyError("rope_type"), "cannot read m: KeyError 'rope_type'"),
        (AssertionError(), "cannot read m: AssertionError"),
        (MemoryError(), "not enough memory"),
        (RecursionError("deep"), "nested too deeply"),
        (PanicException("index out of bounds"), "cannot read m: index out of bounds"),
        (Exception("\n\n  late"), "cannot read m: late"),
    ],
)
def test_any_exception_is_one_line(error: BaseException, words: str) -> None:
    """The kind is named where its text says nothing by itself."""
    with pytest.raises(ModelSourceError) as caught, reading("cannot read m", hint="do this"):
        raise error
    assert words in caught.value.message and "\n" not in caught.value.message
    assert caught.value.hint == "do this"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), UnsupportedModelError("x")])
def test_interrupts_and_own_errors_pass(error: BaseException) -> None:
    """Only what a library did not mean for us is changed."""
    with pytest.raises(type(error)) as caught, reading("cannot read m"):
        raise error
    assert caught.value is error
