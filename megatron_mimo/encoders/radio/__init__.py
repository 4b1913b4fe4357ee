"""RADIO, a vision transformer for images of any size."""

from megatron_mimo.encoders.radio.config import RadioConfig
from megatron_mimo.encoders.radio.encoder import RadioEncoder

__all__ = ["RadioConfig", "RadioEncoder"]
