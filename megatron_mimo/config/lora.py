"""The adapters that flags ask for."""

from collections.abc import Iterable, Mapping

from megatron_mimo.checkpoint.config import FirstWeightsConfig
from megatron_mimo.model.config import Frozen, ModelConfig, unknown
from megatron_mimo.modules.families import adapter_of
from megatron_mimo.modules.language.adapter import PART
from megatron_mimo.modules.lora.config import Lora, LoraConfig

_FLAG = "--lora-targets"


def adapters(
    flags: LoraConfig, architecture: ModelConfig, frozen: Frozen, trained: Iterable[str]
) -> Lora | None:
    """The adapters of a run; None for none.

    Args:
        flags: Flags of the adapters.
        architecture: Architecture of every module.
        frozen: Names of the parts that do not train.
        trained: Names of the modules of the run.

    Raises:
        ValueError: A target is unknown, frozen or not in the run, or the rank is larger than a
            width of its layers; the message names both.
    """
    if flags.rank is None:
        return None
    language = architecture.part_name(architecture.target_name, PART)
    known = dict(_layers(architecture))
    absent = {
        part
        for module in architecture.modules
        if module not in set(trained)
        for part in architecture.parts_of(module)
    }
    targets: dict[str, frozenset[str]] = {}
    for target in flags.targets or (language,):
        part, layers = _chosen(target, known, architecture)
        if part in absent:
            raise ValueError(
                f"{_FLAG} {target}: {part} is not in a run with --llm-only; leave one out"
            )
        if part in frozen:
            given = f"{_FLAG} {target}" if flags.targets else f"--lora-rank {flags.rank}"
            raise ValueError(
                f"{given}: {part} is frozen, by --training-stage or a --freeze flag, and its "
                f"adapters would be too; leave that flag out, or the target"
            )
        targets[part] = targets.get(part, frozenset()) | layers.keys()
        for layer, widths in layers.items():
            if flags.rank > min(widths):
                raise ValueError(
                    f"--lora-rank {flags.rank}: {part}.{layer} maps {widths[0]} to {widths[1]}, "
                    f"expected a rank of at most {min(widths)}"
                )
    return Lora(
        rank=flags.rank,
        alpha=float(flags.rank) if flags.alpha is None else flags.alpha,
        dropout=flags.dropout,
        rslora=flags.rslora,
        targets=targets,
    )


def check_base(lora: Lora | None, first: FirstWeightsConfig, init: str) -> None:
    """Refuse adapters of weights that a later run could not find again.

    Args:
        lora: Adapters of the run; None for none.
        first: Sources of initial weights.
        init: Value of `--init`.

    Raises:
        ValueError: The weights beside the adapters would be lost.
    """
    if lora is None:
        return
    if first.load_vision_from is not None:
        raise ValueError(
            f"--load-vision-from {first.load_vision_from} with --lora-rank {lora.rank}: "
            f"checkpoints of adapters need all other weights in one place; train without "
            f"adapters first, and name that run with --load-base"
        )
    given = (first.load_hf, first.load_nemotron_checkpoint, first.load_base)
    if init != "topology-invariant" and all(path is None for path in given):
        raise ValueError(
            f"--lora-rank {lora.rank} without weights to adapt: give --load-hf, --load-base or "
            f"--load-nemotron-checkpoint; or --init topology-invariant, whose random weights every "
            f"layout draws again"
        )


type _Layers = Mapping[str, tuple[int, int]]


def _layers(architecture: ModelConfig) -> Iterable[tuple[str, _Layers]]:
    """Part of the model -> its layers that may have adapters, each with its widths."""
    for name, config in architecture.modules.items():
        of_module = adapter_of(config).linear_layers(config, architecture.row_width)
        for part, layers in of_module.items():
            yield architecture.part_name(name, part), layers


def _chosen(
    target: str, known: Mapping[str, _Layers], architecture: ModelConfig
) -> tuple[str, _Layers]:
    """The part, and the layers of it, that a target names."""
    if target in known:
        return target, known[target]
    for part, layers in known.items():
        layer = target.removeprefix(f"{part}.")
        if layer in layers and layer != target:
            return part, {layer: layers[layer]}
        if layer.startswith(("experts.", "router")) and layer != target:
            raise ValueError(
                f"{_FLAG} {target}: adapters of experts behind a router, and of the router, are "
                f"not supported; expected one of {', '.join(f'{part}.{name}' for name in layers)}"
            )
    if target in architecture.parts:
        raise ValueError(
            f"{_FLAG} {target}: this part has no layers for adapters; expected one of "
            f"{', '.join(known)}"
        )
    everything = {f"{part}.{name}": None for part, layers in known.items() for name in layers}
    raise ValueError(f"{_FLAG}: {unknown(target, dict.fromkeys(known) | everything)}")
