"""The hybrid language model in one process, without a launcher."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_mimo.modules.hybrid.config import HybridConfig
from megatron_mimo.runtime import prepare_megatron_core, resolve_device
from megatron_mimo.weights.folder import WeightFolder, write_folder


class HybridLM(nn.Module):
    """A whole hybrid language model; `from_pretrained` makes one.

    Attributes:
        config: Architecture of the module.
        vocab_size: Number of tokens of the vocabulary, V.
        model: Model of megatron-core, a `HybridModel`.
    """

    def __init__(
        self, config: HybridConfig, vocab_size: int, model: nn.Module, source: dict[str, Any]
    ) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.model = model
        self._source = source

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: str = "auto",
    ) -> "HybridLM":
        """Load a folder as transformers' `NemotronHForCausalLM` writes it.

        Import this package before anything that imports megatron-core: on a host it has to be
        adapted first.

        Args:
            folder: Path to a folder with config.json and safetensors.
            dtype: Dtype of the parameters and logits; None keeps that of the weights.
            device: Kind of device: "auto" takes a GPU where there is one, else "cpu" or "cuda".

        Raises:
            ValueError: A file is missing or damaged, weights are missing or unexpected (the
                message lists them), or the architecture is not supported.
        """
        from megatron_mimo.modules.hybrid.weights import load_weights, read_config

        where = resolve_device(device)
        prepare_megatron_core(where)
        with WeightFolder(folder) as weights:
            config, vocab_size = read_config(weights)
            stored = weights.dtype("backbone.embeddings.weight")
            model = _build(config, vocab_size, dtype or stored, weights.config)
            load_weights(model, config, weights, tp=(0, 1), expt_tp=(0, 1), first_expert=0)
            return cls(config, vocab_size, model.to(where.torch), weights.config).eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that transformers' `NemotronHForCausalLM` loads."""
        from megatron_mimo.modules.hybrid.weights import export_weights, write_config

        # What the architecture here does not know, such as token ids, stays as it was.
        config = self._source | write_config(self.config, self.vocab_size)
        write_folder(folder, config, export_weights(self.model, self.config))

    def logits(self, input_ids: Tensor) -> Tensor:
        """Scores of the next token at every position.

        Args:
            input_ids: Tokens, int64 [B, S]; sequences have no padding.

        Returns:
            Logits [B, S, V], in the model's dtype.

        Raises:
            ValueError: `input_ids` has another shape or dtype, or a token outside the vocabulary.
        """
        if input_ids.dim() != 2 or input_ids.dtype != torch.int64 or not input_ids.numel():
            raise ValueError(
                f"input_ids is {input_ids.dtype} {list(input_ids.shape)}: expected int64 [B, S]"
            )
        least, most = int(input_ids.min()), int(input_ids.max())
        if least < 0 or most >= self.vocab_size:
            raise ValueError(
                f"input_ids holds {least if least < 0 else most}: expected tokens from 0 to "
                f"{self.vocab_size - 1}"
            )
        input_ids = input_ids.to(next(self.model.parameters()).device)
        positions = torch.arange(input_ids.size(1), device=input_ids.device).expand_as(input_ids)
        found: Tensor = self.model(input_ids, positions, attention_mask=None)
        return found


def _build(
    config: HybridConfig, vocab_size: int, dtype: torch.dtype, source: dict[str, Any]
) -> nn.Module:
    from megatron_mimo.modules.hybrid.model import build_hybrid
    from megatron_mimo.runtime.solo import solo_groups, solo_world

    with solo_world():
        model: nn.Module = build_hybrid(
            # Load balancing belongs to a training run, which has its own configuration.
            replace(config, moe_aux_loss_coeff=0.0),
            vocab_size=vocab_size,
            seq_length=source.get("max_position_embeddings", 4096),
            pg_collection=solo_groups(),
            params_dtype=dtype,
            sequence_parallel=False,
            perform_initialization=False,
        )
    return model
