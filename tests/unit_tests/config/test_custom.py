"""Python modules of the user, which extend the package, and the presets that they register."""

import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_mimo.config.custom import import_custom
from megatron_mimo.config.flags import parse
from megatron_mimo.config.presets import PROVIDERS, model_config
from megatron_mimo.config.resolve import Resolved, resolve
from megatron_mimo.config.sections import TrainConfig
from megatron_mimo.model.config import ModelConfig


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("leaves", "import sys; sys.exit(0)", r"leaves fails: SystemExit: 0 \(.*leaves.py, line 1"),
        (
            "raises",
            "raise OSError('two\\nlines')",
            r"raises fails: OSError: two lines \(.*line 1\)",
        ),
        ("broken", "x = = 1", "broken fails: SyntaxError: .*broken.py, line 1"),
        ("needs", "import not_there", "needs fails: ModuleNotFoundError: No module named"),
    ],
)
def test_what_fails_is_one_line(
    name: str, text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script that ends the process must not look like a run that is done."""
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=f"^--custom-import {message}") as found:
        import_custom([name])
    assert "\n" not in str(found.value) and "importlib" not in str(found.value)
    sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["", "../audio", "audio.py", "my project", ".audio", "a..b"])
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="expected the name of a Python module"):
        import_custom([name])


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="--custom-import absent_one: there is no module"):
        import_custom(["absent_one"])


# -- presets ---------------------------------------------------------------------------------------


def fails() -> Any:
    raise KeyError("size")


@pytest.mark.parametrize(
    ("provider", "message"),
    [
        (fails, "--model-provider odd fails: KeyError: 'size'"),
        (lambda: None, "--model-provider odd returns NoneType: expected a ModelConfig"),
        (lambda size: size, "--model-provider odd fails: TypeError: .*missing 1 required"),
    ],
)
def test_a_preset_that_fails_is_named(
    provider: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PROVIDERS, "odd", provider)
    with pytest.raises(ValueError, match=message):
        model_config("odd")


def without_vision() -> ModelConfig:
    from examples.mimo.readings import ReadingsConfig

    return ModelConfig(
        modules={"readings": ReadingsConfig(), "llm": PROVIDERS["mock"]().modules["llm"]}
    )


def with_two_encoders() -> ModelConfig:
    modules = PROVIDERS["mock"]().modules
    return ModelConfig(
        modules={"left": modules["encoder"], "right": modules["encoder"], "llm": modules["llm"]}
    )


@pytest.fixture
def presets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that have a part "vision" among others, none, or two; other tests do not see them."""
    from examples.mimo import readings

    PROVIDERS.pop("mock-readings", None)
    monkeypatch.setitem(PROVIDERS, "mock-readings", readings.mock_readings)
    monkeypatch.setitem(PROVIDERS, "test-no-vision", without_vision)
    monkeypatch.setitem(PROVIDERS, "test-two-encoders", with_two_encoders)


def resolved(*flags: str) -> Resolved:
    return resolve(parse(["--seq-length", "96", *flags], TrainConfig, prog="train"), 1)


@pytest.mark.usefixtures("presets")
def test_a_model_needs_no_vision_encoder() -> None:
    found = resolved("--model-provider", "test-no-vision")
    assert list(found.data.inputs) == ["readings"]
    assert found.config.model.patch_dim is None
    with pytest.raises(ValueError, match="--freeze-vit: unknown 'vision'; known: filter, mapping"):
        resolved("--model-provider", "test-no-vision", "--freeze-vit")
    with pytest.raises(ValueError, match=r"--patch-dim .* has no vision.patch_dim: leave it out"):
        resolved("--model-provider", "test-no-vision", "--patch-dim", "8")


@pytest.mark.usefixtures("presets")
def test_modules_of_one_family_have_tokens_of_their_own() -> None:
    found = resolved("--model-provider", "test-two-encoders")
    inputs = found.data.inputs
    assert [kind.placeholder for kind in inputs.values()] == ["<left>", "<right>"]
    frozen = resolved("--model-provider", "test-two-encoders", "--freeze-vit").freeze
    assert frozen == {"left.vision", "right.vision"}


@pytest.mark.usefixtures("presets")
@pytest.mark.parametrize(
    ("flags", "frozen"),
    [
        ("--training-stage stage1", {"vision", "filter", "language"}),
        ("--training-stage stage2", {"vision", "filter"}),
        ("--training-stage stage3", set()),
        ("--freeze-projection", {"projector", "mapping"}),
        ("--freeze-vit --freeze-lm", {"vision", "language"}),
    ],
)
def test_stages_treat_every_module_alike(flags: str, frozen: set[str]) -> None:
    assert resolved("--model-provider", "mock-readings", *flags.split()).freeze == frozen


@pytest.mark.usefixtures("presets")
def test_a_module_to_freeze_is_told_by_its_parts() -> None:
    message = "--freeze readings: readings is a module, whose parts are filter, mapping: name these"
    with pytest.raises(ValueError, match=message):
        resolved("--model-provider", "mock-readings", "--freeze", "readings")


@pytest.mark.usefixtures("presets")
def test_sequence_parallelism_follows_any_way_to_set_tp() -> None:
    flags = ("--grid", "llm.tp=2", "--sequence-parallel")
    config = parse(["--seq-length", "96", *flags], TrainConfig, prog="train")
    assert resolve(config, 3).config.grids.sequence_parallel
