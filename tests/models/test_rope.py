"""Positions: the old and the new words, alone and together."""

from __future__ import annotations

import pytest

from slm_plugin.errors import ModelSourceError
from slm_plugin.models.config_values import Where
from slm_plugin.models.rope import rope_settings

WHERE = Where("config.json")


def test_nothing_stated_is_the_default_of_both() -> None:
    """10,000 and no scaling; null and the kind `default` state nothing either."""
    assert rope_settings({}, 8, WHERE) == (10_000.0, None)
    assert rope_settings({"rope_theta": None, "rope_scaling": None}, 8, WHERE) == (10_000.0, None)
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": 7}}
    assert rope_settings(plain, 8, WHERE) == (7.0, None)


def test_the_base_may_stand_in_any_of_three_places_but_once() -> None:
    """Equal ones agree, others are refused."""
    scaling = {"type": "linear", "factor": 2.0}
    found = rope_settings({"rope_scaling": {**scaling, "rope_theta": 5}}, 8, WHERE)
    assert found == (5.0, {"rope_type": "linear", "factor": 2.0})
    both = {"rope_theta": 5, "rope_parameters": {"rope_theta": 5.0}}
    assert rope_settings(both, 8, WHERE) == (5.0, None)
    with pytest.raises(ModelSourceError, match="contradicts itself"):
        rope_settings({"rope_theta": 6, "rope_parameters": {"rope_theta": 5.0}}, 8, WHERE)


def test_longrope_needs_a_factor_for_every_pair_of_channels() -> None:
    """A list of another length would be broadcast or fail deep inside."""
    good = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0] * 4}
    assert rope_settings({"rope_scaling": good}, 8, WHERE)[1] is not None
    with pytest.raises(ModelSourceError, match=r"long_factor.*list of 4"):
        rope_settings({"rope_scaling": {**good, "long_factor": [1.0] * 3}}, 8, WHERE)
