"""Answers of a trained model, in one process: `megatron_mimo.load(RUN).generate(...)`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_mimo.inference.model import Answer, LoadedModel, Stream, load
    from megatron_mimo.inference.sampling import Sampling

__all__ = ["Answer", "LoadedModel", "Sampling", "Stream", "load"]

_HOMES = {"model": ("Answer", "LoadedModel", "Stream", "load"), "sampling": ("Sampling",)}


def __getattr__(name: str) -> Any:
    """Import a name on demand: the command line reads flags without torch."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
