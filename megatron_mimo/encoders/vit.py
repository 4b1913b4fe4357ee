"""A plain vision transformer over packed images of any size."""

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor, nn

from megatron_mimo.encoders.config import VitConfig
from megatron_mimo.runtime.engine import is_first_stage, is_last_stage, transformer_config
from megatron_mimo.runtime.specs import transformer_block_spec


class PackedVit(nn.Module):
    """A pipeline stage of the encoder: patches of many images in, rows for the projector out.

    All images form one thd sequence. The first stage embeds patches, the last picks rows.

    Position is the sum of a learned embedding of the patch's row and one of its column, so that an
    image of any aspect ratio needs no interpolation. Attention stays inside an image.

    Args:
        config: The architecture.
        pg_collection: Groups of the encoder's grid.
        params_dtype: Dtype of the parameters and activations.
    """

    def __init__(
        self,
        config: VitConfig,
        pg_collection: ProcessGroupCollection,
        params_dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.vit_config = config
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
            layernorm_epsilon=config.layernorm_epsilon,
            init_method_std=config.init_method_std,
        )
        if self.is_first:
            width, dtype = config.hidden_size, params_dtype
            self.patch_embedding = nn.Linear(3 * config.patch_dim**2, width, dtype=dtype)
            self.row_embedding = nn.Embedding(config.max_grid, width, dtype=dtype)
            self.column_embedding = nn.Embedding(config.max_grid, width, dtype=dtype)
            for table in (self.row_embedding, self.column_embedding):
                nn.init.normal_(table.weight, std=config.position_init_std)
        self.decoder = TransformerBlock(
            self.config,
            transformer_block_spec(
                self.config,
                attn_mask_type=AttnMaskType.no_mask,
                pp_rank=pg_collection.pp.rank(),
            ),
            pre_process=self.is_first,
            post_process=self.is_last,
            pg_collection=pg_collection,
        )

    def forward(
        self,
        inputs: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        row_index: Tensor,
    ) -> Tensor:
        """Encode packed images.

        Args:
            inputs: [T, 3*P*P], normalised pixels of every patch; on later stages the hidden states
                [T, H] of the stage before.
            positions: int64 [T, 2], row and column of each patch in its image.
            cu_seqlens: int32 [N+1], first patch of each image, and T.
            max_seqlen: Patches of the largest image.
            row_index: int64 [R*k], the patches that rows concatenate; k = 4 with pixel shuffle.

        Returns:
            [R, k*H]; before the last stage hidden states [T, H].
        """
        x = inputs
        if self.is_first:
            x = self.patch_embedding(x.to(self.patch_embedding.weight.dtype))
            x = x + self.row_embedding(positions[:, 0]) + self.column_embedding(positions[:, 1])
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=max_seqlen,
            max_seqlen_kv=max_seqlen,
        )
        x = x.unsqueeze(1)
        if not self.is_first:
            # Later stages take their input from here, whatever they are called with.
            self.decoder.set_input_tensor(x)
        hidden: Tensor = self.decoder(x, attention_mask=None, packed_seq_params=packed).squeeze(1)
        return hidden[row_index].view(-1, self.vit_config.row_size) if self.is_last else hidden
