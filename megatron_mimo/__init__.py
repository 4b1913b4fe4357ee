"""Train multimodal models whose modules live on separate process grids."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_mimo.omni import load_pretrained

__version__ = "0.1.0"
__all__ = ["__version__", "load_pretrained"]


def __getattr__(name: str) -> Any:
    """`load_pretrained`, which imports torch, on its first use."""
    if name == "load_pretrained":
        from megatron_mimo.omni import load_pretrained

        return load_pretrained
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
