import re
from typing import get_args

import pytest

from megatron_mimo.presets import PROVIDERS, model_config
from megatron_mimo.training.config import Preset


def test_each_preset_is_a_choice_of_the_flag() -> None:
    assert get_args(Preset) == tuple(PROVIDERS)


def test_overrides_change_one_field_each() -> None:
    changed = model_config("mock", ["language.num_layers=6", "vision.pixel_shuffle=false"])
    assert changed.language.num_layers == 6
    assert changed.vision.pixel_shuffle is False
    listed = model_config("mock", ["vision.pixel_mean=0.5, 0.25,0"])
    assert listed.vision.pixel_mean == (0.5, 0.25, 0.0)
    assert changed.projector == model_config("mock").projector


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("language.num_layer=4", "unknown 'num_layer'; did you mean 'num_layers'?"),
        ("langauge.num_layers=4", "unknown 'langauge'; did you mean 'language'?"),
        ("language.num_layers=four", "expected int, not 'four'"),
        ("vision.pixel_shuffle=1", "expected true or false, not '1'"),
        ("num_layers=4", "expected section.field=value"),
    ],
)
def test_a_wrong_override_says_what_is_known(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        model_config("mock", [override])


def test_an_unknown_preset_lists_the_known() -> None:
    with pytest.raises(ValueError, match="--model-provider moc: expected one of mock"):
        model_config("moc")
