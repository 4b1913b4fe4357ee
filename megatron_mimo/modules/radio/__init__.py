"""RADIO, a vision transformer for images of any size."""

from megatron_mimo.modules.radio.config import RadioConfig
from megatron_mimo.modules.radio.encoder import RadioEncoder

__all__ = ["RadioConfig", "RadioEncoder"]
