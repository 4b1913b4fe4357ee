"""The RADIO vision transformer over packed images of any size."""

from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor, nn

from megatron_mimo.kernels.packed import packed_segments
from megatron_mimo.kernels.specs import transformer_block_spec
from megatron_mimo.media.images import PackedImages
from megatron_mimo.modules.radio.config import RadioConfig
from megatron_mimo.modules.radio.embedding import PatchEmbedding
from megatron_mimo.modules.radio.part import ImagesPart
from megatron_mimo.runtime.megatron_core import is_first_stage, is_last_stage, transformer_config

_ACTIVATIONS = {"gelu": F.gelu, "fast_gelu": partial(F.gelu, approximate="tanh")}


class RadioVit(nn.Module):
    """A pipeline stage of the encoder: from patches of many images to tokens.

    All images form one thd sequence, and attention stays inside an image.

    Args:
        config: Architecture of the module.
        pg_collection: Groups of the module's grid.
        params_dtype: Dtype of the parameters and activations.
        initialize: Whether to draw initial weights; otherwise weights are undefined.
    """

    def __init__(
        self,
        config: RadioConfig,
        pg_collection: ProcessGroupCollection,
        params_dtype: torch.dtype,
        *,
        initialize: bool = True,
    ) -> None:
        super().__init__()
        self.radio_config = config
        self.frozen = False
        self.passes_gradients = True
        self.is_first, self.is_last = is_first_stage(pg_collection), is_last_stage(pg_collection)
        # Sequence parallelism stays off: packed lengths do not divide by the tp size.
        self.config = transformer_config(
            pg_collection,
            params_dtype=params_dtype,
            sequence_parallel=False,
            num_layers=config.num_layers,
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            ffn_hidden_size=config.ffn_hidden_size,
            activation_func=_ACTIVATIONS[config.activation],
            layernorm_epsilon=config.layernorm_epsilon,
            init_method_std=config.init_method_std,
            perform_initialization=initialize,
        )
        if self.is_first:
            self.embedding = PatchEmbedding(config, params_dtype)
        self.decoder = TransformerBlock(
            self.config,
            transformer_block_spec(
                self.config,
                attn_mask_type=AttnMaskType.no_mask,
                post_layer_norm=config.final_layernorm,
                pp_rank=pg_collection.pp.rank(),
                layer_scale=config.layer_scale,
            ),
            pre_process=self.is_first,
            post_process=self.is_last,
            pg_collection=pg_collection,
        )

    def freeze(self, *, passes_gradients: bool = False) -> None:
        """Freeze all parameters, and stay in evaluation mode whatever `train` is called with.

        Args:
            passes_gradients: Whether what is embedded outside of it trains.
        """
        self.frozen = True
        self.passes_gradients = passes_gradients
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "RadioVit":
        """Switch between training and evaluation; a frozen encoder stays in evaluation."""
        return super().train(mode and not self.frozen)

    def forward(
        self, images: PackedImages, hidden: Tensor | None = None, groups: Tensor | None = None
    ) -> Tensor:
        """Encode packed images.

        Args:
            images: Packed images on this stage's device; with context parallelism this rank's part
                of them, whose L tokens it computes.
            hidden: Tokens of the previous stage [L, H]; None on the first stage.
            groups: Embedded patches of videos [T - T_i, H] on the first stage; None for a module
                without videos.

        Returns:
            Tokens after this stage [L, H], class tokens included, in the dtype of parameters. They
            are not part of an autograd graph where the encoder, and all before it, is frozen.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.passes_gradients):
            if self.is_first:
                hidden = self.embedding(images, groups)
            assert hidden is not None
            x = hidden.unsqueeze(1)
            if not self.is_first:
                # Later stages read their input from here, whatever their argument is.
                self.decoder.set_input_tensor(x)
            packed = packed_segments(images.cu_seqlens, images.lengths)
            if isinstance(images, ImagesPart):
                packed.cut = images.cut
            tokens: Tensor = self.decoder(x, attention_mask=None, packed_seq_params=packed)
            return tokens.squeeze(1)
