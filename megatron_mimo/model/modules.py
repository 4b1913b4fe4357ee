"""The two modules of the model, each as one torch module that DDP can wrap."""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_mimo.encoders.projector import Projector
from megatron_mimo.encoders.vit import PackedVit
from megatron_mimo.language.gpt import build_gpt
from megatron_mimo.model.config import FreezeConfig, ModelConfig
from megatron_mimo.model.initialize import transformer_std
from megatron_mimo.model.merge import merge_rows


class EncoderModule(MegatronModule):
    """Vision encoder and projector: packed images in, rows of the language model's width out."""

    def __init__(
        self,
        config: ModelConfig,
        freeze: FreezeConfig,
        pg_collection: ProcessGroupCollection,
        params_dtype: torch.dtype,
    ) -> None:
        vision = PackedVit(config.vision, pg_collection, params_dtype)
        super().__init__(config=vision.config)
        self.architecture = config
        self.vision = vision
        self.projector = Projector(
            config.projector,
            config.vision.row_size,
            config.language.hidden_size,
            pg_collection,
            params_dtype,
        )
        self.vision.requires_grad_(not freeze.vision)
        self.projector.requires_grad_(not freeze.projector)

    def initial_std(self, name: str) -> float:
        """Standard deviation of an initial weight, for `initialize_topology_invariant`."""
        if name.startswith("projector."):
            return self.architecture.projector.init_method_std
        vision = self.architecture.vision
        if name.startswith(("vision.row_embedding.", "vision.column_embedding.")):
            return vision.position_init_std
        return transformer_std(name, vision.init_method_std, vision.num_layers)

    def forward(
        self,
        patches: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        row_index: Tensor,
    ) -> Tensor:
        """Encode packed images (see `PackedVit.forward`) to rows [R, H_llm]."""
        rows: Tensor = self.projector(
            self.vision(patches, positions, cu_seqlens, max_seqlen, row_index)
        )
        return rows


class LanguageModule(MegatronModule):
    """Language model that takes rows at its image tokens."""

    def __init__(
        self,
        config: ModelConfig,
        freeze: FreezeConfig,
        pg_collection: ProcessGroupCollection,
        params_dtype: torch.dtype,
        *,
        vocab_size: int,
        seq_length: int,
        sequence_parallel: bool,
    ) -> None:
        model = build_gpt(
            config.language,
            vocab_size=vocab_size,
            seq_length=seq_length,
            pg_collection=pg_collection,
            params_dtype=params_dtype,
            sequence_parallel=sequence_parallel,
        )
        super().__init__(config=model.config)
        self.architecture = config.language
        self.model = model
        self.tp_group = pg_collection.tp
        self.requires_grad_(not freeze.language)

    def initial_std(self, name: str) -> float:
        """Standard deviation of an initial weight, for `initialize_topology_invariant`."""
        return transformer_std(
            name, self.architecture.init_method_std, self.architecture.num_layers
        )

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        rows: Tensor | None,
        positions: Tensor,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Per-token losses, or logits when there are no labels.

        Args:
            input_ids: int64 [B, S].
            position_ids: int64 [B, S].
            rows: [R, H], rows of the image tokens, sample by sample; None without images.
            positions: int64 [R], where they go (`row_positions`).
            labels: int64 [B, S], target of each position.

        Returns:
            With labels: float32 [B, S], cross entropy of each position. Without: this tp rank's
            shard of the logits, [B, S, V/tp].
        """
        # The embedding is [S, B, H] here: the whole sequence, also under sequence parallelism.
        embeddings = self.model.embedding(input_ids=input_ids, position_ids=position_ids)
        if rows is not None:
            embeddings = merge_rows(embeddings, rows, positions)
        if self.config.sequence_parallel:
            embeddings = scatter_to_sequence_parallel_region(embeddings, group=self.tp_group)
        output: Tensor = self.model(
            input_ids, position_ids, attention_mask=None, decoder_input=embeddings, labels=labels
        )
        return output
