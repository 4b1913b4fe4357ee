"""Folders of adapters as peft writes them: adapter_config.json, and adapter_model.safetensors.

A tensor is named `base_model.model.<path of the layer in transformers' model>.lora_A.weight`, [r,
in], or `.lora_B.weight`, [out, r].
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_ROOT = "base_model.model."
_FACTORS = ("lora_A", "lora_B")
# Fields that change nothing of what adapters compute, or that tensors and others say anyway.
_IGNORED = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode"),
        *("layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core", "peft_version"),
        *("qalora_group_size", "revision", "target_modules", "task_type"),
    }
)
_READ = frozenset({"peft_type", "r", "lora_alpha", "use_rslora", "bias", "init_lora_weights"})
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True, kw_only=True, slots=True)
class PeftFolder:
    """Adapters of linear layers.

    Attributes:
        rank: Rank r of every adapter.
        alpha: Factor of every product times the rank, or its root.
        rslora: Whether the factor is divided by the root of the rank.
        tensors: Path of a layer in transformers' model -> its factors A [r, in] and B [out, r].
    """

    rank: int
    alpha: float
    rslora: bool
    tensors: Mapping[str, tuple[Tensor, Tensor]]


def read_peft(path: str | Path) -> PeftFolder:
    """Read a folder.

    Raises:
        ValueError: A file is missing or damaged, or the folder has something that adapters here do
            not; the message names the field or the tensor.
    """
    folder = Path(path)
    config = _read_config(folder / CONFIG)
    where = folder / WEIGHTS
    try:
        stored = load_file(where)
    except FileNotFoundError:
        raise ValueError(f"{where} is missing: expected adapters as peft writes them") from None
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{where} is damaged: {error}; copy it again") from error
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in stored.items():
        layer, _, factor = name.removesuffix(".weight").rpartition(".")
        if not name.startswith(_ROOT) or factor not in _FACTORS or not name.endswith(".weight"):
            raise ValueError(
                f"{where} has a tensor {name}: expected {_ROOT}<layer>.lora_A.weight and "
                f"lora_B.weight"
            )
        if tensor.dim() != 2 or tensor.shape[_FACTORS.index(factor)] != config["r"]:
            raise ValueError(
                f"{where}: {name} is {list(tensor.shape)}: expected a matrix of rank {config['r']}"
            )
        found.setdefault(layer.removeprefix(_ROOT), {})[factor] = tensor
    for layer, factors in found.items():
        if len(factors) < len(_FACTORS):
            raise ValueError(f"{where} has lora_A or lora_B of {layer} alone: expected both")
    return PeftFolder(
        rank=config["r"],
        alpha=float(config["lora_alpha"]),
        rslora=bool(config.get("use_rslora", False)),
        tensors={layer: (both["lora_A"], both["lora_B"]) for layer, both in found.items()},
    )


def write_peft(path: str | Path, content: PeftFolder, *, base: str | None, dropout: float) -> None:
    """Write a folder that `peft.PeftModel.from_pretrained` loads; the config is written last.

    Args:
        path: Path to the folder, which is created.
        content: The adapters.
        base: Folder of the model that they belong to; None where it is not known.
        dropout: Share of an adapter's inputs that training zeroes.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{_ROOT}{layer}.{factor}.weight": tensor.detach().cpu().contiguous()
        for layer, both in content.tensors.items()
        for factor, tensor in zip(_FACTORS, both, strict=True)
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": content.rank,
        "lora_alpha": content.alpha,
        "lora_dropout": dropout,
        "use_rslora": content.rslora,
        # Whole paths, since layers of another part may have the same last name.
        "target_modules": sorted(content.tensors),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "use_dora": False,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: expected adapters as peft writes them") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{path}: peft_type is {kind!r}, only 'LORA' is supported")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float) or alpha <= 0:
        raise ValueError(
            f"{path}: r is {rank!r} and lora_alpha {alpha!r}: expected positive numbers"
        )
    if config.get("bias", "none") != "none":
        raise ValueError(f"{path}: bias is {config['bias']!r}, only 'none' is supported")
    if config.get("init_lora_weights", True) not in _PLAIN_STARTS:
        raise ValueError(
            f"{path}: init_lora_weights is {config['init_lora_weights']!r}, which changes the "
            f"weights beside the adapters: convert the adapters with peft first"
        )
    for field, value in sorted(config.items()):
        if field not in _IGNORED | _READ and value:
            raise ValueError(f"{path}: {field} is {value!r}, which is not supported")
    return config
