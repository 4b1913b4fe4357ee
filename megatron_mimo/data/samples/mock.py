"""Mock samples: sample i of a seed is always the same, whoever draws the others."""

import hashlib
from enum import IntEnum

import numpy as np

from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.inputs import ENCODER, MockItems
from megatron_mimo.data.samples.sample import RawSample

_WORDS = ("red", "green", "blue", "yellow", "purple", "white", "black", "orange")


class Split(IntEnum):
    """Independent streams of samples."""

    TRAIN = 0
    VAL = 1


def mock_sample(index: int, split: Split, config: DataConfig) -> RawSample:
    """Sample `index` of a split, a function of (seed, split, index) and the settings alone.

    It has mock items of each module, one module after the other, and questions about them; kinds
    of items that feed one module take turns. Or, for
    `text_only_fraction` of the samples and where no module makes items, a word to repeat. All are
    quickly learnt, and the questions only with the items. Items of a module depend on its name, and
    on other modules only in the room that they share.

    Args:
        index: Index of the sample; it wraps around at the dataset's size.
        split: Stream of samples.
        config: Seed, fraction of texts, size of the dataset, kinds of items, and length of a
            sequence.
    """
    index %= config.mock_dataset_size
    rng = _generator(index, split, config.seed, stream=0)
    key = f"mock-{split.name.lower()}-{index}"
    made: dict[str, MockItems] = {}
    if rng.random() >= config.text_only_fraction:
        for module in config.hosts:
            for name in _in_turn(module, index, config):
                stream = _stream(name)
                of_kind = _generator(index, split, config.seed, stream) if stream else rng
                items = config.inputs[name].mock(of_kind, _room(config))
                if items is not None:
                    made[name] = items
                    break
    if not made:
        word = _WORDS[rng.integers(len(_WORDS))]
        return RawSample.asking(key=key, question=f"Say {word}.", answer=word, source="mock")
    return RawSample.asking(
        key=key,
        question="".join(items.question for items in made.values()),
        answer=" ".join(items.answer for items in made.values()),
        items={module: items.sources for module, items in made.items()},
        source="mock",
    )


def check_mock_items(config: DataConfig) -> None:
    """Refuse settings with which no mock items can be made.

    Raises:
        ValueError: Settings of a module contradict each other, or its items do not fit.
    """
    for kind in config.hosts.values():
        kind.check_mock(_room(config))


def _room(config: DataConfig) -> int:
    """Number of positions of a sequence for each module's items and texts."""
    return config.seq_length // max(1, len(config.hosts))


def _in_turn(module: str, index: int, config: DataConfig) -> list[str]:
    """The kinds that feed a module: the one whose turn it is, then the module's own."""
    guests = [name for name, kind in config.inputs.items() if kind.feeds == module]
    names = [module, *guests]
    return list(dict.fromkeys([names[index % len(names)], module]))


def _generator(index: int, split: Split, seed: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, split], counter=[0, 0, index, stream]))


def _stream(module: str) -> int:
    """Number of a module's random stream; 0 is that of the sample itself, which "encoder" shares.

    Samples are therefore those of versions without other modules.
    """
    if module == ENCODER:
        return 0
    return int.from_bytes(hashlib.blake2b(module.encode(), digest_size=7).digest(), "little")
