"""Read a checkpoint of an encoder: its config and files are checked, the stock class loads it.

Which weights a class wants, and by what names older releases stored them, transformers knows; what
it reports as missing, surplus or misshapen is refused here, where it would only warn.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_plugin.errors import ModelSourceError, SlmError
from slm_plugin.lazy import torch, transformers
from slm_plugin.models.border import reading
from slm_plugin.models.carried_files import keep_carried, read_carried
from slm_plugin.models.completeness import some
from slm_plugin.models.configuration import read_configuration
from slm_plugin.models.families import families, family_of
from slm_plugin.models.families.family import Family
from slm_plugin.models.json_file import read_object
from slm_plugin.models.weight_files import check_companions, stored_tensors
from slm_plugin.progress import say

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Accept = Callable[[Family, Mapping[str, Any]], None]


def is_encoder(folder: Path) -> bool:
    """Whether the config in a folder is of a model that is no plain decoder."""
    try:
        content = read_object(folder / "config.json")
    except (SlmError, OSError):
        # Told by whoever reads the checkpoint.
        return False
    named, kind = content.get("architectures"), content.get("model_type")
    names = named if isinstance(named, list) and named else [None]
    return any(
        family.by_tensors and (family.covers(str(names[0])) if named else family.model_type == kind)
        for family in families()
    )


def read_encoder(
    folder: Path, name: str, stack: str | None, memory: str, dtype: str, accept: Accept
) -> PreTrainedModel:
    """The model of a checkpoint folder, as its stock class loads it.

    Args:
        folder: The folder.
        name: Its name in messages.
        stack: Which of its two stacks of layers, where it has two.
        memory: As in a recipe.
        dtype: Number format in memory; ``auto`` takes the checkpoint's.
        accept: Called with the family and the content of the config before any weight is read.

    Raises:
        ModelSourceError: The folder is not one complete, plain checkpoint.
        UnsupportedModelError: Its architecture is not supported.
        UserError: It has two stacks and none is named, or it has no such stack.
    """
    check_companions(folder)
    configuration = read_configuration(folder / "config.json", stack)
    family = family_of(configuration.architecture, stack)
    accept(family, configuration.config.to_dict())
    if memory == "layerwise":
        raise ModelSourceError(
            f"{name} is no plain decoder, and its layers cannot be read one at a time",
            hint="set `memory: whole`",
        )
    stored_tensors(folder)
    carried = read_carried(folder, family)
    made: Any = getattr(transformers, configuration.architecture, None)
    if made is None:
        raise ModelSourceError(
            f"transformers {transformers.__version__} has no {configuration.architecture}",
            hint="use the release that wrote the checkpoint",
        )
    with reading(f"cannot load the checkpoint {name}"):
        model, report = made.from_pretrained(
            folder,
            config=configuration.config,
            dtype="auto" if dtype == "auto" else getattr(torch, dtype),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation=configuration.config._attn_implementation,
        )
    for key in _checked(report, name, family):
        # What is missing may be memory that nobody wrote to.
        torch.nn.init.zeros_(model.get_parameter(key))
    model.config._name_or_path = name
    keep_carried(model, carried)
    loaded: PreTrainedModel = model.eval()
    return loaded


def _checked(report: Mapping[str, Any], name: str, family: Family) -> list[str]:
    """Names of missing weights that only training uses.

    Raises:
        ModelSourceError: Other weights are missing, misshapen or surplus.
    """
    # transformers 5 gives each mismatched weight together with its two shapes.
    misshapen = sorted(key if isinstance(key, str) else key[0] for key in report["mismatched_keys"])
    missing, surplus = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    lost = [key for key in missing if not re.fullmatch(family.trained_only or "(?!)", key)]
    odd = [key for key in surplus if not re.fullmatch(family.redundant or "(?!)", key)]
    for keys, wrong in (
        (misshapen, "of another shape than its config asks for"),
        (lost, "fewer than its config requires"),
        (odd, "that its config does not account for"),
    ):
        if keys:
            raise ModelSourceError(
                f"{name} holds {len(keys)} weights {wrong}: {some(keys)}",
                hint="the checkpoint is incomplete, or its config does not fit its weights",
            )
    if missing:
        say(f"{name} lacks {some(missing)}, which only training uses: set to zero")
    if surplus:
        say(f"{name} holds weights of another head, which are left out: {some(surplus)}")
    return missing
