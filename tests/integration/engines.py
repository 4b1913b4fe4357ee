"""Small runners for tests that train on ranks."""

from megatron_mimo.topology import Layout, ModuleGridSpec

SEQ_LENGTH = 64


def layout(encoder: dict[str, int] | None, llm: dict[str, int]) -> Layout:
    """A layout whose world is as large as its grids need."""
    grids = [] if encoder is None else [ModuleGridSpec(name="encoder", **encoder)]
    grids.append(ModuleGridSpec(name="llm", **llm))
    return Layout.of(*grids, world_size=max(grid.ranks.stop for grid in grids))


def beside(encoder: dict[str, int], llm: dict[str, int]) -> Layout:
    """Disjoint grids, the encoder first."""
    return layout(encoder, llm | {"offset": ModuleGridSpec(name="encoder", **encoder).size})


def small_runner(
    chosen,
    *,
    lr=1e-3,
    steps=20,
    run_ahead=1,
    check_bridge=False,
    correct=False,
    scale=None,
    device=None,
    **model,
):
    """This rank's runner over a narrow mock model; other arguments are those of `small_parts`."""
    from megatron_mimo.data import ByteTokenizer
    from megatron_mimo.optim.config import AdamConfig, LossScaleConfig, ScheduleConfig
    from megatron_mimo.runtime import Device
    from megatron_mimo.training.runner import StepConfig, build_runner

    return build_runner(
        chosen,
        *small_parts(**model),
        AdamConfig(
            lr=lr,
            min_lr=lr / 10,
            weight_decay=0.1,
            beta1=0.9,
            beta2=0.95,
            eps=1e-8,
            clip_grad=1.0,
            loss_scale=scale and LossScaleConfig(**scale),
        ),
        ScheduleConfig(style="cosine", warmup_samples=16, decay_samples=steps * 8),
        StepConfig(
            placeholder_ids=ByteTokenizer().placeholder_ids,
            run_ahead=run_ahead,
            check_bridge=check_bridge,
            correct_participation=correct,
        ),
        device=device or Device("cpu"),
    )


def small_model(topology, **model):
    """This rank's modules of the narrow mock model."""
    from megatron_mimo.model.mimo import build_model
    from megatron_mimo.runtime import Device

    return build_model(*small_parts(**model), topology, Device("cpu"))


def small_parts(
    *,
    freeze=None,
    sequence_parallel=True,
    bf16=False,
    fp16=False,
    tied_embeddings=False,
    seq_length=SEQ_LENGTH,
    provider="mock",
    overrides=("language.hidden_size=64", "vision.hidden_size=64"),
    recompute=None,
    reduce=None,
    init="topology-invariant",
    lora=None,
):
    """Architecture, what is frozen, and how to build."""
    import torch

    from megatron_mimo.config.presets import model_config
    from megatron_mimo.data import ByteTokenizer
    from megatron_mimo.model.config import Frozen, ReduceConfig
    from megatron_mimo.model.mimo import BuildConfig
    from megatron_mimo.modules.language import ExecutionConfig
    from megatron_mimo.modules.lora.config import Lora

    architecture = model_config(
        provider,
        [
            *overrides,
            f"language.share_embeddings_and_output_weights={str(tied_embeddings).lower()}",
        ],
    )
    build = BuildConfig(
        params_dtype=torch.float16 if fp16 else torch.bfloat16 if bf16 else torch.float32,
        seed=7,
        init=init,
        vocab_size=ByteTokenizer.vocab_size,
        seq_length=seq_length,
        sequence_parallel=sequence_parallel,
        execution=ExecutionConfig(
            recompute_granularity=recompute and recompute[0],
            recompute_modules=recompute[1:] if recompute else (),
        ),
        reduce=ReduceConfig(**(reduce or {})),
        lora=lora and Lora(**lora),
    )
    return architecture, freeze or Frozen(), build


def mock_data(*, text_only_fraction=0.0, micro_batch_size=1, global_batch_size=8):
    """Settings of mock samples that fit the small engine."""
    from megatron_mimo.config.presets import model_config
    from megatron_mimo.data import DataConfig
    from megatron_mimo.media.images import ImageInput

    return DataConfig(
        seed=7,
        seq_length=SEQ_LENGTH,
        micro_batch_size=micro_batch_size,
        global_batch_size=global_batch_size,
        text_only_fraction=text_only_fraction,
        inputs={"encoder": ImageInput(config=model_config("mock").part("vision").image_config())},
    )


def micro_batch_size(chosen, global_batch_size):
    """For two microbatches of a lane, three where stages form a pipeline.

    In models so small a microbatch takes as long whatever its size, and each collective of a
    tensor-parallel layer costs a change of process on two cores.
    """
    stages = [grid.pp for grid in chosen.modules.values()]
    wanted = 3 if max(stages) > 1 else 2
    return max(1, global_batch_size // chosen.target.dp // wanted)


def mock_loader(chosen, config):
    """This rank's training samples."""
    import torch.distributed as dist

    from megatron_mimo.data import ByteTokenizer, build_train_loader, data_role

    return build_train_loader(config, data_role(chosen, dist.get_rank()), ByteTokenizer())


def list_loader(chosen, *, seq_length, micro_batch_size, global_batch_size):
    """Samples of which every other has no image, and the others two of 240 and 260 rows."""
    import numpy as np
    import torch.distributed as dist

    from megatron_mimo.config.presets import model_config
    from megatron_mimo.data import ByteTokenizer, DataConfig, RawSample, data_role
    from megatron_mimo.data.loader.stream_loader import build_list_loader
    from megatron_mimo.media.images import ImageInput

    config = DataConfig(
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        global_batch_size=global_batch_size,
        # Patches of 8 x 8 pixels, four to a row.
        inputs={
            "encoder": ImageInput(
                config=model_config("mock").part("vision").image_config(max_patches=2000)
            )
        },
    )
    random = np.random.default_rng(3)
    samples = [
        RawSample.asking(key=f"text-{i}", question=f"say {i}", answer=f"it is {i}")
        if i % 2
        else RawSample.asking(
            key=f"image-{i}",
            question="<image><image> what?",
            answer=f"this is {i}",
            items={
                "encoder": tuple(
                    random.integers(0, 256, (320, width, 3), dtype=np.uint8) for width in (192, 208)
                )
            },
        )
        for i in range(8)
    ]
    return build_list_loader(samples, config, data_role(chosen, dist.get_rank()), ByteTokenizer())


def shared_loader(chosen, config, runner, build, *, window=1, validate=True):
    """A loader as a run has it: one rank of a replica reads ahead, and items are shared out.

    Close it after the last step.

    Args:
        chosen: Grids of the run.
        config: Settings of the data.
        runner: This rank's runner.
        build: Function of (role, dispatcher) that returns this rank's `StreamLoader`.
        window: Number of microbatches that are balanced together.
        validate: Whether readers of a lane are compared by the agreement.
    """
    import torch.distributed as dist

    from megatron_mimo.bridge.plan import BridgePlanner
    from megatron_mimo.data import data_role
    from megatron_mimo.data.loader.balanced import BalanceConfig, build_dispatcher
    from megatron_mimo.data.loader.share import SharedLoader, build_reading_group

    rank = dist.get_rank()
    roles = [data_role(chosen, each) for each in range(chosen.world_size)]
    readers = build_reading_group(roles, rank)
    planners = {
        source.name: BridgePlanner(chosen, source.name, runner.model.sharding)
        for source in chosen.sources
    }
    dispatcher = build_dispatcher(
        chosen,
        roles,
        rank,
        config.inputs,
        BalanceConfig(
            # Attention is quadratic.
            costs={
                name: lambda lengths, rows: sum(n * n + 100 * n for n in lengths) + rows
                for name in planners
            },
            window=window,
            count_rows={
                name: planner.network_rows
                for name, planner in planners.items()
                if planner.needs_network_rows
            },
            validate=validate,
            describe=chosen.describe_rank,
        ),
    )
    source = build(roles[rank], dispatcher) if readers.reads else None
    loader = SharedLoader(source, readers, inputs=config.inputs)
    loader.prepare_ahead(runner.inputs.prepare)
    return loader
