"""Train multimodal models whose modules live on separate process grids."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_mimo.inference import load
    from megatron_mimo.model.omni import load_pretrained

__version__ = "0.1.0"
__all__ = ["__version__", "load", "load_pretrained"]


def __getattr__(name: str) -> Any:
    """`load` and `load_pretrained`, which import torch, on their first use."""
    if name == "load":
        from megatron_mimo.inference import load

        return load
    if name == "load_pretrained":
        from megatron_mimo.model.omni import load_pretrained

        return load_pretrained
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
