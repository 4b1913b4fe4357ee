"""The two modules of the model, each as one torch module that DDP can wrap."""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_mimo.encoders.projector import Projector
from megatron_mimo.encoders.radio.embedding import gather_rows
from megatron_mimo.encoders.radio.vit import RadioVit
from megatron_mimo.images import PackedImages
from megatron_mimo.language.build import build_language
from megatron_mimo.language.config import ExecutionConfig, HybridConfig
from megatron_mimo.language.hybrid import hybrid_initial
from megatron_mimo.model.config import FreezeConfig, ModelConfig
from megatron_mimo.model.initialize import transformer_initial
from megatron_mimo.model.merge import merge_rows
from megatron_mimo.runtime.packed import PackedSegments
from megatron_mimo.weights.initial import Draw, Normal

_EMBEDDING = "model.embedding.word_embeddings.weight"
_OUTPUT = "model.output_layer.weight"


class EncoderModule(MegatronModule):
    """A stage of vision encoder and projector: images in, rows of the language model's width out.

    The projector stands on the last stage.
    """

    def __init__(
        self,
        config: ModelConfig,
        freeze: FreezeConfig,
        pg_collection: ProcessGroupCollection,
        params_dtype: torch.dtype,
    ) -> None:
        vision = RadioVit(config.vision, pg_collection, params_dtype)
        super().__init__(config=vision.config)
        self.architecture = config
        self.vision = vision
        self.projector = (
            Projector(
                config.projector,
                config.vision.row_size,
                config.language.hidden_size,
                pg_collection,
                params_dtype,
            )
            if vision.is_last
            else None
        )
        if freeze.vision:
            self.vision.freeze()
        if self.projector is not None:
            self.projector.requires_grad_(not freeze.projector)

    @property
    def experts_per_rank(self) -> int:
        """Experts of an MoE layer that a rank holds; there are none."""
        return 0

    def initial(self, name: str) -> Draw | None:
        """What a weight is drawn from, for `initialize_topology_invariant`."""
        if name.startswith("projector."):
            std = self.architecture.projector.init_method_std
            return None if name.endswith(".bias") or ".norm." in name else Normal(std)
        vision = self.architecture.vision
        if name == "vision.embedding.position":
            return Normal(vision.position_init_std)
        return transformer_initial(name, vision.init_method_std, vision.num_layers)

    def initial_name(self, name: str) -> str:
        """The name that an initial weight is drawn by."""
        return name

    def forward(
        self,
        images: PackedImages,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """Encode packed images.

        Args:
            images: On this rank's device.
            hidden: [L, H], from the stage before; None on the first.

        Returns:
            Rows [R, H_llm]; before the last stage hidden states [L, H].
        """
        tokens: Tensor = self.vision(images, hidden)
        if self.projector is None:
            return tokens
        row_size = self.architecture.vision.row_size
        rows: Tensor = self.projector(gather_rows(tokens, images.row_index, row_size))
        return rows


class LanguageModule(MegatronModule):
    """A stage of the language model; the first takes rows at its image tokens."""

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
        execution: ExecutionConfig,
    ) -> None:
        model = build_language(
            config.language,
            vocab_size=vocab_size,
            seq_length=seq_length,
            pg_collection=pg_collection,
            params_dtype=params_dtype,
            sequence_parallel=sequence_parallel,
            execution=execution,
        )
        super().__init__(config=model.config)
        self.architecture = config.language
        self.model = model
        # megatron-core reduces the gradients of tied embeddings and looks for these.
        self.pre_process, self.post_process = model.pre_process, model.post_process
        self.share_embeddings_and_output_weights = model.share_embeddings_and_output_weights
        self.requires_grad_(not freeze.language)

    def shared_embedding_or_output_weight(self) -> Tensor:
        """The tied weight of this stage; megatron-core's name for it."""
        weight: Tensor = self.model.shared_embedding_or_output_weight()
        return weight

    @property
    def experts_per_rank(self) -> int:
        """Experts of an MoE layer that a rank holds."""
        experts: int = self.config.num_moe_experts or 0
        return experts // int(self.config.expert_model_parallel_size)

    def initial(self, name: str) -> Draw | None:
        """What a weight is drawn from, for `initialize_topology_invariant`."""
        if isinstance(self.architecture, HybridConfig):
            return hybrid_initial(name, self.architecture)
        return transformer_initial(
            name, self.architecture.init_method_std, self.architecture.num_layers
        )

    def initial_name(self, name: str) -> str:
        """The name that an initial weight is drawn by: the last stage's copy of a tied one's."""
        tied = self.share_embeddings_and_output_weights
        return _EMBEDDING if tied and name == _OUTPUT else name

    def forward(
        self,
        input_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs: Tensor | None,
        positions: Tensor | None,
        labels: Tensor | None = None,
        documents: PackedSegments | None = None,
    ) -> Tensor:
        """Per-token losses, logits when there are no labels, or hidden states.

        S is this cp rank's part of the sequence, s its shard of that under sequence parallelism.

        Args:
            input_ids: int64 [B, S]; None after the first stage.
            position_ids: int64 [B, S]; None after the first stage.
            inputs: On the first stage rows [R, H] of the shard's image tokens, None without
                images; on later stages the hidden states [s, B, H] of the stage before.
            positions: int64 [R], where the rows go (`row_positions`); needed with rows.
            labels: int64 [B, S], target of each position; None before the last stage.
            documents: Bounds of the documents of a packed sequence (`packed_documents`), which do
                not see each other; B is 1. The same on every stage.

        Returns:
            With labels: float32 [B, S], cross entropy of each position. Without: this tp rank's
            shard of the logits, [B, S, V/tp]. Before the last stage: hidden states [s, B, H].
        """
        embeddings = None
        if self.pre_process:
            embeddings = self.model.embedding(input_ids=input_ids, position_ids=position_ids)
            if inputs is not None:
                assert positions is not None
                embeddings = merge_rows(embeddings, inputs, positions)
        else:
            self.model.set_input_tensor(inputs)
        output: Tensor = self.model(
            input_ids,
            position_ids,
            attention_mask=None,
            decoder_input=embeddings,
            labels=labels,
            packed_seq_params=documents,
        )
        return output
