"""Which files of a folder are the checkpoint: one rule, whether it is read whole or by layers.

- ``model.safetensors`` alone, or ``model.safetensors.index.json`` with the shards that it names.
  Both together are refused: nothing says which of them is meant. (An index that names nothing but
  ``model.safetensors`` is fine.)
- An index names plain files of its folder, and each tensor in exactly the file that holds it. What
  a shard holds and the index does not name is refused, and so is a further ``model-*.safetensors``.
- Symbolic links are followed within the folder, and from a snapshot of the Hub's cache into the
  ``blobs`` beside it. A link that leads elsewhere is refused.
- Adapters and the parameters of a quantiser beside the weights are refused: without them the
  weights are another model.
"""

from __future__ import annotations

from pathlib import Path

from slm_plugin.errors import ModelSourceError
from slm_plugin.models.completeness import some
from slm_plugin.models.json_file import read_object
from slm_plugin.models.stored import StoredTensor, read_header

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
QUANTISERS = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
MIXED = "the index and the files belong to different checkpoints"
READ = (".json", ".safetensors", ".model", ".txt", ".jinja")
PICKLED = ("pytorch_model*.bin", "pytorch_model.bin.index.json", "*.pt", "*.pth", "*.ckpt")


def check_companions(folder: Path) -> None:
    """Refuse files beside the weights without which those are another model, and stray links.

    Raises:
        ModelSourceError: There is an adapter, a quantiser's file, or a link out of the folder.
    """
    for file in sorted(folder.iterdir()):
        read = file.suffix in READ and file.is_symlink()
        if read and not is_inside(file, folder):
            raise ModelSourceError(
                f"{file} is a link that leads out of its folder, to {_target(file)}",
                hint="copy the file into the folder, or name the folder that holds it",
            )
    for name in ADAPTERS:
        if (folder / name).exists():
            raise ModelSourceError(
                f"{folder} holds an adapter, {name}",
                hint="merge it into its base model first (`merge_and_unload` of peft), save that, "
                "and name its folder",
            )
    for name in QUANTISERS:
        if (folder / name).exists():
            raise ModelSourceError(
                f"{folder} holds quantised weights: {name} lies beside them",
                hint="dequantise them first, or remove that file if the weights are plain",
            )


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint folder by name; only headers are read.

    Raises:
        ModelSourceError: The folder has no safetensors weights, they break the rules of this
            module, or a file is malformed.
    """
    shards = shard_names(folder)
    if shards is None:
        return read_header(_weights(folder, SINGLE))
    names = sorted({*shards.values()})
    headers = {name: read_header(_weights(folder, name)) for name in names}
    for tensor, name in shards.items():
        if tensor not in headers[name]:
            raise ModelSourceError(
                f"{folder / name} lacks {tensor}, which {INDEX} places there", hint=MIXED
            )
    idle = sorted(
        f"{tensor} in {name}"
        for name, header in headers.items()
        for tensor in header
        if shards.get(tensor) != name
    )
    if idle:
        raise ModelSourceError(
            f"{folder} holds {len(idle)} tensors where {INDEX} does not place them: {some(idle)}",
            hint=MIXED,
        )
    return {tensor: headers[name][tensor] for tensor, name in shards.items()}


def shard_names(folder: Path) -> dict[str, str] | None:
    """The file of each tensor by the index, None where there is one file without an index.

    Raises:
        ModelSourceError: There are no safetensors weights, the index is malformed, or it is not
            clear which files are meant.
    """
    single, index = (folder / SINGLE).is_file(), folder / INDEX
    stray = {file.name for file in folder.glob("model-*.safetensors")}
    found = _read_index(index) if index.is_file() else None
    if found is None and not single:
        raise _no_weights(folder, stray)
    named = {SINGLE} if found is None else set(found.values())
    if single and SINGLE not in named:
        raise ModelSourceError(
            f"{folder} holds both {SINGLE} and {INDEX}", hint="delete the one that is out of date"
        )
    if stray - named:
        raise ModelSourceError(
            f"{folder} holds weights that belong to no index: {some(sorted(stray - named))}",
            hint="delete them if they are left over from another checkpoint",
        )
    return found


def indexed_files(folder: Path) -> set[str]:
    """Names of the shards that a folder's index names; none without an index.

    Raises:
        ModelSourceError: The index is malformed or names a file elsewhere.
    """
    index = folder / INDEX
    return set(_read_index(index).values()) if index.is_file() else set()


def _read_index(index: Path) -> dict[str, str]:
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ModelSourceError(
            f"{index} is no index of weights: it has no weight_map",
            hint="copy or fetch the checkpoint again",
        )
    for tensor, name in places.items():
        plain = isinstance(name, str) and name not in ("", ".", "..") and "\0" not in name
        if not plain or "/" in name or "\\" in name:
            raise ModelSourceError(
                f"{index} places {tensor} in {name!r}, which is no file of its folder",
                hint="an index names files beside it",
            )
    return places


def _weights(folder: Path, name: str) -> Path:
    file = folder / name
    if not file.is_file():
        raise ModelSourceError(
            f"cannot read {file}: {INDEX} names it, but there is no such file",
            hint="the checkpoint was not copied or fetched whole",
        )
    return file


def _no_weights(folder: Path, stray: set[str]) -> ModelSourceError:
    pickled = sorted(file.name for pattern in PICKLED for file in folder.glob(pattern))
    if pickled:
        return ModelSourceError(
            f"{folder} holds weights as {pickled[0]}, which could run code when it is read; only "
            "safetensors are read",
            hint="convert them where you trust them: load with transformers, then "
            "`save_pretrained(folder)`",
        )
    if stray:
        return ModelSourceError(
            f"{folder} holds {some(sorted(stray))}, but no {INDEX}",
            hint="the checkpoint was not copied or fetched whole",
        )
    return ModelSourceError(
        f"{folder} holds neither {SINGLE} nor {INDEX}",
        hint="the folder needs config.json and safetensors weights of one model",
    )


def is_inside(file: Path, folder: Path) -> bool:
    """Whether a link ends in its folder, or in the blobs of the Hub's cache that it is part of."""
    try:
        home, target = folder.resolve(), file.resolve()
    except (OSError, RuntimeError):
        return False
    cached = home.parent.name == "snapshots"
    allowed = [home, *([home.parent.parent / "blobs"] if cached else [])]
    return any(target.is_relative_to(place) for place in allowed)


def _target(file: Path) -> str:
    try:
        return str(file.readlink())
    except OSError:
        return "an unknown place"
