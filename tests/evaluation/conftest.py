"""A session over a tiny random model."""

from __future__ import annotations

import pytest

from slm_plugin.session import Session
from tests.conftest import make_model, make_tokenizer, random_tokens


@pytest.fixture
def session() -> Session:
    """A tiny Llama with a word-level tokenizer and a calibration set."""
    return Session(make_model(), make_tokenizer(), random_tokens())


@pytest.fixture(autouse=True)
def _no_survey(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the survey of the machine that lm-eval has made at every run: it calls pip."""
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "")
