"""Adapters of models of transformers: the encoder, and the language model that it feeds."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from megatron_mimo.media.processors import ProcessorInput, read_processor
from megatron_mimo.modules.adapter import (
    Axis,
    BuildContext,
    Division,
    Experts,
    FlopsContext,
    SourceAdapter,
)
from megatron_mimo.modules.flops import Flops, TextWork, Work, all_pairs
from megatron_mimo.modules.hf.config import HfEncoderConfig, HfLanguageConfig, whole_config
from megatron_mimo.modules.language.adapter import PART, LanguageAdapter

if TYPE_CHECKING:
    from megatron_mimo.modules.stage import ModuleStage

VISION, PROJECTOR = "vision", "projector"


@contextmanager
def _flag(flag: str, size: int) -> Iterator[None]:
    """Name a flag in errors."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{flag} {size}: {error}") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class TowerWork(Work):
    """Amount of work of an encoder.

    Attributes:
        tokens: Number of tokens of the encoder.
        pairs: Number of pairs of tokens of one image.
    """

    balanced: ClassVar[tuple[str, ...]] = ("rows", "tokens")

    tokens: int = 0
    pairs: int = 0


class HfEncoderAdapter(SourceAdapter[HfEncoderConfig, TowerWork]):
    """Encoders of models of transformers, each with its projector, on one stage."""

    config_type = HfEncoderConfig
    work_type = TowerWork

    def parts(self, config: HfEncoderConfig) -> Mapping[str, Any]:
        """The vision encoder and the projector."""
        return {VISION: config.vision, PROJECTOR: config.projector}

    def part_titles(self, config: HfEncoderConfig) -> Mapping[str, str]:
        """Titles of the parts in tables."""
        return {VISION: "vision encoder", PROJECTOR: "projector"}

    def trains_inside(self, config: HfEncoderConfig, frozen: frozenset[str]) -> bool:
        """Whether the vision encoder trains."""
        return VISION not in frozen

    def projections(self, config: HfEncoderConfig) -> frozenset[str]:
        """The projector."""
        return frozenset({PROJECTOR})

    def build(self, config: HfEncoderConfig, context: BuildContext) -> "ModuleStage":
        """This rank's shard of the encoder.

        Raises:
            ValueError: The encoder cannot be divided so; the message names what stands in the way.
        """
        from megatron_mimo.modules.hf.encoder import HfEncoder

        return HfEncoder(config, context)

    def hidden_width(self, config: HfEncoderConfig) -> int:
        """Width of a token of the encoder."""
        return config.vision.hidden_size

    def prefixes(self, config: HfEncoderConfig, name: str) -> Mapping[str, str]:
        """Names in checkpoints are transformers' own."""
        return {"model.": f"{name}."}

    def divisions(self, config: HfEncoderConfig) -> Iterable[Division]:
        """Attention heads divide over tensor-parallel ranks."""
        return (
            Division("tp", VISION, "num_attention_heads"),
            Division("tp", VISION, "num_key_value_heads"),
        )

    def check_sizes(
        self, config: HfEncoderConfig, flags: Mapping[Axis, str], sizes: Mapping[Axis, int]
    ) -> None:
        """Refuse a tensor-parallel size that the encoder's layers cannot be divided by.

        Raises:
            ValueError: A weight does not divide, or there is no plan for its layer.
        """
        if sizes["tp"] == 1:
            return
        from megatron_mimo.modules.hf.cut import encoder_only, meta_model
        from megatron_mimo.modules.hf.tensor_parallel import check_division, tower_plan

        model = meta_model(config.vision.description)
        plan = tower_plan(model, config.family)
        with _flag(flags["tp"], sizes["tp"]):
            check_division(encoder_only(model, config.family), plan, sizes["tp"])

    def check_stages(self, config: HfEncoderConfig, number: int) -> None:
        """Refuse several stages.

        Raises:
            ValueError: There is more than one.
        """
        if number > 1:
            raise ValueError(
                f"--encoder-pp {number}: the encoder of a {config.family.model_type} model is not "
                f"cut into stages; set it to 1, and divide it by --encoder-dp or --encoder-tp"
            )

    def flops(self, config: HfEncoderConfig, work: TowerWork, context: FlopsContext) -> Flops:
        """Number of operations of some work of both parts."""
        from megatron_mimo.modules.hf.flops import encoder_flops

        return encoder_flops(config, work.tokens, work.pairs, work.rows, context)

    def work(self, config: HfEncoderConfig, packed: Any) -> TowerWork:
        """Work of packed images."""
        return TowerWork(
            rows=sum(packed.rows), tokens=sum(packed.lengths), pairs=all_pairs(packed.lengths)
        )

    def item_work(self, config: HfEncoderConfig, lengths: Sequence[int], rows: int) -> TowerWork:
        """Work of one image."""
        return TowerWork(rows=rows, tokens=sum(lengths), pairs=all_pairs(lengths))

    def item_input(
        self,
        config: HfEncoderConfig,
        *,
        name: str,
        frozen: frozenset[str],
        placeholder: str = "<image>",
        noun: str = "image",
        **settings: Any,
    ) -> ProcessorInput:
        """Conversion of images as the folder's own processor makes it.

        Args:
            config: Architecture of the module.
            name: Name of the module.
            frozen: Names of the parts that do not train.
            placeholder: Placeholder of an image in stored samples.
            noun: Name of one image, and of its field in stored samples.
            settings: Flags of images, which are for other encoders: here the folder decides.

        Raises:
            ValueError: The folder has no processor that is supported; the message says why.
        """
        whole = whole_config(config.vision.description).to_dict()
        return read_processor(
            config.folder, config.family.model_type, whole, placeholder=placeholder, noun=noun
        )


class HfLanguageAdapter(LanguageAdapter[HfLanguageConfig]):
    """Language models of models of transformers; the model's own forward runs on every stage."""

    config_type = HfLanguageConfig
    tokens_on_every_stage = True
    sequence_parallel = False
    layers_of_megatron = False
    replicas_divide = True

    def build(self, config: HfLanguageConfig, context: BuildContext) -> "ModuleStage":
        """This rank's shard of its pipeline stage.

        Raises:
            ValueError: The model cannot be divided so; the message names what stands in the way.
        """
        from megatron_mimo.modules.hf.language import HfLanguage

        return HfLanguage(config, context)

    def hidden_width(self, config: HfLanguageConfig) -> int:
        """Width of a token's embedding."""
        return config.hidden_size

    def row_width(self, config: HfLanguageConfig) -> int:
        """Width of a row, which holds features for several layers in some families."""
        return config.hidden_size * config.row_parts

    def prefixes(self, config: HfLanguageConfig, name: str) -> Mapping[str, str]:
        """Names in checkpoints are transformers' own."""
        return {"model.": f"{name}."}

    def divisions(self, config: HfLanguageConfig) -> Iterable[Division]:
        """Heads and the vocabulary divide over tensor-parallel ranks, experts over theirs."""
        yield Division("tp", PART, "num_attention_heads")
        yield Division("tp", PART, "num_key_value_heads")
        yield Division("tp", PART, "vocab_size")
        if config.num_experts:
            yield Division("ep", PART, "num_experts")

    def linear_layers(
        self, config: HfLanguageConfig, row_width: int
    ) -> Mapping[str, Mapping[str, tuple[int, int]]]:
        """The linear layers of the decoder's layers, by the last part of transformers' names."""
        from megatron_mimo.modules.hf.costs import linear_shapes

        found: dict[str, tuple[int, int]] = {}
        for path, widths in linear_shapes(config.description).items():
            name = path.rpartition(".")[2]
            least = found.get(name, widths)
            # Layers of one name may differ, such as those of local and of global attention.
            found[name] = min(least, widths, key=min)
        return {PART: found}

    def parallel_axes(self, config: HfLanguageConfig) -> frozenset[Axis]:
        """Those of experts where there are any."""
        return frozenset({"ep", "expt_tp"}) if config.num_experts else frozenset()

    def check_stages(self, config: HfLanguageConfig, number: int) -> None:
        """Refuse stages that the model cannot be cut into.

        Raises:
            ValueError: Layers depend on what other stages compute, or there are too few.
        """
        if number == 1:
            return
        sizes = config.stage_layers
        if sizes and len(sizes) != number:
            raise ValueError(
                f"language.stage_layers has {len(sizes)} numbers: expected {number}, as --llm-pp "
                f"says"
            )
        for field, why in config.family.refused.items():
            if getattr(config.text, field, None):
                raise ValueError(
                    f"--llm-pp {number} with text_config.{field} {getattr(config.text, field)}: "
                    f"{why}, so that the model cannot be cut into stages; set --llm-pp 1"
                )
        least = config.row_parts - 1
        if sizes and sizes[0] < least:
            raise ValueError(
                f"language.stage_layers begins with {sizes[0]}: features of images enter the first "
                f"{least} layers, which have to be on the first stage; give it {least} or more"
            )
        if config.num_layers < number or config.num_layers - (number - 1) < least:
            raise ValueError(
                f"--llm-pp {number}: the model has {config.num_layers} layers"
                + (f", the first {least} of which have to be on one stage" if least else "")
                + "; lower it"
            )

    def check_sizes(
        self, config: HfLanguageConfig, flags: Mapping[Axis, str], sizes: Mapping[Axis, int]
    ) -> None:
        """Refuse sizes that the language model's layers cannot be divided by.

        Raises:
            ValueError: A weight does not divide, there is no plan for its layer, or experts are to
                be divided in another way than the layers beside them.
        """
        if sizes["ep"] > 1 and sizes["expt_tp"] != sizes["tp"]:
            raise ValueError(
                f"{flags['expt_tp']} {sizes['expt_tp']} with {flags['tp']} {sizes['tp']} and "
                f"{flags['ep']} {sizes['ep']}: the experts of a model of transformers are divided "
                f"as its other layers are; set {flags['expt_tp']} {sizes['tp']}"
            )
        if sizes["tp"] == 1:
            return
        from megatron_mimo.modules.hf.cut import language_stage, meta_model
        from megatron_mimo.modules.hf.tensor_parallel import check_division, language_plan

        model = meta_model(config.description)
        plan = language_plan(model, config.family)
        model = language_stage(model, config.family, 0, config.num_layers)
        with _flag(flags["tp"], sizes["tp"]):
            check_division(model, plan, sizes["tp"], num_experts=config.num_experts)

    def flops(self, config: HfLanguageConfig, work: TextWork, context: FlopsContext) -> Flops:
        """Number of operations of some work, output layer included."""
        from megatron_mimo.modules.hf.flops import language_flops

        return language_flops(config, work, context)

    def experts(self, config: HfLanguageConfig) -> Experts | None:
        """The model's MoE layers; None without any."""
        if not config.num_experts:
            return None
        chosen = getattr(config.text, "num_experts_per_tok", None)
        return Experts(
            layers=tuple(range(1, config.num_layers + 1)),
            number=config.num_experts,
            per_token=int(chosen or config.text.top_k_experts),
        )

    def with_even_load(self, config: HfLanguageConfig) -> HfLanguageConfig:
        """Refuse it: the model's own router chooses.

        Raises:
            ValueError: Always where there are experts.
        """
        if config.num_experts:
            raise ValueError(
                "--moe-router-force-load-balancing: the router of a model of transformers is its "
                "own; leave it out"
            )
        return config
