"""The border to the libraries that read models: whatever they raise is one line for the user.

transformers, tokenizers, huggingface_hub and PyTorch document few of their exceptions; a damaged
file or an odd setting can surface as any of them. Every call into them that reads what a user
points at stands inside `reading`, so this is the one place that says what is caught.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from slm_plugin.errors import ModelSourceError, SlmError
from slm_plugin.lazy import transformers

LONGEST = 300


def is_transformers_four() -> bool:
    """Whether the installed transformers is of line 4, which reads some files in other words."""
    return str(transformers.__version__).startswith("4.")


@contextmanager
def reading(doing: str, *, hint: str = "") -> Iterator[None]:
    """Turn any exception of a library into a `ModelSourceError`; our own errors pass.

    Args:
        doing: What could not be done, as ``cannot read the tokenizer of m``.
        hint: What to do about it.

    Raises:
        ModelSourceError: A library raised; the message ends with the first line of its reason.
    """
    try:
        yield
    except SlmError:
        raise
    except Exception as error:
        raise ModelSourceError(f"{doing}: {reason(error)}", hint=hint) from error
    except BaseException as error:
        # A panic of a library in Rust, as tokenizers, is no Exception.
        if type(error).__name__ != "PanicException":
            raise
        raise ModelSourceError(f"{doing}: {reason(error)}", hint=hint) from error


def reason(error: BaseException) -> str:
    """What an exception says first, in one line, or its kind when that says nothing by itself."""
    if isinstance(error, MemoryError):
        return "there is not enough memory"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A first line that ends with a colon says only what the next one is about.
    line = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    if isinstance(error, KeyError | IndexError | AssertionError) or not line:
        line = f"{type(error).__name__} {line}".strip()
    return line if len(line) <= LONGEST else line[:LONGEST] + "…"
