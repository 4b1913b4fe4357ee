"""A tokenizer for the questions of the dataset: words in place of bytes, so that samples are short.

Most of a sample's text stands between the frames of its video, and says when they were shown.
"""

from pathlib import Path

from megatron_mimo.data.samples.omni.motion import DIRECTIONS, FRAME_RATE, NUM_FRAMES
from megatron_mimo.media.video.sampling import group_labels

_PAD, _EOS = "<pad>", "<eos>"
# What stands for rows and around them, one token each.
_MARKS = ("<image>", "<so_embedding>", "<so_start>", "<so_end>")
_TEXTS = (
    "Which digit is shown?",
    "Which number was dialled?",
    "Where does it move?",
    *(f"Which digit moves {towards}?" for towards in DIRECTIONS),
    "Is it the dialled digit?",
    "Where does the dialled digit move?",
    "Which digits?",
    *DIRECTIONS,
    "yes",
    "no",
)
_MOST_TOKENS = 1024


def write_tokenizer(folder: str | Path) -> Path:
    """Write a tokenizer that transformers loads; the same one each time.

    It merges the bytes of the words that the questions are written with. Any other text is bytes,
    and digits always are tokens by themselves.

    Args:
        folder: Path to the folder to write into; it is made where it is missing.

    Returns:
        The path to the folder.
    """
    # transformers takes seconds to import.
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    words.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_MOST_TOKENS,
        min_frequency=1,
        special_tokens=[_PAD, _EOS, *_MARKS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    labels = [
        label for frames in (1, 2) for label in group_labels(range(NUM_FRAMES), FRAME_RATE, frames)
    ]
    words.train_from_iterator([*_TEXTS, *labels], trainer)
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=_PAD,
        eos_token=_EOS,
        additional_special_tokens=list(_MARKS),
        clean_up_tokenization_spaces=False,
    ).save_pretrained(str(target))
    return target
