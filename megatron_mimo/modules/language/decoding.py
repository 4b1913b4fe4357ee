"""A language model that writes: it reads a prompt at once, then one token after the other.

Layers keep what they know of earlier tokens between calls, in megatron-core's context: keys and
values of attention, states of Mamba (`kernels.ssd.States`). A token costs the same work whatever
its number, attention to the tokens before it aside.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_mimo.modules.language.module import LanguageModule


class Decoding:
    """One text that is being written by a language model which this process holds whole.

    Args:
        module: The language model, in evaluation mode, on a grid of one rank.
        max_length: Largest number of tokens of prompt and answer together.
    """

    def __init__(self, module: LanguageModule, max_length: int) -> None:
        # It imports megatron-core's engines, which training has no use for.
        from megatron.core.inference.contexts import StaticInferenceContext

        self._module = module
        self._context: Any = StaticInferenceContext(1, max_length)

    @property
    def length(self) -> int:
        """Number of tokens that were read so far."""
        length: int = self._context.sequence_len_offset
        return length

    @torch.inference_mode()
    def read(
        self, tokens: Tensor, rows: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Read the next tokens.

        Args:
            tokens: Tokens, int64 [1, n], on the model's device: of the first call the whole
                prompt, of later ones a single token.
            rows: Rows of all sources [R, H], of the first call only; None without any.
            positions: Positions of the rows, int64 [R]; needed with rows.

        Returns:
            Logits of the token that follows, [V], in the model's dtype.

        Raises:
            ValueError: A later call has several tokens, or there are more than `max_length`.
        """
        from megatron.core.inference.utils import InferenceMode

        context, count = self._context, tokens.size(1)
        self._require_room(count)
        places = torch.arange(self.length, self.length + count, device=tokens.device)
        with InferenceMode.active():
            logits = self._module.next_logits(tokens, places[None], rows, positions, context)
        context.sequence_len_offset += count
        context.enable_decode_mode()
        return logits[0, -1]

    def _require_room(self, count: int) -> None:
        if self.length and count != 1:
            raise ValueError(
                f"{count} tokens after the first {self.length}: expected one at a time, as layers "
                f"do not mask what a later call reads"
            )
        most = self._context.max_sequence_length
        if self.length + count > most:
            raise ValueError(
                f"{self.length + count} tokens: expected at most {most}, for which there is memory"
            )
