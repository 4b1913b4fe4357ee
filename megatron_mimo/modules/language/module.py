"""A language model of any family as one torch module that DDP can wrap."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from megatron_mimo.kernels.packed import PackedSegments
from megatron_mimo.modules.adapter import ModuleConfig
from megatron_mimo.modules.language.adapter import PART
from megatron_mimo.modules.language.merge import merge_rows
from megatron_mimo.modules.stage import ModuleStage
from megatron_mimo.weights.initial import Draw

_EMBEDDING = "model.embedding.word_embeddings.weight"
_OUTPUT = "model.output_layer.weight"


class LanguageModule(ModuleStage):
    """A stage of the language model; the first replaces placeholder tokens with sources' rows.

    Args:
        architecture: Config of the family.
        model: Model of megatron-core, a `GPTModel` or one with the same methods.
        initial: Function that returns the distribution of a weight from its name in this module.
        frozen: Whether no part trains.
    """

    def __init__(
        self,
        architecture: ModuleConfig,
        model: Any,
        *,
        initial: Callable[[str], Draw | None],
        frozen: bool,
    ) -> None:
        super().__init__(config=model.config)
        self.architecture = architecture
        self.model = model
        self._initial = initial
        # megatron-core reduces the gradients of tied embeddings and looks for these.
        self.pre_process, self.post_process = model.pre_process, model.post_process
        self.share_embeddings_and_output_weights = model.share_embeddings_and_output_weights
        self.requires_grad_(not frozen)

    def shared_embedding_or_output_weight(self) -> Tensor:
        """The tied weight [V/tp, H] of this stage, under megatron-core's name."""
        weight: Tensor = self.model.shared_embedding_or_output_weight()
        return weight

    @property
    def parts(self) -> Mapping[str, nn.Module | None]:
        """The only part: megatron-core's model."""
        return {PART: self.model}

    @property
    def experts_per_rank(self) -> int:
        """Number of experts of an MoE layer that a rank holds."""
        experts: int = self.config.num_moe_experts or 0
        return experts // int(self.config.expert_model_parallel_size)

    def initial(self, name: str) -> Draw | None:
        """Distribution of an initial weight, as the family defines it."""
        return self._initial(name)

    def initial_name(self, name: str) -> str:
        """The name that an initial weight is drawn by; copies of a tied weight have the same."""
        tied = self.share_embeddings_and_output_weights
        return _EMBEDDING if tied and name == _OUTPUT else name

    def forward(
        self,
        input_ids: Tensor | None,
        position_ids: Tensor | None,
        hidden: Tensor | None,
        rows: Tensor | None,
        positions: Tensor | None,
        labels: Tensor | None = None,
        documents: PackedSegments | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """Compute per-token losses, logits when there are no labels, or hidden states.

        S is this cp rank's part of the sequence, s its shard of that under sequence parallelism.

        Args:
            input_ids: Tokens, int64 [B, S]; None after the first stage.
            position_ids: Positions, int64 [B, S]; None after the first stage.
            hidden: Hidden states of the previous stage [s, B, H]; None on the first stage.
            rows: Concatenated rows of all sources in this shard [R, H], in the dtype of
                embeddings, on the first stage; None without any.
            positions: Positions of the rows in the flattened [s * B], int64 [R]; needed with rows.
            labels: Target of each position, int64 [B, S]; None before the last stage.
            documents: Boundaries of the documents of a packed sequence (`packed_documents`), which
                do not attend to each other; B is 1. They are the same on every stage.
            padding: Which positions of this shard have no token, bool [B, s], for models with
                experts; None: all have one.

        Returns:
            With labels: cross entropy of each position, float32 [B, S]. Without: this tp rank's
            shard of the logits, [B, S, V/tp]. Before the last stage: hidden states [s, B, H].

        Raises:
            ValueError: The number of rows and of positions differ.
        """
        embeddings = None
        if self.pre_process:
            embeddings = self._embedded(input_ids, position_ids, rows, positions)
        else:
            self.model.set_input_tensor(hidden)
        output: Tensor = self.model(
            input_ids,
            position_ids,
            attention_mask=None,
            decoder_input=embeddings,
            labels=labels,
            packed_seq_params=documents,
            padding_mask=padding,
        )
        return output

    def next_logits(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        rows: Tensor | None,
        positions: Tensor | None,
        context: Any,
    ) -> Tensor:
        """Logits of the token after the last one, for `Decoding`.

        Args:
            input_ids: Tokens, int64 [B, S].
            position_ids: Positions, int64 [B, S].
            rows: Concatenated rows of all sources [R, H], in the dtype of embeddings, or None.
            positions: Positions of the rows in the flattened [S * B], int64 [R]; needed with rows.
            context: What layers keep between calls, megatron-core's `StaticInferenceContext`.

        Returns:
            Logits [B, 1, V], in the dtype of parameters.

        Raises:
            ValueError: The number of rows and of positions differ.
        """
        output: Tensor = self.model(
            input_ids,
            position_ids,
            attention_mask=None,
            decoder_input=self._embedded(input_ids, position_ids, rows, positions),
            inference_context=context,
            runtime_gather_output=True,
        )
        return output

    def _embedded(
        self,
        input_ids: Tensor | None,
        position_ids: Tensor | None,
        rows: Tensor | None,
        positions: Tensor | None,
    ) -> Tensor:
        """Embeddings [s, B, H], with the rows in place of placeholder tokens."""
        embeddings: Tensor = self.model.embedding(input_ids=input_ids, position_ids=position_ids)
        if rows is None:
            return embeddings
        assert positions is not None
        return merge_rows(embeddings, rows, positions)
