"""Fetch a checkpoint from the Hub: its config first, its weights when they can be used."""

from __future__ import annotations

from pathlib import Path

from slm_plugin.models.border import reading
from slm_plugin.models.bundled import BUNDLED
from slm_plugin.models.configuration import read_configuration
from slm_plugin.models.weight_files import SINGLE, check_companions, indexed_files

SMALL = ["*.json", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*", "USE_POLICY*", "*TERMS*"]
SUBFOLDERS = ["*/*"]


def fetched(name: str, revision: str | None, stack: str | None = None) -> Path:
    """The folder of a checkpoint in the Hub's cache, fetched as far as it is not there.

    Args:
        name: Its id.
        revision: Branch, tag or commit.
        stack: Which of the model's two stacks of layers, where it has two.

    Raises:
        ModelSourceError: It cannot be fetched, or its config or its files are refused.
        UnsupportedModelError: Its architecture is not supported.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    hint = (
        "check the name and the network, or give a local folder, a .gguf file or "
        f"{', '.join(sorted(BUNDLED))}"
    )
    with reading(f"cannot fetch '{name}' from the Hugging Face Hub", hint=hint):
        config = Path(hf_hub_download(name, "config.json", revision=revision))
        read_configuration(config, stack)
        # What a branch or tag means now is what all files are taken from.
        commit = config.parent.name
        folder = snapshot_download(
            name, revision=commit, allow_patterns=SMALL, ignore_patterns=SUBFOLDERS
        )
        check_companions(Path(folder))
        weights = sorted({SINGLE, *indexed_files(Path(folder))})
        return Path(
            snapshot_download(
                name, revision=commit, allow_patterns=weights, ignore_patterns=SUBFOLDERS
            )
        )
