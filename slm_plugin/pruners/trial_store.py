"""Where strategies store what they measured, so that an interrupted search resumes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import slm_plugin
from slm_plugin.cache import Store, hashed
from slm_plugin.extras import found_version
from slm_plugin.lazy import torch
from slm_plugin.progress import say
from slm_plugin.versions import machine

if TYPE_CHECKING:
    from slm_plugin.session import Session

# Packages that a time depends on.
_TIMED_BY = ("slm-plugin", "torch", "transformers", "optimum-onnx", "onnxruntime")


def trial_store(
    session: Session, what: object, form: str, valid: Callable[[Any, Any], bool]
) -> Store:
    """The store of values measured on a model and a calibration set.

    It is a file in the session's journal folder, named by a hash of everything that a value depends
    on. Without such a folder it is held in memory.

    Args:
        session: The session.
        what: What the values are of, with all options that they depend on.
        form: How keys and values are written, which a later version may change.
        valid: Whether a key has a value of this kind.

    Raises:
        OutputError: The file cannot be written.
    """
    if session.journals is None or session.digest is None:
        return Store()
    facts = (
        session.fingerprint().model_dump_json(),
        session.digest,
        what,
        session.batch_tokens,
        session.model.device,
        torch.get_num_threads(),
        torch.__version__,
        slm_plugin.__version__,
        form,
    )
    return Store.of(session.journals, hashed(facts), valid)


def time_store(
    session: Session, about: Sequence[object], valid: Callable[[Any, Any], bool]
) -> Store:
    """The store of times on this machine, of a session's model or of others with random weights.

    It is a file in the session's journal folder, or in memory without one.

    Args:
        session: The session.
        about: What is timed, with all options that a time depends on.
        valid: Whether a key has times of this kind.

    Raises:
        OutputError: The file cannot be written.
    """
    if session.journals is None:
        return Store()
    model = session.model
    facts = (
        "rounds of times, 2",
        type(model).__name__,
        session.view.dimensions().model_dump_json(),
        model.config.to_json_string(use_diff=False),
        model.config._attn_implementation,
        *about,
        model.dtype,
        session.seed,
        machine(),
        os.cpu_count(),
        torch.get_num_threads(),
        model.device,
        *(found_version(name) for name in _TIMED_BY),
    )
    return Store.of(session.journals, hashed(facts), valid)


def repair_target(session: Session) -> str:
    """What repairs fit toward, as a fact for the key of a store.

    Without a reference they fit toward the present model, which the key names already.
    """
    return "" if session.reference is None else f" toward the dense layers {session.sources}"


def tell_read(session: Session, trials: int, store: Store) -> None:
    """Say how many trials a store had, and count them as known to the session."""
    if trials:
        session.known_trials += trials
        say(f"  {trials} trials read from {store.path}")
