"""Check before a sample is stored whether training will accept it."""

from collections.abc import Mapping

from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.inputs import Inputs
from megatron_mimo.data.reading.task_encoder import read_sample
from megatron_mimo.data.samples.media import MediaFolder
from megatron_mimo.data.samples.sample import EncodedSample, RawSample, SkippedSample, try_encode
from megatron_mimo.data.text.tokenizer import ByteTokenizer
from megatron_mimo.settings.ranges import MOST_POSITIONS

_ENDLESS = MOST_POSITIONS
_WHERE = "source"


def wrong_sample(
    key: str, parts: Mapping[str, bytes], inputs: Inputs, media: MediaFolder
) -> str | None:
    """Reason why training would refuse a sample at any sequence length; None for none.

    It uses the checks of training; items are not decoded.

    Args:
        key: Key of the sample.
        parts: File ending -> contents.
        inputs: Kinds of items that the sample may have.
        media: Files that the sample's JSON may name, where none are among the parts.
    """
    read = read_sample(key, _WHERE, parts, media, inputs)
    if isinstance(read, RawSample):
        config = DataConfig(seq_length=_ENDLESS, inputs=inputs, prompt_format="plain")
        outcome = try_encode(read, config, ByteTokenizer(tuple(config.hosts)), content=())
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
