"""Planted faults: one realistic mistake each, and a command that sees the tests fail with it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fault:
    """A mistake in one place of the package.

    Attributes:
        name: What is wrong.
        file: The source file, below ``slm_plugin/``.
        original: A text that stands there exactly once.
        faulty: What takes its place.
        tests: The test module that fails then, below ``tests/``; with spaces between, several.
    """

    name: str
    file: str
    original: str
    faulty: str
    tests: str
