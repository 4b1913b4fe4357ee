"""Random NemotronH folders, written by transformers."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

KINDS = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}
BASE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "ssm_state_size": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "n_groups": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 40,
    "routed_scaling_factor": 2.5,
    # Far from the usual 0.02, so that every weight matters.
    "initializer_range": 0.2,
    "pad_token_id": 5,
}


def write_nemotron(folder: Path | str, pattern: str, **fields: Any) -> Any:
    """A random `NemotronHForCausalLM` in evaluation mode, saved in a folder."""
    import torch
    from transformers import NemotronHConfig, NemotronHForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.manual_seed(1)
    kinds = [KINDS[letter] for letter in pattern]
    model = NemotronHForCausalLM(NemotronHConfig(**BASE | {"layers_block_type": kinds} | fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # What transformers starts as a constant.
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            if name.endswith("gate.weight"):
                parameter.normal_(0, 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.1)
    model.eval().save_pretrained(folder)
    return model


def random_tokens(batch: int, length: int) -> "Tensor":
    """int64 [B, S]."""
    import torch

    random = torch.Generator().manual_seed(2)
    return torch.randint(0, BASE["vocab_size"], (batch, length), generator=random)
