"""The dtype of every tensor of a model of transformers.

What training asks for, with two exceptions, which stay in float32: the weights that transformers
keeps so (`_keep_in_fp32_modules_strict`, and `_keep_in_fp32_modules` for float16), and those that
the folder stores so although it is in another dtype, such as the decays of linear attention.
"""

import re
from collections.abc import Iterable
from typing import Any

import torch


def cast(model: Any, wide: Iterable[str], dtype: torch.dtype) -> None:
    """Give the floating parameters and stored buffers of a model without memory their dtypes.

    Buffers that are not stored follow when they are computed (`materialise`), as the model itself
    makes them.

    Args:
        model: Model on the meta device, in float32.
        wide: Names of the weights that stay in float32.
        dtype: Dtype of all others.
    """
    if dtype == torch.float32:
        return
    kept = set(wide) | set(pinned(model, dtype))
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and name not in kept:
            parameter.data = parameter.data.to(dtype)
    for module_name, module in model.named_modules():
        for name, buffer in module._buffers.items():
            full = f"{module_name}.{name}" if module_name else name
            if buffer is None or not buffer.is_floating_point() or full in kept:
                continue
            if name not in module._non_persistent_buffers_set:
                module._buffers[name] = buffer.to(dtype)


def pinned(model: Any, dtype: torch.dtype) -> list[str]:
    """Names of the parameters that transformers keeps in float32 when it trains in a dtype."""
    kept = set(model._keep_in_fp32_modules_strict or ())
    if dtype == torch.float16:
        kept |= set(model._keep_in_fp32_modules or ())
    if not kept:
        return []
    # As transformers reads the names: parts of a path, with `*` for anything.
    pattern = re.compile(
        "|".join(rf"((^|\.){re.escape(name).replace(chr(92) + '*', '.*')}($|\.))" for name in kept)
    )
    return [name for name, _ in model.named_parameters() if pattern.search(name)]
