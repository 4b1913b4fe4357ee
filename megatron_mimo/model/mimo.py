"""The multimodal model of one rank: the modules it holds, ready to train."""

from dataclasses import dataclass, field

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_mimo.images import PackedImages
from megatron_mimo.language.config import ExecutionConfig
from megatron_mimo.model.config import FreezeConfig, ModelConfig, ReduceConfig
from megatron_mimo.model.initialize import initialize_topology_invariant
from megatron_mimo.model.modules import EncoderModule, LanguageModule
from megatron_mimo.runtime import Device, seed_everything
from megatron_mimo.runtime.packed import PackedSegments
from megatron_mimo.topology import SequenceSharding
from megatron_mimo.topology.groups import ModuleGroups, Topology

_LEAST_BUCKET, _LEAST_BUCKET_SHARE = 40_000_000, 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildConfig:
    """What building a model needs beyond its architecture.

    Attributes:
        params_dtype: Dtype of parameters, activations and rows.
        seed: Run seed.
        init: "megatron" draws weights from the rank's random stream; "topology-invariant" draws
            each from (seed, name), whatever the layout.
        vocab_size: V.
        seq_length: S.
        sequence_parallel: In the language model, when its tp size is above one.
        execution: What of the language model is recomputed, grouped and fused.
        reduce: When its data-parallel ranks exchange gradients and weights.
    """

    params_dtype: torch.dtype
    seed: int
    init: str
    vocab_size: int
    seq_length: int
    sequence_parallel: bool
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    reduce: ReduceConfig = field(default_factory=ReduceConfig)


class ModuleReplica:
    """One module on this rank, wrapped for data parallelism where it trains.

    Attributes:
        groups: The module's groups.
        module: The bare module.
        ddp: Its gradient buffers; None when nothing in it trains.
    """

    def __init__(
        self,
        groups: ModuleGroups,
        module: EncoderModule | LanguageModule,
        reduce: ReduceConfig | None = None,
    ) -> None:
        self.groups = groups
        self.module = module
        self.ddp = _wrap(groups, module, reduce or ReduceConfig())

    def __call__(self, *args: Tensor | PackedImages | PackedSegments | None) -> Tensor:
        """Run the module's forward."""
        output: Tensor = (self.ddp or self.module)(*args)
        return output

    def zero_grad(self) -> None:
        """Clear the gradient buffers for the next step; no backward of it reduces them."""
        if self.ddp is not None:
            self.ddp.zero_grad_buffer()
            self._reduce_in_backward(False)

    def begin_last_backward(self) -> None:
        """From here on backward reduces what is ready, if it is to overlap."""
        if self.ddp is not None:
            self._reduce_in_backward(True)

    def _reduce_in_backward(self, value: bool) -> None:
        assert self.ddp is not None
        for group in self.ddp.bucket_groups + self.ddp.expert_parallel_bucket_groups:
            group.is_last_microbatch = value

    def train(self, mode: bool = True) -> None:
        """Switch between training and evaluation; a frozen module stays in evaluation."""
        (self.ddp or self.module).train(mode and self.ddp is not None)


@dataclass(frozen=True, slots=True)
class MimoModel:
    """The modules that this rank holds.

    Attributes:
        encoder: Vision encoder and projector; None outside the encoder's grid.
        language: Language model; None outside its grid.
        row_width: H of the language model, width of a row on the bridge.
        row_dtype: Dtype of a row.
        device: Where tensors live.
        encoder_trains: Whether gradients of rows go back over the bridge.
        sharding: Which positions of a sequence each rank of the language model holds.
    """

    encoder: ModuleReplica | None
    language: ModuleReplica | None
    row_width: int
    row_dtype: torch.dtype
    device: torch.device
    encoder_trains: bool
    sharding: SequenceSharding

    @property
    def replicas(self) -> tuple[ModuleReplica, ...]:
        """The modules of this rank, encoder first."""
        return tuple(replica for replica in (self.encoder, self.language) if replica is not None)

    def train(self, mode: bool = True) -> None:
        """Switch every module between training and evaluation."""
        for replica in self.replicas:
            replica.train(mode)


def build_model(
    config: ModelConfig,
    freeze: FreezeConfig,
    build: BuildConfig,
    topology: Topology,
    device: Device,
) -> MimoModel:
    """Build, initialise and wrap the modules of this rank.

    Collective over each module's grid.

    Raises:
        ValueError: Every part is frozen, or a size does not divide by a parallel size.
    """
    if freeze.language and not (topology.layout.encoder and freeze.encoder_trains):
        raise ValueError(
            "nothing trains: the language model"
            + (", the vision encoder and the projector are" if topology.layout.encoder else " is")
            + " frozen; drop one of --freeze-lm, --freeze-vit, --freeze-projection, or choose "
            "another --training-stage"
        )
    llm = topology.layout.llm
    sharding = SequenceSharding(
        seq_length=build.seq_length,
        cp=llm.cp,
        tp=llm.tp,
        sequence_parallel=build.sequence_parallel and llm.tp > 1,
    )
    encoder = language = None
    if topology.encoder is not None:
        _seed(topology.encoder, build.seed)
        encoder_module = EncoderModule(
            config, freeze, topology.encoder.pg_collection, build.params_dtype
        )
        _initialize(encoder_module, "encoder", build, topology.encoder)
        encoder = ModuleReplica(topology.encoder, encoder_module.to(device.torch))
    if topology.llm is not None:
        _seed(topology.llm, build.seed)
        language_module = LanguageModule(
            config,
            freeze,
            topology.llm.pg_collection,
            build.params_dtype,
            vocab_size=build.vocab_size,
            seq_length=build.seq_length,
            sequence_parallel=build.sequence_parallel,
            execution=build.execution,
        )
        _initialize(language_module, "llm", build, topology.llm)
        language = ModuleReplica(topology.llm, language_module.to(device.torch), build.reduce)
    return MimoModel(
        encoder=encoder,
        language=language,
        row_width=config.language.hidden_size,
        row_dtype=build.params_dtype,
        device=device.torch,
        encoder_trains=topology.layout.encoder is not None and freeze.encoder_trains,
        sharding=sharding,
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


def _initialize(
    module: EncoderModule | LanguageModule,
    name: str,
    build: BuildConfig,
    groups: ModuleGroups,
) -> None:
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


def _wrap(
    groups: ModuleGroups, module: EncoderModule | LanguageModule, reduce: ReduceConfig
) -> DistributedDataParallel | None:
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not trainable:
        module.eval()
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
    """Weights of a bucket, at least; None for a single one, where nothing overlaps."""
    if not reduce.overlap_grads:
        return None
    if reduce.num_buckets is not None:
        return max(1, num_weights // reduce.num_buckets)
    if reduce.bucket_size is not None:
        return reduce.bucket_size
    # As megatron-core chooses: collectives over many ranks need more to be efficient.
    return max(_LEAST_BUCKET, _LEAST_BUCKET_SHARE * dp_size)
