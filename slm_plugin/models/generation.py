"""Settings of text generation: read from where they stand, kept out of the model's config.

Older configs hold them. transformers 4.57 refuses to save such a config, and 5 drops them from it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_plugin.errors import ModelSourceError
from slm_plugin.models.border import reading
from slm_plugin.models.json_file import read_object

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

# With the values that transformers takes where none are given.
GENERATION: dict[str, Any] = {
    "max_length": 20,
    "min_length": 0,
    "do_sample": False,
    "early_stopping": False,
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "num_return_sequences": 1,
    "output_scores": False,
    "return_dict_in_generate": False,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "remove_invalid_values": False,
    "exponential_decay_length_penalty": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}


def read_generation(
    file: Path, config: PretrainedConfig, in_config: Mapping[str, Any]
) -> GenerationConfig:
    """Those of ``generation_config.json``, else those that stood in the config.

    transformers looks at the config's, too, only where there is no file of their own.

    Args:
        file: Where the file of their own is, if there is one.
        config: The model's config, for its special tokens.
        in_config: Settings that stood in it.

    Raises:
        ModelSourceError: They are malformed.
    """
    from transformers import GenerationConfig

    if file.is_file():
        content = read_object(file)
    else:
        special = ("bos_token_id", "eos_token_id", "pad_token_id")
        # Models of images and text state them beside or inside of the text's config.
        configs = (config, config.get_text_config(decoder=True))
        content = {
            name: next(
                (found for one in configs if (found := getattr(one, name, None)) is not None), None
            )
            for name in special
        } | dict(in_config)
    # What a library notes for itself, as where the settings came from, is not for the next one.
    content = {name: value for name, value in content.items() if not name.startswith("_")}
    for name in content:
        if hasattr(GenerationConfig, name):
            raise ModelSourceError(f"{file} holds '{name}', which is no setting of generation")
    with reading(f"transformers does not take the generation settings for {file.parent}"):
        made: GenerationConfig = GenerationConfig.from_dict(content)
        # A setting that cannot be compared or written would come up when the result is saved.
        made.to_json_string()
    return made


def without_generation(
    model: PreTrainedModel,
) -> tuple[PretrainedConfig, GenerationConfig]:
    """Copies of a model's config without generation settings, and of its generation settings.

    What stood in the config is moved to where the generation settings have their default.
    """
    config, generation = copy.deepcopy(model.config), copy.deepcopy(model.generation_config)
    for name, default in GENERATION.items():
        value = config.__dict__.pop(name, None)
        if (
            value is not None
            and value != default
            and getattr(generation, name, None)
            in (
                None,
                default,
            )
        ):
            setattr(generation, name, value)
    # Else transformers 4 looks into the model's config for them again.
    generation._from_model_config = False
    return config, generation
