import re

import pytest

from megatron_mimo.config.presets import PROVIDERS, model_config
from megatron_mimo.config.sections import Preset


def test_the_help_lists_each_preset() -> None:
    # A preset of a module from outside of the package may follow: the list stays open. Other tests
    # may have registered some.
    own = [name for name, one in PROVIDERS.items() if one.__module__.startswith("megatron_mimo.")]
    assert Preset.__metadata__[0].metavar == f"{{{','.join(own)},…}}"


def test_overrides_change_one_field_each() -> None:
    changed = model_config("mock", ["language.num_layers=6", "vision.pixel_shuffle=false"])
    assert changed.part("language").num_layers == 6
    assert changed.part("vision").pixel_shuffle is False
    listed = model_config("mock", ["vision.pixel_mean=0.5, 0.25,0"])
    assert listed.part("vision").pixel_mean == (0.5, 0.25, 0.0)
    assert changed.part("projector") == model_config("mock").part("projector")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("language.num_layer=4", "unknown 'num_layer'; did you mean 'num_layers'?"),
        ("langauge.num_layers=4", "unknown 'langauge'; did you mean 'language'?"),
        ("language.num_layers=four", "expected a whole number, 1 to 10,000, not 'four'"),
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
