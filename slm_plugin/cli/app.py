"""Shared by all commands: the application, common arguments, and printing."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from slm_plugin.control_characters import visible
from slm_plugin.progress import PlainConsole

app = typer.Typer(
    help="Prune language models in depth and width, from one YAML recipe.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipePath = Annotated[Path, typer.Argument(help="Recipe file (YAML).")]
ModelName = Annotated[str, typer.Argument(help="Alias, checkpoint folder, .gguf file or Hub id.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override, as stages.0.target.ratio=0.2; repeat for more."),
]


class Stack(str, Enum):
    """The two stacks of layers of an encoder-decoder."""

    encoder = "encoder"
    decoder = "decoder"


StackName = Annotated[
    Stack | None, typer.Option("--stack", help="Which stack of layers, where a model has two.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output folder.")]


def print_out(renderable: Any) -> None:
    """Print a rich renderable on standard output; wide enough for tables when it is no terminal."""
    out = PlainConsole()
    if not out.is_terminal:
        out = PlainConsole(width=140)
    out.print(renderable)


def print_line(text: str) -> None:
    """Print one line on standard output."""
    typer.echo(visible(text))


def print_json(text: str) -> None:
    """Print JSON on standard output, in ASCII and without control characters.

    Args:
        text: JSON that holds no character beyond ASCII.
    """
    # The only control character that JSON leaves unescaped, in strings.
    typer.echo(text.rstrip("\n").replace("\x7f", "\\u007f"))


# Read by the libraries when they are imported, which a recipe with lm_eval tasks does early.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def quiet_libraries() -> None:
    """Disable the progress bars and notices of transformers; this imports it."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
