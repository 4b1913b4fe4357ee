"""A training step as megatron-core runs several modules: its models, schedule and optimizer.

Nothing of ours takes part but the groups, which are built from the same grids, and the projector,
so that both run the same layers. Attention is megatron-core's own; a host has no other of theirs.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.mimo.config import MimoModelConfig
from megatron.core.models.mimo.config.role import MIMO_LANGUAGE_MODULE_KEY
from megatron.core.models.mimo.model.base import MimoModel
from megatron.core.models.mimo.optimizer import get_mimo_optimizer
from megatron.core.models.mimo.submodules.vision import VisionModalitySubmodules
from megatron.core.optimizer import OptimizerConfig
from megatron.core.pipeline_parallel.multimodule_communicator import MultiModulePipelineCommunicator
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_pipelining_without_interleaving,
)
from megatron.core.process_groups_config import MultiModuleProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from benchlib.ranks import gloo_for_nccl
from megatron_mimo.data.loader.batch import Microbatch
from megatron_mimo.media.images import PackedImages
from megatron_mimo.model.config import ModelConfig
from megatron_mimo.modules.projector.projector import Projector
from megatron_mimo.modules.radio.embedding import PatchEmbedding
from megatron_mimo.topology import Layout, ModuleGridSpec
from megatron_mimo.topology.groups import Topology

VISION = "vision"


def grid_of(spec: ModuleGridSpec) -> HyperCommGrid:
    """The grid of a module, with the groups that the bridge and the optimizer look for."""
    names = ["tp", "cp", "dp", "pp"]
    grid = HyperCommGrid([spec.tp, spec.cp, spec.dp, spec.pp], names, rank_offset=spec.offset)
    grid.register_view(
        "expert",
        [1, 1, spec.tp * spec.cp * spec.dp, spec.pp],
        ["expt_tp", "ep", "expt_dp", "pp"],
        shared_dims=["pp"],
    )
    for dims in (["tp"], ["cp"], ["dp"], ["pp"], ["dp", "cp"], ["tp", "pp"], names):
        grid.create_pg(dims)
    grid.create_pg(["expt_tp", "ep", "pp"], view="expert")
    grid.create_pg(["expt_dp"], view="expert")
    return grid


def communicator(layout: Layout, config: Any) -> Any:
    """The peer's communicator over both modules, and its grids by name."""
    with gloo_for_nccl():
        grids = {
            VISION: grid_of(layout.modules["encoder"]),
            MIMO_LANGUAGE_MODULE_KEY: grid_of(layout.target),
        }
        made = MultiModulePipelineCommunicator(
            grids,
            {VISION: [MIMO_LANGUAGE_MODULE_KEY], MIMO_LANGUAGE_MODULE_KEY: []},
            config,
            dim_mapping={"s": 0, "b": 1, "h": 2},
            module_output_ndim={VISION: 2},
        )
    return made


def groups_of(topology: Topology) -> MultiModuleProcessGroupCollection:
    """The groups of the module that this rank holds, as the schedule wants them."""
    if "encoder" in topology.modules:
        return MultiModuleProcessGroupCollection(
            {VISION: topology.modules["encoder"].pg_collection}
        )
    assert topology.target is not None
    groups = {MIMO_LANGUAGE_MODULE_KEY: topology.target.pg_collection}
    return MultiModuleProcessGroupCollection(
        groups, language_model_module_name=MIMO_LANGUAGE_MODULE_KEY
    )


class PeerVit(nn.Module):
    """Patches to rows, as `RadioVit`, over images of one size batched instead of packed."""

    def __init__(self, config: Any, pg_collection: Any) -> None:
        super().__init__()
        width = config.hidden_size
        self.row_size = config.row_size
        self.embedding = PatchEmbedding(config, torch.float32)
        self.config = _config(
            pg_collection,
            num_layers=config.num_layers,
            hidden_size=width,
            num_attention_heads=config.num_attention_heads,
            ffn_hidden_size=config.ffn_hidden_size,
        )
        spec = get_gpt_layer_local_spec()
        spec.submodules.self_attention.params = {"attn_mask_type": AttnMaskType.no_mask}
        self.decoder = TransformerBlock(self.config, spec, pg_collection=pg_collection)

    def forward(self, images: PackedImages) -> Tensor:
        """Map packed images to rows [R, k*H]."""
        x = self.embedding(images)
        x = self.decoder(
            x.view(len(images.lengths), -1, x.shape[1]).transpose(0, 1), attention_mask=None
        )
        rows: Tensor = x.transpose(0, 1).flatten(0, 1)[images.row_index].view(-1, self.row_size)
        return rows


class PeerStep:
    """Runs steps over given microbatches."""

    def __init__(
        self,
        topology: Topology,
        architecture: ModelConfig,
        *,
        vocab_size: int,
        seq_length: int,
        image_token_id: int,
        optimizer: OptimizerConfig,
    ) -> None:
        layout = topology.layout
        self._topology = topology
        language = architecture.part("language")
        # Every rank wants the language model's settings, also those without it.
        config = _config(
            topology.target.pg_collection if topology.target is not None else None,
            num_layers=language.num_layers,
            hidden_size=language.hidden_size,
            num_attention_heads=language.num_attention_heads,
            num_query_groups=language.num_query_groups,
            ffn_hidden_size=language.ffn_hidden_size,
        )
        config.finalize_model_grads_func = self._finalize
        self._communicator = communicator(layout, config)
        self.model = self._build(config, architecture, vocab_size, seq_length, image_token_id)
        self._optimizer = get_mimo_optimizer(self.model, optimizer)
        self._groups = groups_of(topology)
        self._tokens = 1
        self.loss = 0.0

    def run(self, microbatches: Sequence[Microbatch], tokens: int) -> None:
        """One step: forward, backward, reduce, clip, update."""
        self._tokens = tokens
        self.model.zero_grad_buffer()
        self._optimizer.zero_grad()
        losses = forward_backward_pipelining_without_interleaving(
            forward_step_func=self._forward_step,
            data_iterator=iter(microbatches),
            model=self.model,
            num_microbatches=len(microbatches),
            seq_length=1,
            micro_batch_size=1,
            p2p_communicator=self._communicator,
            pg_collection=self._groups,
        )
        self._optimizer.step()
        self.loss = sum(float(loss) for loss in losses) / tokens

    def _build(
        self,
        config: TransformerConfig,
        architecture: ModelConfig,
        vocab_size: int,
        seq_length: int,
        image_token_id: int,
    ) -> MimoModel:
        topology = self._topology
        projector = architecture.part("projector")
        vision_groups = (
            topology.modules["encoder"].pg_collection if "encoder" in topology.modules else None
        )
        model = MimoModel(
            MimoModelConfig(
                language_model_spec=ModuleSpec(
                    module=GPTModel,
                    params={
                        "config": config,
                        "transformer_layer_spec": get_gpt_layer_local_spec(),
                        "vocab_size": vocab_size,
                        "max_sequence_length": seq_length,
                        "position_embedding_type": "rope",
                        "pg_collection": topology.target.pg_collection if topology.target else None,
                    },
                ),
                modality_submodules_spec={
                    VISION: ModuleSpec(
                        module=VisionModalitySubmodules,
                        params={"pg_collection": vision_groups},
                        submodules={
                            "encoders": {
                                "vit": ModuleSpec(
                                    module=PeerVit,
                                    params={
                                        "config": architecture.part("vision"),
                                        "pg_collection": vision_groups,
                                    },
                                )
                            },
                            "input_projections": [
                                ModuleSpec(
                                    module=Projector,
                                    params={
                                        "config": projector,
                                        "input_size": architecture.part("vision").row_size,
                                        "output_size": architecture.part("language").hidden_size,
                                        "pg_collection": vision_groups,
                                        "params_dtype": torch.float32,
                                    },
                                )
                            ],
                        },
                    )
                },
                special_token_ids={VISION: image_token_id},
                module_to_grid_map=self._communicator.module_to_grid_map,
            )
        )
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=True, check_for_nan_in_grad=False
        )
        if topology.target is not None:
            model.language_model = DistributedDataParallel(
                config, ddp, model.language_model, pg_collection=topology.target.pg_collection
            )
        if "encoder" in topology.modules:
            vision = model.modality_submodules[VISION]
            model.modality_submodules[VISION] = DistributedDataParallel(
                vision.encoders["vit"].config, ddp, vision, pg_collection=vision_groups
            )
        return model

    def _forward_step(self, data: Any, model: MimoModel) -> tuple[Any, Callable[..., Any]]:
        drawn: Microbatch = next(data)
        text, images = drawn.text, drawn.inputs.get("encoder")
        output, _ = model(
            input_ids=None if text is None else text.input_ids,
            position_ids=None if text is None else text.position_ids,
            labels=None if text is None else text.labels,
            modality_inputs=None if images is None else {VISION: {"vit": {"images": images}}},
        )

        def loss(losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            assert text is not None
            total = (losses.float() * text.loss_mask).sum()
            return total, text.loss_mask.sum().int(), total.detach().clone()

        return output, loss

    def _finalize(self, *_: Any, **__: Any) -> None:
        for groups, module in (
            (self._topology.modules.get("encoder"), self.model.modality_submodules),
            (self._topology.target, {VISION: self.model.language_model}),
        ):
            if groups is not None:
                finalize_model_grads([module[VISION]], pg_collection=groups.pg_collection)
                module[VISION].scale_gradients(1.0 / self._tokens)


def _config(pg_collection: Any, **architecture: Any) -> TransformerConfig:
    return TransformerConfig(
        tensor_model_parallel_size=1 if pg_collection is None else pg_collection.tp.size(),
        pipeline_dtype=torch.float32,
        variable_seq_lengths=True,
        # The peer asks for this with variable lengths, experts or not.
        moe_token_dispatcher_type="alltoall",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        calculate_per_token_loss=True,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        **architecture,
    )
