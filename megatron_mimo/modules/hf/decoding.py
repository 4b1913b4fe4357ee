"""A language model of transformers that writes: the model's own forward and its own cache."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_mimo.modules.hf.language import HfLanguage


class HfDecoding:
    """One text that is being written by a language model which this process holds whole.

    Args:
        module: The language model, in evaluation mode, on a grid of one rank.
        facts: Integers of the images of the prompt, by the name of forward's argument,
            int64 [N, ...].
    """

    def __init__(self, module: HfLanguage, facts: Mapping[str, Tensor]) -> None:
        self._module = module
        self._facts = facts
        self._cache: Any = None

    @torch.inference_mode()
    def read(
        self, tokens: Tensor, rows: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Read the next tokens.

        Args:
            tokens: Tokens, int64 [1, n], on the model's device: of the first call the whole prompt,
                of later ones a single token.
            rows: Rows of all images [R, row_parts * H], of the first call only; None without any.
            positions: Not read: the model places rows by the tokens.

        Returns:
            Logits of the token that follows, [V], in the model's dtype.
        """
        if self._cache is None:
            arguments = self._module.arguments(tokens, rows, self._facts)
        else:
            arguments = {"input_ids": tokens, "past_key_values": self._cache}
        output = self._module.model(**arguments, use_cache=True, logits_to_keep=1)
        self._cache = output.past_key_values
        logits: Tensor = output.logits[0, -1]
        return logits
