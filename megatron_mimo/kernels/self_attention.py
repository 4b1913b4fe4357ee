"""Self-attention whose rotary embedding of packed sequences does not wait for the device.

megatron-core rotates a packed sequence document by document, and for that reads their lengths back
from the device in every layer, for queries and for keys. Here every token is rotated by its own
position in its document (`PackedSegments.positions`), whichever tokens of a sequence a
context-parallel rank has; megatron-core would take them for those of its own zig-zag.
"""

from typing import Any

from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megatron_mimo.kernels.packed import PackedSegments


class PackedSelfAttention(SelfAttention):
    """megatron-core's self-attention with the same parameters and results.

    Args:
        args: Positional arguments of megatron-core's self-attention.
        kwargs: Keyword arguments of it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Angles of the forward that is running, [T, 1, 1, D]; None where megatron-core rotates.
        self._angles: Tensor | None = None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """megatron-core's forward, with [T, 1, H] hidden states where the sequence is packed.

        Args:
            hidden_states: Input [S, B, H].
            attention_mask: Mask of the attention, if any.
            args: Further positional arguments.
            rotary_pos_emb: Angle of every position, [positions, 1, 1, D]; None rotates nothing.
            packed_seq_params: Boundaries of a packed sequence, with the positions of the tokens of
                this rank; without `positions` megatron-core rotates.
            kwargs: Further arguments.

        Returns:
            Output [S, B, H], and its bias where that is added later.
        """
        places = None
        if isinstance(packed_seq_params, PackedSegments):
            places = packed_seq_params.positions
        if rotary_pos_emb is not None and places is not None:
            self._angles = rotary_pos_emb.index_select(0, places)
            rotary_pos_emb = None
        try:
            output: tuple[Tensor, Tensor | None] = super().forward(
                hidden_states,
                attention_mask,
                *args,
                rotary_pos_emb=rotary_pos_emb,
                packed_seq_params=packed_seq_params,
                **kwargs,
            )
            return output
        finally:
            self._angles = None

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        """megatron-core's queries, keys and values, [S, B, heads, D], rotated where it is ours."""
        found = super().get_query_key_value_tensors(*args, **kwargs)
        if self._angles is None:
            return found
        query, key, *rest = found
        return (self._rotated(query), self._rotated(key), *rest)

    def _rotated(self, heads: Tensor) -> Tensor:
        """Queries or keys [T, 1, heads, D], each token turned by its angles."""
        turned: Tensor = apply_rotary_pos_emb(
            heads, self._angles, config=self.config, cp_group=self.pg_collection.cp
        )
        return turned
