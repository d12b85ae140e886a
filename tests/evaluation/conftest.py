"""A session over a tiny random model."""

from __future__ import annotations

import pytest

from slm_plugin.session import Session
from tests.tiny import make_model, make_tokenizer, random_tokens


@pytest.fixture
def session() -> Session:
    """A tiny Llama with a word-level tokenizer and a calibration set."""
    return Session(make_model(), make_tokenizer(), random_tokens())
