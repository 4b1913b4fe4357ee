"""The architecture that flags ask for, its computation, and its frozen parts."""

from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

from megatron_mimo.config.model_file import Folder, read_architecture
from megatron_mimo.config.sections import ModelSection, TrainConfig
from megatron_mimo.model.config import Frozen, ModelConfig, unknown
from megatron_mimo.modules.adapter import Axis, ModuleConfig
from megatron_mimo.modules.families import adapter_of, language_adapter, source_adapter
from megatron_mimo.modules.language import ExecutionConfig
from megatron_mimo.topology import Layout, SequenceSharding

_VISION, _VIDEO, _AUDIO = "vision", "video", "audio"


def model_architecture(model: ModelSection, folder: Folder | None) -> ModelConfig:
    """The architecture that the flags ask for.

    Args:
        model: Flags as given.
        folder: Model of the folder of --load-hf; None without one.

    Raises:
        ValueError: A preset, file, section, field or value is wrong; the message says where.
    """
    config = read_architecture(model.model_provider, model.model_config, model.override, folder)
    if model.moe_router_force_load_balancing:
        _require_experts("--moe-router-force-load-balancing", model, config)
        target = language_adapter(config.target).with_even_load(config.target)
        config = ModelConfig(modules={**config.modules, config.target_name: target})
    config = _with_image_flags(model, config)
    return videos_apart(config) if model.separate_video else config


def videos_apart(config: ModelConfig) -> ModelConfig:
    """The config with a module "video" beside the vision encoder, whose videos it takes.

    Raises:
        ValueError: No module takes both images and videos, or several do.
    """
    apart = {
        name: halves
        for name, source in config.sources.items()
        if (halves := source_adapter(source).without_videos(source)) is not None
    }
    if len(apart) != 1 or _VIDEO in config.modules:
        raise ValueError(
            f"--separate-video: of the modules {', '.join(config.modules)} {len(apart)} take both "
            f"images and videos: expected one such module, and none called {_VIDEO}; leave "
            f"--separate-video out"
        )
    modules: dict[str, ModuleConfig] = {}
    for name, module in config.modules.items():
        if name in apart:
            modules[name], modules[_VIDEO] = apart[name]
        else:
            modules[name] = module
    return ModelConfig(modules=modules)


def _with_image_flags(model: ModelSection, config: ModelConfig) -> ModelConfig:
    """The config with the flags of images applied to its vision encoder.

    Raises:
        ValueError: A number is out of range, or the model has no part for the flag.
    """
    fields = ("patch_dim", "class_token_len", "pixel_shuffle")
    given: dict[str, int | bool] = {
        field: value for field in fields if (value := getattr(model, field)) is not None
    }
    if not given:
        return config
    vision: Any = config.parts.get(_VISION)
    for field in given:
        if not hasattr(vision, field):
            raise ValueError(
                f"--{field.replace('_', '-')} with --model-provider {model.model_provider}, which "
                f"has no {_VISION}.{field}: leave it out"
            )
    tokens = given.get("class_token_len")
    if tokens is not None and hasattr(vision, "num_registers"):
        given["num_registers"] = min(tokens, vision.num_registers)
    return config.with_parts(**{_VISION: replace(vision, **given)})


def language_execution(model: ModelSection, architecture: ModelConfig) -> ExecutionConfig:
    """Recomputation, grouping and fusing in the language model.

    Raises:
        ValueError: The model lacks a part to recompute, or parts are given without "selective".
    """
    granularity, parts = model.recompute_granularity, model.recompute_modules
    if not language_adapter(architecture.target).layers_of_megatron:
        selective = "--recompute-granularity selective" if granularity == "selective" else ""
        grouped = "--moe-grouped-gemm" if model.moe_grouped_gemm is not None else ""
        if selective or grouped:
            raise ValueError(
                f"{selective or grouped}: the layers of this model are transformers' own, which do "
                f"not know it; leave it out, or recompute whole layers with "
                f"--recompute-granularity full"
            )
    if parts and granularity != "selective":
        raise ValueError(
            f"--recompute-modules {parts[0]} without --recompute-granularity selective: add it"
        )
    if model.moe_grouped_gemm is not None:
        _require_experts("--moe-grouped-gemm", model, architecture)
    experts = ("moe", "shared_experts", "moe_act") if _has_experts(architecture) else ()
    known = ("core_attn", "layernorm", "mlp", *experts)
    for part in parts:
        if part not in known:
            raise ValueError(f"--recompute-modules {part}: expected {', '.join(known)}")
    return ExecutionConfig(
        recompute_granularity=granularity,
        recompute_modules=parts or ("core_attn",),
        moe_grouped_gemm=model.moe_grouped_gemm,
    )


def frozen_parts(model: ModelSection, architecture: ModelConfig, trained: Iterable[str]) -> Frozen:
    """Names of the parts that do not train.

    Args:
        model: Flags as given.
        architecture: Architecture of every module.
        trained: Names of the modules of the run.

    Raises:
        ValueError: A flag names a part that the model does not have, or no part is left to train;
            the message names the flags.
    """
    trained, known = tuple(trained), architecture.parts
    language = architecture.parts_of(architecture.target_name)
    projections = tuple(
        architecture.part_name(name, part)
        for name, source in architecture.sources.items()
        for part in sorted(source_adapter(source).projections(source))
    )
    encoders = tuple(part for part in known if part not in (*language, *projections))
    named = {
        name: tuple(part for part in encoders if part.rpartition(".")[2] == name)
        for name in (_VISION, _VIDEO, _AUDIO)
    }
    stages = {"stage1": (*encoders, *language), "stage2": encoders, "stage3": ()}
    for flag, freezes, name in (
        ("--freeze-video", model.freeze_video, _VIDEO),
        ("--freeze-audio", model.freeze_audio, _AUDIO),
    ):
        if freezes and not named[name]:
            raise ValueError(f"{flag}: this model takes no {name}; leave the flag out")
    flags: dict[str, tuple[str, ...]] = {
        f"--training-stage {model.training_stage}": stages[model.training_stage],
        "--freeze-vit": (
            (*(named[_VISION] or (_VISION,)), *named[_VIDEO]) if model.freeze_vit else ()
        ),
        "--freeze-video": named[_VIDEO] if model.freeze_video else (),
        "--freeze-audio": named[_AUDIO] if model.freeze_audio else (),
        "--freeze-lm": language if model.freeze_lm else (),
        "--freeze-projection": (projections or ("projector",)) if model.freeze_projection else (),
        **{f"--freeze {part}": (part,) for part in model.freeze},
    }
    for flag, parts in flags.items():
        for part in parts:
            if part in architecture.modules and part not in known:
                raise ValueError(
                    f"{flag}: {part} is a module, whose parts are "
                    f"{', '.join(architecture.parts_of(part))}: name these"
                )
            if part not in known:
                raise ValueError(f"{flag}: {unknown(part, known)}")
    frozen = Frozen(part for parts in flags.values() for part in parts)
    if not any(architecture.trains(name, frozen) for name in trained):
        given = [flag for flag, parts in flags.items() if parts]
        if len(trained) < len(architecture.modules):
            given.append("--llm-only")
        raise ValueError(f"nothing is left to train with {', '.join(given)}: leave one out")
    return frozen


def _refuse_unsupported(layout: Layout, architecture: ModelConfig) -> None:
    """Refuse parallel sizes that training does not support.

    Raises:
        ValueError: A grid has a kind of parallelism that its module does not support.
    """
    for grid in layout.modules.values():
        config = architecture.modules[grid.name]
        supported = adapter_of(config).parallel_axes(config)
        for axis, what in (
            ("cp", "context parallelism"),
            ("ep", "expert parallelism"),
            ("expt_tp", "expert tensor parallelism"),
        ):
            size = getattr(grid, axis)
            if size > 1 and axis not in supported:
                whole = axis == "cp" and grid.name == layout.target.name
                why = ", whose own forward takes whole sequences" if whole else ""
                raise ValueError(
                    f"{grid.flag(axis)} {size}: {what} is not supported for this model{why}; set "
                    f"it to 1"
                )


def _has_experts(architecture: ModelConfig) -> bool:
    return adapter_of(architecture.target).experts(architecture.target) is not None


def _require_experts(flag: str, model: ModelSection, architecture: ModelConfig) -> None:
    if not _has_experts(architecture):
        raise ValueError(
            f"{flag} with --model-provider {model.model_provider}, which has no experts: leave it "
            f"out"
        )


def check_shards(layout: Layout, architecture: ModelConfig) -> None:
    """Refuse grids without a module, and layers and widths that ranks cannot divide evenly.

    Raises:
        ValueError: A size does not divide, or a grid has no module; the message names the flags.
    """
    for name in layout.modules:
        if name not in architecture.modules:
            raise ValueError(f"grid {name!r}: {unknown(name, architecture.modules)}")
    _refuse_unsupported(layout, architecture)
    for grid in layout.modules.values():
        config = architecture.modules[grid.name]
        adapter = adapter_of(config)
        parts = adapter.parts(config)
        for axis, part, field, repeats in adapter.divisions(config):
            ranks, size = getattr(grid, axis), getattr(parts[part], field)
            if size % ranks and not (repeats and ranks % size == 0):
                name = f"{architecture.part_name(grid.name, part)}.{field}"
                # Sizes of a folder's model are not for changing.
                can_change = field in {one.name for one in fields(parts[part])}
                raise ValueError(
                    f"{grid.flag(axis)} {ranks} does not divide the model's {name}, which is "
                    f"{size}: change it" + (f", or --override {name}" if can_change else "")
                )
        adapter.check_stages(config, grid.pp)
        axes: tuple[Axis, ...] = ("tp", "cp", "ep", "expt_tp")
        adapter.check_sizes(
            config,
            {axis: grid.flag(axis) for axis in axes},
            {axis: getattr(grid, axis) for axis in axes},
        )


def check_sequence(layout: Layout, architecture: ModelConfig, filled: TrainConfig) -> None:
    """Refuse sequences that do not divide evenly, and experts without sequence parallelism.

    Raises:
        ValueError: One of these is given; the message names the flags.
    """
    llm = layout.target
    if filled.grids.sequence_parallel and llm.tp == 1:
        raise ValueError(
            f"--sequence-parallel shards along {llm.flag('tp')}, which is 1: raise it, or leave "
            f"--sequence-parallel out"
        )
    divides = language_adapter(architecture.target).sequence_parallel
    if filled.grids.sequence_parallel and not divides:
        raise ValueError(
            "--sequence-parallel: this language model's forward takes whole sequences; leave it out"
        )
    if divides and _has_experts(architecture) and llm.tp > 1 and not filled.grids.sequence_parallel:
        raise ValueError(
            f"--no-sequence-parallel with {llm.flag('tp')} {llm.tp}: experts need sequence "
            f"parallelism; leave it out, or set {llm.flag('tp')} 1"
        )
    SequenceSharding(
        seq_length=filled.model.seq_length,
        cp=llm.cp,
        tp=llm.tp,
        sequence_parallel=bool(filled.grids.sequence_parallel),
        packed=filled.data.packing_buffer_size is not None,
    )
