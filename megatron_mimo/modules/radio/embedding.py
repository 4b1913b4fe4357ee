"""From patches to tokens: embedding, position and class tokens, a few gathers for all images."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_mimo.media.images import PackedImages
from megatron_mimo.modules.radio.config import RadioConfig, VideoEmbeddingConfig


class PatchEmbedding(nn.Module):
    """Embedded patches at their positions, after each image's class tokens.

    Every tp rank holds the whole layer: it is a thousandth of the encoder's work.
    """

    def __init__(self, config: RadioConfig, params_dtype: torch.dtype) -> None:
        super().__init__()
        width = config.hidden_size
        self.projection = nn.Linear(
            3 * config.patch_dim**2, width, bias=config.patch_bias, dtype=params_dtype
        )
        self.position = nn.Parameter(
            torch.empty(config.position_grid**2, width, dtype=params_dtype)
        )
        self.class_token = nn.Parameter(
            torch.empty(config.class_token_len, width, dtype=params_dtype)
        )
        nn.init.normal_(self.projection.weight, std=config.init_method_std)
        if self.projection.bias is not None:
            nn.init.zeros_(self.projection.bias)
        nn.init.normal_(self.position, std=config.position_init_std)
        nn.init.normal_(self.class_token, std=config.init_method_std)

    def forward(self, images: PackedImages, groups: Tensor | None = None) -> Tensor:
        """Tokens [L, H] of packed images, in the dtype of parameters.

        Args:
            images: Packed images, and videos.
            groups: Embedded patches of the videos [T - T_i, H]; None for a module without videos.
        """
        embedded = self.projection(images.patches.to(self.position.dtype))
        if groups is not None:
            embedded = torch.cat([embedded, groups])
        tokens: Tensor = _PlaceTokens.apply(  # type: ignore[no-untyped-call]
            embedded, self.position, self.class_token, images
        )
        return tokens


class VideoEmbedding(nn.Module):
    """Embedded patches of groups of frames, which take the place of embedded patches of images.

    Every tp rank holds the whole layer.
    """

    def __init__(
        self, video: VideoEmbeddingConfig, config: RadioConfig, params_dtype: torch.dtype
    ) -> None:
        super().__init__()
        pixels = video.frames * 3 * config.patch_dim**2
        self.projection = nn.Linear(pixels, config.hidden_size, bias=False, dtype=params_dtype)
        nn.init.normal_(self.projection.weight, std=video.init_method_std)

    def forward(self, images: PackedImages) -> Tensor:
        """Embedded patches [T - T_i, H], of none where there are no videos.

        The weight has a gradient then too, which is zero: a bucket of gradients waits for it.
        """
        weight = self.projection.weight
        groups = images.groups
        if groups is None:
            groups = weight.new_zeros(0, weight.size(1))
        embedded: Tensor = self.projection(groups.to(weight.dtype))
        return embedded


def gather_rows(tokens: Tensor, row_index: Tensor, row_size: int) -> Tensor:
    """Concatenate the tokens of each row, without class tokens: [L, H] -> [R, row_size]."""
    gathered: Tensor = _GatherOnce.apply(tokens, row_index)  # type: ignore[no-untyped-call]
    return gathered.view(-1, row_size)


class _PlaceTokens(torch.autograd.Function):
    """Add position embeddings to embedded patches [T, H], and set class tokens between them.

    The gradient of the position table is one sparse sum over all patches, straight into the fp32
    buffer of a parameter that has one: a dense table per image would cost more than the encoder's
    whole forward (26 ms for each image at width 256).
    """

    @staticmethod
    def forward(
        ctx: Any, embedded: Tensor, table: Tensor, class_token: Tensor, images: PackedImages
    ) -> Tensor:
        index, weight = images.position_index, images.position_weight
        embedded = embedded + interpolate(table, index, weight)
        filled = len(images.patch_slots) + len(images.class_slots)
        # Zeros for a token that is of no item.
        make = embedded.new_empty if filled else embedded.new_zeros
        tokens = make(images.num_tokens, embedded.size(1))
        tokens.index_copy_(0, images.patch_slots, embedded)
        if len(class_token):
            tokens.index_copy_(0, images.class_slots, _class_tokens(class_token, images))
        ctx.images, ctx.table, ctx.class_shape = images, table, class_token.shape
        return tokens

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        images: PackedImages = ctx.images
        of_patches = gradient.index_select(0, images.patch_slots)
        of_table = of_class = None
        if ctx.needs_input_grad[1]:
            of_table = _table_gradient(ctx.table, of_patches, images)
        if ctx.needs_input_grad[2]:
            of_class = gradient.index_select(0, images.class_slots)
            if images.class_index is None:
                of_class = of_class.view(len(images.lengths), *ctx.class_shape).sum(0)
            else:
                total = of_class.new_zeros(ctx.class_shape)
                of_class = total.index_add_(0, images.class_index, of_class)
        return of_patches, of_table, of_class, None


def _class_tokens(class_token: Tensor, images: PackedImages) -> Tensor:
    """The class tokens [n, H] at `images.class_slots`."""
    if images.class_index is None:
        return class_token.repeat(len(images.lengths), 1)
    return class_token.index_select(0, images.class_index)


def interpolate(table: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Weighted sums of four cells each: table [C, H], index and weight [T, 4] -> [T, H].

    Sums are float32 or better, as in transformers (`RadioPatchEmbeddings`).
    """
    if table.dtype == torch.float32:
        return F.embedding_bag(index, table, per_sample_weights=weight, mode="sum")
    at_least = torch.promote_types(table.dtype, torch.float32)
    total = torch.zeros(len(index), table.size(1), dtype=at_least, device=table.device)
    for tap in range(index.size(1)):
        cells = table.index_select(0, index[:, tap])
        total.addcmul_(cells.to(at_least), weight[:, tap, None].to(at_least))
    return total.to(table.dtype)


def _table_gradient(table: Any, of_patches: Tensor, images: PackedImages) -> Tensor:
    """The gradient of the position table, or a dummy where it is already in its buffer."""
    # megatron-core's way to say that a parameter's gradient is in its buffer already.
    in_buffer = getattr(table, "main_grad", None) is not None
    dtype = torch.promote_types(table.dtype, torch.float32)
    total = (
        table.main_grad if in_buffer else torch.zeros(table.shape, dtype=dtype, device=table.device)
    )
    of_patches = of_patches.to(total.dtype)
    for tap in range(images.position_index.size(1)):
        share = of_patches * images.position_weight[:, tap, None].to(total.dtype)
        total.index_add_(0, images.position_index[:, tap], share)
    if in_buffer:
        table.grad_added_to_main_grad = True
        return torch.empty_like(table)
    return total.to(table.dtype)


class _GatherOnce(torch.autograd.Function):
    """`tokens[index]` for an index without repetitions, so that backward only copies."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.num_tokens = len(tokens)
        return tokens.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        tokens = gradient.new_zeros(ctx.num_tokens, gradient.size(1))
        return tokens.index_copy_(0, index, gradient), None
