"""Several documents in one sequence, which a model of transformers must keep apart.

Layers of attention see by positions where a document begins. What they do not see is done here:
positions in images, masks by images, and linear attention, whose state goes on to the next
document where no kernel stops it. Attention itself runs on each document alone: with a mask over
the whole sequence it would compute all pairs of its tokens, and drop most of them.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_mimo.kernels.packed import PackedSegments
from megatron_mimo.modules.hf.family import Family

LENGTHS = "document_lengths"
"""Name of the argument of forward by which layers get the lengths of documents."""
_ATTENTION = "megatron_mimo_documents"


def divide_documents(language: Any) -> None:
    """Let every layer of attention run on one document after the other.

    Args:
        language: Language model; its layers then read the argument `LENGTHS` where it is given.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    for layer in _linear_attention(language):
        layer.forward = _PerDocument(layer.forward)
    if language.config._attn_implementation != "sdpa":
        return  # Kernels for packed sequences read where documents begin from positions.
    AttentionInterface.register(_ATTENTION, _attention)
    AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
    language.config._attn_implementation = _ATTENTION


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention by torch's kernels, on each document alone where there are several.

    Args:
        module: Layer of attention.
        query: Queries [B, heads, S, width].
        key: Keys [B, heads, S, width].
        value: Values [B, heads, S, width].
        attention_mask: Mask [B, 1, S, S]; None for a causal one.
        arguments: Further arguments of `sdpa_attention_forward`, and `LENGTHS`.

    Returns:
        Output [B, S, heads, width], and no weights.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    lengths = arguments.pop(LENGTHS, None)
    if lengths is None:
        whole: Tensor = sdpa_attention_forward(
            module, query, key, value, attention_mask, **arguments
        )[0]
        return whole, None
    pieces, start = [], 0
    for length in lengths:
        here = slice(start, start + length)
        mask = None if attention_mask is None else attention_mask[..., here, here]
        queries, keys, values = query[:, :, here], key[:, :, here], value[:, :, here]
        pieces.append(sdpa_attention_forward(module, queries, keys, values, mask, **arguments)[0])
        start += length
    return torch.cat(pieces, dim=1), None


def _linear_attention(language: nn.Module) -> Iterator[Any]:
    for module in language.modules():
        found = getattr(module, "linear_attn", None)
        if isinstance(found, nn.Module):
            yield found


class _PerDocument:
    """Forward of a layer of linear attention on each document of a sequence."""

    def __init__(self, forward: Any) -> None:
        self._forward = forward

    def __call__(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        """As the layer's own forward: hidden states [B, S, H]."""
        lengths = arguments.pop(LENGTHS, None)
        if lengths is None:
            result: Tensor = self._forward(hidden_states=hidden_states, **arguments)
            return result
        documents = hidden_states.split(lengths, dim=1)
        return torch.cat(
            [self._forward(hidden_states=document, **arguments) for document in documents], dim=1
        )


def packed_arguments(
    model: Any,
    family: Family,
    documents: PackedSegments,
    position_ids: Tensor,
    arguments: Mapping[str, Any],
) -> dict[str, Any]:
    """Arguments of forward by which a model keeps the documents of a sequence apart.

    Args:
        model: Model of transformers.
        family: Record of its family.
        documents: Boundaries of the documents.
        position_ids: Positions in each document, int64 [1, S].
        arguments: Arguments of forward so far.
    """
    found: dict[str, Any] = {"position_ids": position_ids}
    if family.position_parts > 1:
        found["position_ids"] = _image_positions(model, documents.lengths, position_ids, arguments)
    text = model.config.get_text_config()
    if family.image_blocks and text.use_bidirectional_attention == "vision":
        found["attention_mask"] = _image_masks(
            text, documents, arguments["mm_token_type_ids"], model.dtype
        )
    return found


def _image_positions(
    model: Any, lengths: Sequence[int], position_ids: Tensor, arguments: Mapping[str, Any]
) -> Tensor:
    """Positions int64 [4, 1, S]: in the document, then in time, row and column."""
    grids = iter(arguments.get("image_grid_thw", ()))
    parts = []
    pieces = zip(
        arguments["input_ids"].split(lengths, dim=1),
        arguments["mm_token_type_ids"].split(lengths, dim=1),
        strict=True,
    )
    for tokens, kinds in pieces:
        begins = int((kinds.diff(dim=1, prepend=kinds.new_zeros(1, 1)) == 1).sum())
        if begins:
            found, _ = model.model.get_rope_index(
                tokens,
                mm_token_type_ids=kinds,
                image_grid_thw=torch.stack([next(grids) for _ in range(begins)]),
            )
        else:
            found = torch.arange(tokens.size(1), device=tokens.device).expand(3, 1, -1)
        parts.append(found)
    return torch.cat([position_ids[None], torch.cat(parts, dim=-1)])


def _image_masks(
    text: Any, documents: PackedSegments, kinds: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Masks of both kinds of layers where tokens of an image see each other both ways.

    transformers' own masks of packed sequences look an image up by the position in the document,
    so that a document would have the images of the first one.

    Args:
        text: Configuration of the language model.
        documents: Boundaries of the documents.
        kinds: Kind of each token, 1 for images, int64 [1, S].
        dtype: Dtype of the masks, where they are not of booleans.
    """
    from transformers.masking_utils import (
        and_masks,
        blockwise_overlay,
        create_causal_mask,
        packed_sequence_mask_function,
        sliding_window_overlay,
    )
    from transformers.models.gemma4.modeling_gemma4 import get_block_sequence_ids_for_mask

    same_document = packed_sequence_mask_function(documents.seq_idx)
    common = {
        "config": text,
        # Only its shape, dtype and device are read.
        "inputs_embeds": torch.empty((*kinds.shape, 1), dtype=dtype, device=kinds.device),
        "attention_mask": None,
        "past_key_values": None,
    }
    images = blockwise_overlay(get_block_sequence_ids_for_mask(kinds, device=kinds.device))
    window = sliding_window_overlay(text.sliding_window)
    return {
        "full_attention": create_causal_mask(**common, and_mask_function=same_document),
        "sliding_attention": create_causal_mask(
            **common, or_mask_function=images, and_mask_function=and_masks(window, same_document)
        ),
    }
