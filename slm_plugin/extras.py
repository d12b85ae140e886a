"""Optional packages: their extras, whether they are installed, and the error if not."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from slm_plugin.errors import MissingExtraError


@dataclass(frozen=True, slots=True)
class Extra:
    """One optional feature of the installation."""

    name: str
    purpose: str
    distributions: tuple[str, ...]


EXTRAS: dict[str, Extra] = {
    extra.name: extra
    for extra in (
        Extra("width", "width pruning", ("torch-pruning", "scipy")),
        Extra("gguf", "reading GGUF files, and so the default model", ("gguf",)),
        Extra("data", "text from Hugging Face datasets", ("datasets",)),
        Extra("eval", "the lm_eval evaluator", ("lm-eval", "datasets")),
        Extra("onnx", "the onnx exporter", ("optimum", "optimum-onnx", "onnx", "onnxruntime")),
        Extra("train", "recovery by LoRA", ("peft",)),
        Extra("big", "models larger than one GPU", ("accelerate",)),
        Extra("report", "the plots of the HTML report", ("matplotlib",)),
    )
}


def found_version(distribution: str) -> str | None:
    """Installed version of a distribution, or None."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def missing(extra: str) -> tuple[str, ...]:
    """Distributions of an extra that are not installed; a plugin's own extras are its affair."""
    if extra not in EXTRAS:
        return ()
    return tuple(d for d in EXTRAS[extra].distributions if found_version(d) is None)


def require(extra: str, wanted_by: str) -> None:
    """Make sure that an extra is installed.

    Raises:
        MissingExtraError: A package of the extra is missing.
    """
    absent = missing(extra)
    if absent:
        raise MissingExtraError(
            f"{wanted_by} needs {', '.join(absent)}, which is not installed",
            hint=f"pip install 'slm-plugin[{extra}]'",
        )
