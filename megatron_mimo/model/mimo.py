"""The multimodal model of one rank: the modules it holds, ready to train."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_mimo.model.config import Frozen, ModelConfig, ReduceConfig, unknown
from megatron_mimo.model.flow import gradient_flow
from megatron_mimo.model.fully_sharded import FullySharded
from megatron_mimo.model.initialize import initialize_lora, initialize_topology_invariant
from megatron_mimo.modules.adapter import BuildContext, ModuleConfig
from megatron_mimo.modules.families import adapter_of
from megatron_mimo.modules.language import ExecutionConfig
from megatron_mimo.modules.lora.apply import add_lora, base_names
from megatron_mimo.modules.lora.config import Lora
from megatron_mimo.modules.stage import ModuleStage
from megatron_mimo.runtime import Device, seed_everything
from megatron_mimo.schedule.graph import GradientFlow
from megatron_mimo.topology import Layout, SequenceSharding
from megatron_mimo.topology.groups import ModuleGroups, Topology

_LEAST_BUCKET, _LEAST_BUCKET_SHARE = 40_000_000, 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildConfig:
    """Settings that building a model needs beyond its architecture.

    Attributes:
        params_dtype: Dtype of parameters, activations and rows.
        seed: Seed of the run.
        init: Kind of initial weights: "megatron" draws them from the rank's random stream,
            "topology-invariant" draws each from (seed, name), whatever the layout.
        vocab_size: Number of tokens of the vocabulary, V.
        seq_length: Number of positions of a sequence, S.
        sequence_parallel: Whether the language model's tp ranks divide the sequence among them.
        packed: Whether the sequences of training are packed.
        execution: Recomputation, grouping and fusing in the language model.
        reduce: Times at which its data-parallel ranks exchange gradients and weights.
        lora: Adapters that train in place of weights; None for none.
    """

    params_dtype: torch.dtype
    seed: int
    init: str
    vocab_size: int
    seq_length: int
    sequence_parallel: bool
    packed: bool = False
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    reduce: ReduceConfig = field(default_factory=ReduceConfig)
    lora: Lora | None = None


class Wrapper(Protocol):
    """A module with what sums the gradients of its replicas."""

    def __call__(self, *args: Any, **named: Any) -> Any:
        """Run the module's forward."""

    def train(self, mode: bool = True) -> Any:
        """Switch between training and evaluation."""

    def zero_grad_buffer(self) -> None:
        """Clear the gradients for the next step."""

    def scale_gradients(self, factor: float) -> None:
        """Multiply every gradient."""


class ModuleReplica:
    """One module on this rank, wrapped for data parallelism where it trains.

    Attributes:
        groups: Process groups of the module.
        module: Stage without the wrapper for data parallelism.
        config: Architecture of the module.
        prefixes: Beginning of a weight's name in the stage -> its beginning in checkpoints.
        left_out: Beginnings of the names of weights that checkpoints leave out, as a run with
            adapters does not change them.
        trains: Whether the module trains on this rank, or would with adapters of other layers.
        ddp: Wrapper with the gradient buffers; None when no part of the module trains, or its
            replicas divide it.
        sharded: Wrapper of a module that its replicas divide; None where each holds it whole.
    """

    def __init__(
        self,
        groups: ModuleGroups,
        module: ModuleStage,
        config: ModuleConfig,
        prefixes: Mapping[str, str],
        reduce: ReduceConfig | None = None,
        left_out: tuple[str, ...] = (),
        *,
        adapted: bool = False,
        sharded: FullySharded | None = None,
    ) -> None:
        self.groups = groups
        self.module = module
        self.config = config
        self.prefixes = prefixes
        self.left_out = left_out
        self.sharded = sharded
        self.ddp = None if sharded else _wrap(groups, module, reduce or ReduceConfig())
        # Experts' balance has gradients in all stages of a module with adapters, or in none.
        self.trains = adapted or self.wrapper is not None
        self.train()

    @property
    def name(self) -> str:
        """Name of the module."""
        return self.groups.spec.name

    @property
    def wrapper(self) -> Wrapper | None:
        """What sums the gradients of replicas; None when no part of the module trains."""
        return self.ddp or self.sharded

    @property
    def gradient_buffers(self) -> list[Tensor]:
        """Flat buffers, float32 [n], that gradients are summed in; none where no part trains."""
        if self.sharded is not None:
            return [weight.main for weight in self.sharded.weights]
        if self.ddp is None:
            return []
        buffers = self.ddp.buffers + self.ddp.expert_parallel_buffers
        return [buffer.grad_data for buffer in buffers]

    def __call__(self, *args: Any, **named: Any) -> Tensor:
        """Run the stage's forward; shapes [N, width] and dtypes are those of `ModuleStage`.

        Raises:
            RuntimeError: The stage returns something other than a tensor.
        """
        output = (self.wrapper or self.module)(*args, **named)
        if not isinstance(output, Tensor):
            # Passed on, it would look like a microbatch without rows, which peers wait for.
            raise RuntimeError(
                f"module {self.name} returned {type(output).__name__}: expected a tensor, its rows "
                f"or hidden states"
            )
        return output

    def zero_grad(self) -> None:
        """Clear the gradient buffers for the next step; its backward does not reduce them yet."""
        if self.wrapper is not None:
            self.wrapper.zero_grad_buffer()
            self._reduce_in_backward(False)

    def begin_last_backward(self) -> None:
        """Let backward reduce gradients as they become ready, where this is to overlap."""
        self._reduce_in_backward(True)

    def _reduce_in_backward(self, value: bool) -> None:
        if self.ddp is None:
            return  # A divided module reduces in every backward.
        for group in self.ddp.bucket_groups + self.ddp.expert_parallel_bucket_groups:
            group.is_last_microbatch = value

    def train(self, mode: bool = True) -> None:
        """Switch between training and evaluation; a frozen module stays in evaluation."""
        (self.wrapper or self.module).train(mode and self.trains)


@dataclass(frozen=True, kw_only=True, slots=True)
class MimoModel:
    """The modules that this rank holds.

    Attributes:
        modules: The modules by name, in the order of the layout.
        target_name: Name of the language model, whether or not this rank holds it.
        flow: Boundaries that gradients cross.
        trains: Whether any part of the language model trains.
        row_width: Width of a row on a bridge.
        row_dtype: Dtype of rows.
        device: Device of the tensors.
        sharding: Positions of a sequence that each rank of the language model holds.
        lora: Adapters that train in place of weights; None for none.
    """

    modules: Mapping[str, ModuleReplica]
    target_name: str
    flow: GradientFlow
    trains: bool
    row_width: int
    row_dtype: torch.dtype
    device: torch.device
    sharding: SequenceSharding
    lora: Lora | None = None

    @property
    def target(self) -> ModuleReplica | None:
        """The language model; None outside its grid."""
        return self.modules.get(self.target_name)

    @property
    def replicas(self) -> tuple[ModuleReplica, ...]:
        """The modules of this rank, in the order of the layout."""
        return tuple(self.modules.values())

    def train(self, mode: bool = True) -> None:
        """Switch every module between training and evaluation."""
        for replica in self.replicas:
            replica.train(mode)


def sequence_sharding(layout: Layout, build: BuildConfig) -> SequenceSharding:
    """Positions of a sequence that each rank of the language model holds.

    Args:
        layout: The grids of all modules.
        build: Further settings of the modules.

    Raises:
        ValueError: The sequence does not divide evenly.
    """
    target = layout.target
    return SequenceSharding(
        seq_length=build.seq_length,
        cp=target.cp,
        tp=target.tp,
        sequence_parallel=build.sequence_parallel and target.tp > 1,
        packed=build.packed,
    )


def build_model(
    config: ModelConfig,
    frozen: Frozen,
    build: BuildConfig,
    topology: Topology,
    device: Device,
) -> MimoModel:
    """Build, initialise and wrap the modules of this rank.

    Collective over each module's grid.

    Args:
        config: Architecture of every module.
        frozen: Names of the parts that do not train.
        build: Further settings of the modules.
        topology: Groups of the modules that this rank holds.
        device: Device of the modules.

    Raises:
        ValueError: A grid has no module, the model has no such part, every part is frozen, or a
            size does not divide by a parallel size.
    """
    layout = topology.layout
    _check(config, frozen, layout)
    target, sources = layout.target, [source.name for source in layout.sources]
    sharding = sequence_sharding(layout, build)
    prefixes, built = config.prefixes(lora=build.lora is not None), {}
    # The language model comes last.
    for name in (*sources, target.name):
        groups, architecture = topology.modules.get(name), config.modules[name]
        if groups is None:
            continue
        _seed(groups, build.seed)
        divides = name == target.name and build.reduce.sharding == "fsdp2"
        context = BuildContext(
            pg_collection=groups.pg_collection,
            params_dtype=build.params_dtype,
            frozen=config.frozen_in(name, frozen),
            row_width=config.row_width,
            vocab_size=build.vocab_size,
            seq_length=build.seq_length,
            sequence_parallel=build.sequence_parallel,
            execution=build.execution,
            without_memory=divides,
        )
        with device.building:
            module = adapter_of(architecture).build(architecture, context)
        if not isinstance(module, ModuleStage):
            raise ValueError(
                f"module {name}: {type(adapter_of(architecture)).__name__}.build returned "
                f"{type(module).__name__}: expected a ModuleStage"
            )
        _initialize(module, name, build, groups)
        left_out: tuple[str, ...] = ()
        if build.lora is not None:
            left_out = _add_lora(module, name, config, frozen, build, groups)
        reduce = build.reduce if name == target.name else None
        sharded = None
        if divides:
            sharded = FullySharded(module, groups.pg_collection.dp_cp, device)
        else:
            module.to(device.torch)
        built[name] = ModuleReplica(
            groups,
            module,
            architecture,
            prefixes[name],
            reduce,
            left_out,
            adapted=build.lora is not None and bool(config.of_module(name, build.lora.targets)),
            sharded=sharded,
        )
    return MimoModel(
        modules={name: built[name] for name in topology.modules},
        target_name=target.name,
        flow=gradient_flow(config, frozen, sources),
        trains=config.trains(target.name, frozen),
        row_width=config.row_width,
        row_dtype=build.params_dtype,
        device=device.torch,
        sharding=sharding,
        lora=build.lora,
    )


def _check(config: ModelConfig, frozen: Frozen, layout: Layout) -> None:
    """Refuse grids without a module, and a model of which no part trains."""
    for name in layout.modules:
        if name not in config.modules:
            raise ValueError(f"grid {name!r} has no module: {unknown(name, config.modules)}")
    if layout.target.name != config.target_name:
        raise ValueError(
            f"grid {layout.target.name!r} is fed by the others, the model's last module is "
            f"{config.target_name!r}: expected the same"
        )
    if not any(config.trains(name, frozen) for name in layout.modules):
        raise ValueError(
            f"nothing trains: {', '.join(sorted(frozen))} "
            f"{'is' if len(frozen) == 1 else 'are'} frozen; drop one of --freeze-lm, --freeze-vit, "
            f"--freeze-projection, --freeze, or choose another --training-stage"
        )


def _seed(groups: ModuleGroups, seed: int) -> None:
    place = groups.place
    seed_everything(
        seed,
        tp_rank=place.tp,
        pp_rank=place.pp,
        dp_rank=place.dp,
        ep_rank=place.ep,
        expt_tp_rank=place.expt_tp,
    )


def _initialize(module: ModuleStage, name: str, build: BuildConfig, groups: ModuleGroups) -> None:
    if build.init == "topology-invariant":
        initialize_topology_invariant(
            module,
            name=name,
            seed=build.seed,
            initial=module.initial,
            initial_name=module.initial_name,
            tp_group=groups.pg_collection.tp,
            expt_tp_group=groups.pg_collection.expt_tp,
            first_expert=groups.place.ep * module.experts_per_rank,
        )


def _add_lora(
    module: ModuleStage,
    name: str,
    config: ModelConfig,
    frozen: Frozen,
    build: BuildConfig,
    groups: ModuleGroups,
) -> tuple[str, ...]:
    """Give a module its adapters; the beginnings of names that a checkpoint leaves out."""
    lora, group = build.lora, groups.pg_collection.tp
    assert lora is not None
    targets = config.of_module(name, lora.targets)
    add_lora(module, lora, targets, group)
    initialize_lora(module, name=name, seed=build.seed, tp_group=group)
    return base_names(module, config.frozen_in(name, frozen) | targets.keys())


def _wrap(
    groups: ModuleGroups, module: ModuleStage, reduce: ReduceConfig
) -> DistributedDataParallel | None:
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not trainable:
        return None
    dp_size = groups.pg_collection.dp_cp.size()
    bucket_size = _bucket_size(reduce, sum(map(torch.numel, trainable)), dp_size)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=reduce.overlap_grads,
        overlap_param_gather=reduce.overlap_params,
        bucket_size=bucket_size,
        pad_buckets_for_high_nccl_busbw=reduce.pad_buckets,
        use_distributed_optimizer=True,
        check_for_nan_in_grad=False,
    )
    layout = DistributedOptimizer.compute_full_param_layout(
        trainable,
        bucket_size,
        dp_size,
        ddp_config,
        expert_data_parallel_world_size=groups.pg_collection.expt_dp.size(),
    )
    ddp = DistributedDataParallel(
        module.config,
        ddp_config,
        module,
        pg_collection=groups.pg_collection,
        full_param_layout=layout,
    )
    ddp.broadcast_params()
    return ddp


def _bucket_size(reduce: ReduceConfig, num_weights: int, dp_size: int) -> int | None:
    """Smallest number of weights of a bucket; None for one bucket, where nothing overlaps."""
    if not reduce.overlap_grads:
        return None
    if reduce.num_buckets is not None:
        return max(1, num_weights // reduce.num_buckets)
    if reduce.bucket_size is not None:
        return reduce.bucket_size
    # As megatron-core chooses: collectives over many ranks need more to be efficient.
    return max(_LEAST_BUCKET, _LEAST_BUCKET_SHARE * dp_size)
