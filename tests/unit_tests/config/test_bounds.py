"""No number is taken that a run cannot use: every field declares a range, and odd values are named.

By hand, with 10,000 inputs each: `pytest tests/unit_tests/config/test_bounds.py -n 0 -k odd
--hypothesis-profile campaign --hypothesis-seed 1`.
"""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from docs.reference.write_pages import COMMANDS
from megatron_mimo.cli import TrainCommandLine
from megatron_mimo.config.flags import CommandLine, parse
from megatron_mimo.config.presets import PROVIDERS, model_config
from megatron_mimo.config.resolve import resolve
from megatron_mimo.config.sections import TrainConfig
from megatron_mimo.data.config import DataConfig
from megatron_mimo.media.images import ImageConfig
from megatron_mimo.model.config import ModelConfig
from megatron_mimo.modules.gpt.config import GptConfig
from megatron_mimo.settings import Declared, declared
from tests.properties import examples

ODD = ("nan", "inf", "-inf", "0", "-1", "1e30", "", "text", "9" * 40, "9" * 5000, "-9" + "0" * 400)
ODD += ("1e400", ".5", "0x10", "1_0", "true", "1,2", "1e-300", "\N{FULLWIDTH DIGIT ONE}", "1\n2")
BASES = {
    "--fp16": ("scale", "hysteresis"),
    "--dataset-provider energon --data-path d": (
        *("num-workers", "loader-processes", "shuffle-buffer", "packing-buffer"),
        *("max-samples-per", "max-bad-sample"),
    ),
    "--lr-decay-style WSD": ("wsd-decay",),
    "--overlap-grad-reduce": ("ddp-",),
    "--save d": ("save-interval", "keep-last"),
    "--save-activations d": ("save-activations-step",),
    "--timeline-profile --timeline-dir d": ("profile-step",),
    "--tensorboard-dir d": ("peak-tflops",),
    "--no-dynamic-resolution --img-h 32 --img-w 32": ("img-h", "img-w"),
}


def settings() -> Iterator[type]:
    yield from (TrainCommandLine, *COMMANDS.values(), DataConfig, ImageConfig)
    for provider in PROVIDERS:
        # In a fixed order, as names of tests are to be the same in every process.
        yield from dict.fromkeys(type(part) for part in model_config(provider).parts.values())


NUMBERS = [
    (kind, field)
    for kind in dict.fromkeys(settings())
    for field in declared(kind)
    if field.item_kind in (int, float)
]
FLAGS = [field for field in declared(TrainConfig) if field.item_kind in (int, float)]
FIELDS = [
    (provider, name, field)
    for provider in ("mock", "nemotron-moe-vlm-tiny")
    for name, part in model_config(provider).parts.items()
    for field in declared(type(part))
]


@pytest.mark.parametrize(
    ("kind", "field"), NUMBERS, ids=[f"{k.__name__}-{f.path[-1]}" for k, f in NUMBERS]
)
def test_every_number_declares_a_range_with_two_ends(kind: type, field: Declared) -> None:
    bounds = field.bounds
    assert bounds, f"{kind.__name__}.{field.path[-1]} takes any number"
    for bound in bounds:
        assert all(math.isfinite(end) for end in bound.ends)
        assert not any(bound.admits(odd) for odd in (math.nan, math.inf, -math.inf))
    if field.default is not None and field.default is not dataclasses.MISSING:
        items = field.default if isinstance(field.default, tuple) else (field.default,)
        assert all(bound.admits(item) for bound in bounds for item in items)


def test_there_are_numbers_to_look_at() -> None:
    assert len(NUMBERS) > 150
    assert {kind.__name__ for kind, _ in NUMBERS} > {"GptConfig", "HybridConfig", "ImageConfig"}


def outcome(*flags: str) -> str | None:
    """The error of flags that are refused before a run starts; None where it would start."""
    try:
        resolve(parse(flags, CommandLine, prog="train").train, 1)
    except ValueError as error:
        return str(error)
    return None


def base(flag: Declared) -> list[str]:
    return [
        word
        for flags, names in BASES.items()
        for word in flags.split()
        if any(name in flag.name for name in names)
    ]


def is_within(field: Declared, text: str) -> bool:
    try:
        items = [field.item_kind(item) for item in text.split(",")]
    except (ValueError, OverflowError):
        return False
    return all(bound.admits(item) for bound in field.bounds for item in items)


@examples(100)
@given(st.sampled_from(FLAGS), st.sampled_from(ODD) | st.floats().map(str) | st.integers().map(str))
def test_odd_numbers_of_flags_are_named_or_in_range(flag: Declared, text: str) -> None:
    error = outcome(*base(flag), f"--{flag.name}={text}")
    if is_within(flag, text):
        # It may still contradict other flags, which then names it.
        assert error is None or flag.name in error or "--" in error
    else:
        assert error is not None, f"--{flag.name} {text} is accepted"
        assert error.startswith(f"--{flag.name} ") and ": expected " in error
        assert "\n" not in error.replace(text, "")


@examples(100)
@given(
    st.sampled_from(FIELDS),
    st.sampled_from(ODD) | st.floats().map(str) | st.integers(-2, 10**9).map(str),
)
def test_odd_overrides_are_named_or_in_range(place: tuple[str, str, Declared], text: str) -> None:
    provider, part, field = place
    change = f"{part}.{field.path[-1]}={text}"
    error = None
    try:
        model_config(provider, [change])
    except ValueError as refusal:
        error = str(refusal)
    if field.item_kind not in (int, float) or is_within(field, text):
        # It may still not fit another field, which is then named beside it.
        assert error is None or field.path[-1] in error
    else:
        assert error is not None and error.startswith(f"--override {change}: expected ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("language.num_layers=-1", "expected 1 to 10,000, not '-1'"),
        ("language.num_layers=1000000000", "expected 1 to 10,000, not '1000000000'"),
        ("language.layernorm_epsilon=nan", "expected 1e-20 to 1, not 'nan'"),
        ("language.rotary_base=inf", "expected a whole number, 1 to 1,000,000,000,000, not 'inf'"),
        ("vision.pixel_mean=0.5", "expected 3 values, each a number, 0 to 1, not '0.5'"),
        ("vision.pixel_mean=0.5,0.5,nan", "expected 0 to 1, not '0.5,0.5,nan'"),
        ("vision.pixel_std=0.5,0,1", "expected more than 0, and at most 10, not '0.5,0,1'"),
        ("projector.kind=", "expected one of mlp, affine, not ''"),
        ("projector.bias=1", "expected true or false, not '1'"),
    ],
)
def test_overrides_and_files_say_what_is_expected(
    tmp_path: Path, change: str, message: str
) -> None:
    assert outcome("--override", change) == f"--override {change}: {message}"
    path, _, value = change.partition("=")
    section, field = path.split(".")
    file = tmp_path / "model.yaml"
    items: Any = value.split(",")
    content = {section: {field: items if len(items) > 1 else value}}
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    assert outcome("--model-config", str(file)) == f"--model-config {file}: {path}: {message}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("language.num_attention_heads=3", "hidden_size is 128: expected a multiple of num_att"),
        ("language.num_query_groups=3", "num_attention_heads is 4: expected a multiple of num_q"),
        ("language.hidden_size=100", "expected an even number of channels of a head"),
        ("vision.hidden_size=127", "hidden_size is 127: expected a multiple of num_attention_h"),
    ],
)
def test_sizes_that_do_not_fit_each_other_are_named(change: str, message: str) -> None:
    error = outcome("--override", change)
    assert error is not None and message in error


@pytest.mark.parametrize("value", [".inf", ".nan", "-1", "1e30", "'1e30'"])
def test_files_are_named_with_their_key(tmp_path: Path, value: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"lr: {value}\n", encoding="utf-8")
    error = outcome("--config", str(file))
    assert error is not None
    assert error.startswith(f"{file}: key 'lr' is ") and error.endswith(": expected 0 to 10")


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e400"])
def test_a_family_from_outside_takes_no_number_that_is_not_finite(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Careless(GptConfig):
        factor: float = 1.0

    preset = model_config("mock").modules | {"llm": Careless()}
    monkeypatch.setitem(PROVIDERS, "careless", lambda: ModelConfig(modules=preset))
    assert model_config("careless", ["language.factor=-2"]).part("language").factor == -2
    with pytest.raises(ValueError, match=f"^--override language.factor={text}: expected a finite"):
        model_config("careless", [f"language.factor={text}"])
