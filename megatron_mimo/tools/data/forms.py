"""Whether training will take a sample, before it is stored."""

from collections.abc import Mapping
from pathlib import Path

from megatron.energon.cache.file_store import SystemFileStore
from megatron.energon.epathlib import EPath

from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.sample import EncodedSample, RawSample, SkippedSample, try_encode
from megatron_mimo.data.task_encoder import read_sample
from megatron_mimo.data.tokenizer import ByteTokenizer

_ENDLESS = 2**40  # positions
_WHERE = "source"


def wrong_sample(key: str, parts: Mapping[str, bytes], image_token: str, media: Path) -> str | None:
    """What training would say against a sample, at any sequence length; None for nothing.

    It goes through training's own checks; pixels are not decoded.

    Args:
        key: Of the sample.
        parts: File ending -> contents.
        image_token: Placeholder of an image in texts.
        media: Folder that the sample's JSON names images in, where none are among the parts.
    """
    read = read_sample(key, _WHERE, parts, SystemFileStore(EPath(str(media))), image_token)
    if isinstance(read, RawSample):
        config = DataConfig(seq_length=_ENDLESS, image_token=image_token, prompt_format="plain")
        outcome = try_encode(read, config, ByteTokenizer(), with_patches=False)
    else:
        outcome = read
    match outcome:
        case EncodedSample():
            return None
        case SkippedSample():
            return outcome.reason
        case _:
            named = f"sample {key!r} of {_WHERE}"
            return outcome.message.removeprefix(named).lstrip(" :")
