"""The table of families, and what the program asks of one that it does not know."""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from megatron_mimo.config.presets import changed, model_config
from megatron_mimo.model.config import Frozen, ModelConfig
from megatron_mimo.model.flops import ModelWork, model_flops
from megatron_mimo.modules import families
from megatron_mimo.modules.adapter import BuildContext, Division, FlopsContext, SourceAdapter
from megatron_mimo.modules.families import adapter_of, register
from megatron_mimo.modules.flops import Flops, Work, product, text_work
from megatron_mimo.modules.gpt.config import GptConfig
from megatron_mimo.modules.radio.config import RadioConfig

if TYPE_CHECKING:
    from megatron_mimo.modules.stage import ModuleStage

PACKAGE = Path(families.__file__).parents[1]
SEED = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class EarConfig:
    """A linear layer that listens."""

    num_channels: int = 6
    init_method_std: float = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class MouthConfig:
    """A linear layer into the width of the language model."""

    bias: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class ToneConfig:
    """A module that no file of the package knows."""

    ear: EarConfig = field(default_factory=EarConfig)
    mouth: MouthConfig = field(default_factory=MouthConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class ToneWork(Work):
    """What the module runs."""

    samples: int = 0


class ToneAdapter(SourceAdapter[ToneConfig, ToneWork]):
    """As a user of the package would write it, next to the training script."""

    config_type = ToneConfig
    work_type = ToneWork

    def build(self, config: ToneConfig, context: BuildContext) -> "ModuleStage":
        return _tone_stage(config, context)

    def hidden_width(self, config: ToneConfig) -> int:
        return config.ear.num_channels

    def divisions(self, config: ToneConfig) -> tuple[Division, ...]:
        return (Division("tp", "ear", "num_channels"),)

    def flops(self, config: ToneConfig, work: ToneWork, context: FlopsContext) -> Flops:
        channels = config.ear.num_channels
        hears = "ear" not in context.frozen
        speaks = "mouth" not in context.frozen
        return product(work.samples, 1, channels, weight=hears, inputs=False) + product(
            work.rows, channels, context.row_width, weight=speaks, inputs=hears
        )

    def work(self, config: ToneConfig, packed: Any) -> ToneWork:
        return ToneWork(samples=len(packed), rows=len(packed))

    def item_input(
        self, config: ToneConfig, *, name: str, frozen: frozenset[str], **settings: Any
    ) -> Any:
        return settings


# In this process, and in every rank that imports this file.
register(ToneAdapter())


def _tone_stage(config: ToneConfig, context: BuildContext) -> "ModuleStage":
    from torch import Tensor, nn

    from megatron_mimo.modules.stage import ModuleStage
    from megatron_mimo.runtime.megatron_core import transformer_config
    from megatron_mimo.weights.initial import Draw, Normal

    class ToneStage(ModuleStage):
        def __init__(self) -> None:
            settings = transformer_config(
                context.pg_collection,
                params_dtype=context.params_dtype,
                sequence_parallel=False,
                num_layers=1,
                hidden_size=config.ear.num_channels,
                num_attention_heads=1,
            )
            super().__init__(config=settings)
            self.ear = nn.Linear(1, config.ear.num_channels, bias=False)
            self.mouth = nn.Linear(
                config.ear.num_channels, context.row_width, bias=config.mouth.bias
            )
            for name, part in self.parts.items():
                part.requires_grad_(name not in context.frozen)

        @property
        def parts(self) -> Mapping[str, nn.Module]:
            return {"ear": self.ear, "mouth": self.mouth}

        def initial(self, name: str) -> Draw | None:
            return None if name.endswith("bias") else Normal(config.ear.init_method_std)

        def forward(self, packed: Tensor, hidden: Tensor | None = None) -> Tensor:
            rows: Tensor = self.mouth(self.ear(packed))
            return rows

    return ToneStage()


def model(*overrides: str) -> ModelConfig:
    """Two families from inside and one from outside, each a module."""
    mock = model_config("mock", ["language.hidden_size=64"])
    modules = {
        "encoder": mock.modules["encoder"],
        "tones": ToneConfig(),
        "llm": mock.modules["llm"],
    }
    return changed(ModelConfig(modules=modules), overrides)


def test_parts_of_a_family_from_outside_are_overridden_like_any() -> None:
    config = model("ear.num_channels=10", "mouth.bias=false", "language.num_layers=3")
    assert list(config.parts) == ["vision", "projector", "ear", "mouth", "language"]
    assert config.modules["tones"] == ToneConfig(
        ear=EarConfig(num_channels=10), mouth=MouthConfig(bias=False)
    )
    assert config.part("language").num_layers == 3
    with pytest.raises(ValueError, match="unknown 'moth'; did you mean 'mouth'?"):
        model("moth.bias=false")
    with pytest.raises(ValueError, match="unknown 'num_channel'; did you mean 'num_channels'?"):
        model("ear.num_channel=10")


def test_a_file_changes_them_too() -> None:
    config = changed(model(), fields={"ear": {"num_channels": 3}}, where="model.yaml")
    assert config.part("ear").num_channels == 3


def test_modules_of_one_family_have_their_names_in_front() -> None:
    encoder = model().modules["encoder"]
    two = ModelConfig(modules={"left": encoder, "right": encoder, "llm": GptConfig()})
    config = changed(two, ["right.vision.num_layers=1"])
    assert list(config.parts)[:3] == ["left.vision", "left.projector", "right.vision"]
    assert config.part("left.vision").num_layers == 2
    assert config.part("right.vision").num_layers == 1
    assert config.frozen_in("right", Frozen({"right.vision", "left.projector"})) == {"vision"}
    assert config.part_name("right", "vision") == "right.vision"
    assert config.prefixes() == {
        "left": {"vision.": "left.vision_model.", "projector.": "left.vision_projection."},
        "right": {"vision.": "right.vision_model.", "projector.": "right.vision_projection."},
        "llm": {"model.": "language_model."},
    }


def test_stored_names_are_the_familys_or_begin_with_the_modules() -> None:
    assert model().prefixes() == {
        "encoder": {"vision.": "vision_model.", "projector.": "vision_projection."},
        "tones": {"": "tones."},
        "llm": {"model.": "language_model."},
    }


@pytest.mark.parametrize(
    ("frozen", "trains"),
    [
        (Frozen(), {"encoder", "tones", "llm"}),
        (Frozen({"ear"}), {"encoder", "tones", "llm"}),
        (Frozen({"ear", "mouth", "vision"}), {"encoder", "llm"}),
        (Frozen({"vision", "projector", "language"}), {"tones"}),
    ],
    ids=lambda value: "-".join(sorted(value)) or "none",
)
def test_what_trains(frozen: Frozen, trains: set[str]) -> None:
    config = model()
    assert {name for name in config.modules if config.trains(name, frozen)} == trains


def test_an_unknown_part_is_not_frozen() -> None:
    with pytest.raises(ValueError, match="unknown 'visoin'; did you mean 'vision'?"):
        model().frozen_in("encoder", Frozen({"visoin"}))


def test_operations_of_a_family_from_outside_count() -> None:
    config = model()
    work = ModelWork(
        {"tones": adapter_of(ToneConfig()).work(ToneConfig(), [1] * 7), "llm": text_work([64])}
    )
    sizes = {"vocab_size": 96, "seq_length": 64}
    every = model_flops(config, Frozen(), work, **sizes)
    # Six channels, rows of width 64; sounds have no gradient.
    forward = 2 * 7 * 6 + 2 * 7 * 6 * 64
    assert every.modules["tones"] == Flops(forward, forward + 2 * 7 * 6 * 64)
    assert every.modules["encoder"] == Flops()
    assert every.total == every.modules["tones"].total + every.modules["llm"].total
    deaf = model_flops(config, Frozen({"ear"}), work, **sizes)
    assert deaf.modules["tones"] == Flops(forward, 2 * 7 * 6 * 64)


def test_rows_have_gradients_where_any_source_trains() -> None:
    """A frozen language model passes them on only then."""
    work = ModelWork({"llm": text_work([64])})
    sizes = {"vocab_size": 96, "seq_length": 64}
    sources = {"vision", "projector", "ear"}
    passed = model_flops(model(), Frozen({*sources, "language"}), work, **sizes)
    assert passed.modules["llm"].backward > 0
    ended = model_flops(model(), Frozen({*sources, "mouth", "language"}), work, **sizes)
    assert ended.modules["llm"].backward == 0


def built(frozen: Frozen) -> dict[str, Any]:
    """What a rank makes of the model."""
    import torch

    from megatron_mimo.model.mimo import BuildConfig, build_model
    from megatron_mimo.runtime import Device
    from megatron_mimo.topology import Layout, ModuleGridSpec
    from megatron_mimo.topology.groups import build_topology

    config = model()
    grids = [ModuleGridSpec(name=name) for name in config.modules]
    mimo = build_model(
        config,
        frozen,
        BuildConfig(
            params_dtype=torch.float32,
            seed=SEED,
            init="topology-invariant",
            vocab_size=96,
            seq_length=64,
            sequence_parallel=False,
        ),
        build_topology(Layout.of(*grids, world_size=1)),
        Device("cpu"),
    )
    tones, rows = mimo.modules["tones"], None
    rows = tones(torch.ones(3, 1), None)
    assert mimo.target is mimo.modules["llm"]
    return {
        "modules": list(mimo.modules),
        "rows": tuple(rows.shape),
        "returning": mimo.flow.returning,
        "inside": mimo.flow.inside,
        "trains": mimo.trains,
        "wrapped": {name: replica.ddp is not None for name, replica in mimo.modules.items()},
        "stored": tones.prefixes,
        "ear": tones.module.ear.weight.detach().clone(),
        "frozen": [n for n, p in tones.module.named_parameters() if not p.requires_grad],
    }


def test_a_rank_builds_a_family_from_outside(run_ranks: Callable[..., list]) -> None:
    (found,) = run_ranks(1, built, Frozen({"ear", "vision"}))
    ear = found.pop("ear")
    assert found == {
        "modules": ["encoder", "tones", "llm"],
        "rows": (3, 64),
        "returning": {"encoder", "tones"},
        # The adapter says nothing of its last stage, so that all of it counts.
        "inside": {"tones"},
        "trains": True,
        "wrapped": {"encoder": True, "tones": True, "llm": True},
        "stored": {"": "tones."},
        "frozen": ["ear.weight"],
    }
    # Drawn from the seed and the name, by what the stage says.
    (again,) = run_ranks(1, built, Frozen({"ear", "mouth", "language"}))
    assert again["ear"].equal(ear)
    assert 0 < float(ear.std()) < 0.5
    assert again["returning"] == {"encoder"}
    assert again["inside"] == {"encoder"}
    assert again["wrapped"] == {"encoder": True, "tones": False, "llm": False}
    assert again["trains"] is False


def test_nothing_to_train_is_refused(run_ranks: Callable[..., list]) -> None:
    (said,) = run_ranks(1, refusal, Frozen(model().parts))
    assert said.startswith("nothing trains: ear, language, mouth, projector, vision are frozen")


def refusal(frozen: Frozen) -> str:
    """What building says."""
    try:
        built(frozen)
    except ValueError as error:
        return str(error)
    return "no error"


@dataclass(frozen=True)
class Stranger:
    """A config of no family."""


def test_an_unknown_config_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="no family of modules has a config of type Stranger"):
        adapter_of(Stranger())
    with pytest.raises(ValueError, match="type Stranger"):
        ModelConfig(modules={"encoder": Stranger(), "llm": GptConfig()})


def test_a_language_model_comes_last_and_alone() -> None:
    encoder = model().modules["encoder"]
    with pytest.raises(ValueError, match="a RadioModuleConfig is not a language model"):
        ModelConfig(modules={"llm": GptConfig(), "encoder": encoder})
    with pytest.raises(ValueError, match="a GptConfig feeds no rows to a language model"):
        ModelConfig(modules={"first": GptConfig(), "llm": GptConfig()})
    with pytest.raises(ValueError, match="a model without modules"):
        ModelConfig(modules={})


def test_two_families_do_not_share_a_type_of_config() -> None:
    class Other(ToneAdapter):
        pass

    register(ToneAdapter())
    with pytest.raises(ValueError, match="Other is for ToneConfig, as is ToneAdapter"):
        register(Other())


def test_a_config_that_derives_from_a_familys_is_its_own() -> None:
    class Louder(ToneConfig):
        pass

    assert isinstance(adapter_of(Louder()), ToneAdapter)


def test_no_other_file_asks_what_kind_of_module_a_config_is() -> None:
    """They ask the adapter."""
    kinds = {kind.__name__ for kind in families._FAMILIES} | {RadioConfig.__name__}
    kinds -= {ToneConfig.__name__}
    assert len(kinds) >= 4
    found = [
        f"{file.relative_to(PACKAGE)}:{node.lineno}"
        for file in sorted(PACKAGE.rglob("*.py"))
        if not file.is_relative_to(PACKAGE / "modules")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call | ast.Compare)
        and re.match(r"(isinstance|issubclass|type)\(", text := ast.unparse(node))
        and kinds & set(re.findall(r"\w+", text))
    ]
    assert found == []


def test_families_are_known_before_megatron_core_is() -> None:
    """Flags are checked before it may be imported."""
    code = (
        "import sys; from megatron_mimo.modules.families import adapter_of; "
        "from megatron_mimo.config.presets import model_config; "
        "[adapter_of(module) for module in model_config('mock').modules.values()]; "
        "sys.exit('megatron.core' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent).returncode == 0
