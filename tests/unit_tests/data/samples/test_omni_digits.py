import io
import itertools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from megatron_mimo.data.reading.webdataset import read_shard
from megatron_mimo.data.samples.handwriting import Handwriting, load_handwriting, split_sources
from megatron_mimo.data.samples.omni.dataset import read_omni_digits, write_omni_digits
from megatron_mimo.data.samples.omni.motion import (
    NUM_FRAMES,
    OPPOSITE,
    SIDE,
    Direction,
    Mover,
    film,
    mp4,
)
from megatron_mimo.data.samples.omni.questions import (
    KINDS,
    OmniDigitsConfig,
    OmniSample,
    Split,
    plan_samples,
)
from megatron_mimo.data.samples.omni.tones import dial, flac
from megatron_mimo.data.samples.omni.vocabulary import write_tokenizer
from megatron_mimo.data.text.tokenizer import HuggingFaceTokenizer
from megatron_mimo.media.video.sampling import group_labels

LABELS = [i % 10 for i in range(1797)]
# ITU-T Q.23, typed from the recommendation: keys by their two frequencies.
KEYS = {
    (941, 1336): "0",
    (697, 1209): "1",
    (697, 1336): "2",
    (697, 1477): "3",
    (770, 1209): "4",
    (770, 1336): "5",
    (770, 1477): "6",
    (852, 1209): "7",
    (852, 1336): "8",
    (852, 1477): "9",
}
CONFIG = OmniDigitsConfig(num_train=70, num_val=28, seed=5)
Facts = dict[str, dict[str, object]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_omni_digits(tmp_path_factory.mktemp("data") / "omni", CONFIG)


@pytest.fixture(scope="module")
def handwriting() -> Handwriting:
    return load_handwriting()


def stored(folder: Path) -> Facts:
    shards = sorted(folder.glob("*/*.tar"))
    return {
        key: {**json.loads(parts["json"]), **parts}
        for shard in shards
        for key, parts in read_shard(shard).items()
    }


# -- calls -----------------------------------------------------------------------------------------


def heard(samples: NDArray[np.float64], rate: int) -> str:
    """The keys of a call, by the strongest two of the seven frequencies in windows of 40 ms."""
    lows, highs = (np.array(sorted({pair[i] for pair in KEYS})) for i in (0, 1))
    length, step = round(0.04 * rate), round(0.01 * rate)
    time = np.arange(length) / rate
    waves = np.exp(-2j * np.pi * np.concatenate([lows, highs])[:, None] * time)
    starts = range(0, len(samples) - length + 1, step)
    windows = np.stack([samples[start : start + length] for start in starts])
    powers = np.abs(windows @ waves.T) ** 2
    low, high = powers[:, : len(lows)], powers[:, len(lows) :]
    strength = low.max(1) + high.max(1)
    keys = [
        KEYS.get((int(lows[i]), int(highs[j])), "?") if loud else ""
        for i, j, loud in zip(
            low.argmax(1), high.argmax(1), strength > 0.4 * strength.max(), strict=True
        )
    ]
    return "".join(key for key, before in zip(keys, ["", *keys], strict=False) if key != before)


def read_clip(content: bytes) -> tuple[NDArray[np.float64], int]:
    with av.open(io.BytesIO(content)) as file:
        (track,) = file.streams
        assert (track.codec_context.name, track.channels) == ("flac", 1)
        samples = np.concatenate([frame.to_ndarray()[0] for frame in file.decode(track)])
        return samples / 32768, track.rate


@given(st.text("0123456789", min_size=1, max_size=4), st.integers(0, 2**31))
def test_tones_are_the_number(number: str, seed: int) -> None:
    samples, rate = read_clip(flac(dial(number, np.random.default_rng(seed))))
    assert heard(samples, rate) == number
    assert np.abs(samples).max() < 1


def test_calls_vary_in_length_level_and_noise() -> None:
    rng = np.random.default_rng(0)
    calls = [dial("5", rng) for _ in range(50)]
    lengths = {len(call) for call in calls}
    peaks = [np.abs(call).max() for call in calls]
    noises = [call[:320].std() / call.std() for call in calls]  # Of the silence before.
    assert len(lengths) > 45
    assert max(peaks) > 2 * min(peaks)
    assert max(noises) > 3 * min(noises)


# -- videos ----------------------------------------------------------------------------------------


def read_mp4(content: bytes) -> NDArray[np.float64]:
    with av.open(io.BytesIO(content)) as file:
        frames = [frame.to_ndarray(format="gray") for frame in file.decode(video=0)]
    return np.stack(frames).astype(np.float64)


def way(frames: NDArray[np.float64]) -> Direction:
    """Direction in which the centre of the light moves from the first frame to the last."""
    rows, columns = np.mgrid[: frames.shape[1], : frames.shape[2]]
    light = np.where(frames > 40, frames, 0)
    down, right = (
        (light[-1] * axis).sum() / light[-1].sum() - (light[0] * axis).sum() / light[0].sum()
        for axis in (rows, columns)
    )
    assert max(abs(down), abs(right)) > 10 > 3 > min(abs(down), abs(right))
    if abs(right) > abs(down):
        return "right" if right > 0 else "left"
    return "down" if down > 0 else "up"


def lanes(frames: NDArray[np.float64], towards: Direction) -> list[NDArray[np.float64]]:
    """The two halves that digits of opposite ways stay in."""
    half = SIDE // 2
    if towards in ("left", "right"):
        return [frames[:, :half], frames[:, half:]]
    return [frames[:, :, :half], frames[:, :, half:]]


@given(
    towards=st.sampled_from(sorted(OPPOSITE)),
    source=st.integers(0, 1796),
    seed=st.integers(0, 2**31),
)
def test_a_digit_moves_where_it_is_said_to(
    towards: Direction, source: int, seed: int, handwriting: Handwriting
) -> None:
    mover = Mover(glyph=handwriting.glyphs[source], towards=towards)
    frames = read_mp4(mp4(film([mover], np.random.default_rng(seed))))
    assert frames.shape == (NUM_FRAMES, SIDE, SIDE)
    assert way(frames) == towards


@given(
    towards=st.sampled_from(sorted(OPPOSITE)),
    source=st.integers(0, 1000),
    seed=st.integers(0, 2**31),
)
def test_two_digits_pass_each_other(
    towards: Direction, source: int, seed: int, handwriting: Handwriting
) -> None:
    first = Mover(glyph=handwriting.glyphs[source], towards=towards)
    second = Mover(glyph=handwriting.glyphs[source + 1], towards=OPPOSITE[towards])
    frames = read_mp4(mp4(film([first, second], np.random.default_rng(seed))))
    assert {way(half) for half in lanes(frames, towards)} == {towards, OPPOSITE[towards]}


def test_videos_keep_the_digits_readable(handwriting: Handwriting) -> None:
    rng = np.random.default_rng(0)
    for source in range(20):
        frames = film([Mover(glyph=handwriting.glyphs[source], towards="left")], rng)
        assert np.sqrt(np.mean((read_mp4(mp4(frames)) - frames) ** 2)) < 3


# -- questions -------------------------------------------------------------------------------------


def expected(question: str, sample: OmniSample) -> str:
    """The answer, from what the files show."""
    ways = {str(moving.digit): moving.towards for moving in sample.moving}
    match question.removesuffix("?").split():
        case ["Which", "digit", "is", "shown"]:
            return str(sample.shown.digit)
        case ["Which", "number", "was", "dialled"]:
            return sample.dialled
        case ["Where", "does", "it", "move"]:
            (towards,) = ways.values()
            return towards
        case ["Which", "digit", "moves", asked]:
            (digit,) = (digit for digit, towards in ways.items() if towards == asked)
            return digit
        case ["Is", "it", "the", "dialled", "digit"]:
            return "yes" if str(sample.shown.digit) == sample.dialled else "no"
        case ["Where", "does", "the", "dialled", "digit", "move"]:
            return ways[sample.dialled]
        case ["Which", "digits"]:
            return f"{sample.shown.digit} {sample.dialled} {sample.moving[0].digit}"


@given(st.integers(0, 2**31), st.sampled_from(["train", "val"]))
def test_the_plan_uses_its_own_digits_and_answers_right(seed: int, split: Split) -> None:
    config = OmniDigitsConfig(num_train=50, num_val=50, seed=seed)
    sources = split_sources(1797, 0.1, seed)[split == "val"]
    plan = list(plan_samples(split, sources, LABELS, config))
    assert plan == list(plan_samples(split, sources, LABELS, config))
    for sample in plan:
        shown = [] if sample.shown is None else [sample.shown]
        for drawn in (*shown, *sample.moving):
            assert drawn.source in sources
            assert drawn.digit == LABELS[drawn.source]
        assert split == "train" or len(sample.asked) == 1
        assert len({asked.question for asked in sample.asked}) == len(sample.asked)
        for asked in sample.asked:
            assert asked.answer == expected(asked.question, sample)


def test_training_asks_whatever_the_files_answer_in_any_order() -> None:
    plan = list(plan_samples("train", range(1790), LABELS, OmniDigitsConfig(num_train=2000)))
    orders = {tuple(a.question for a in s.asked) for s in plan if s.kind == "same"}
    shown, dialled = "Which digit is shown?", "Which number was dialled?"
    assert orders == set(itertools.permutations((shown, dialled, "Is it the dialled digit?")))
    for sample in plan:
        asked = [one.question for one in sample.asked]
        assert (shown in asked) == (sample.shown is not None)
        assert (dialled in asked) == (sample.dialled is not None)
        assert sum("Which digit moves" in one for one in asked) == len(sample.moving)


def test_kinds_take_turns_in_val(folder: Path) -> None:
    kinds = [question.kind for question in read_omni_digits(folder, "val")]
    assert kinds == list(KINDS) * 4


def best_guess(samples: list[OmniSample], known: Callable[[OmniSample], object]) -> float:
    """Exact match on half of the samples of what the other half answers most to what is known."""
    answers: dict[object, Counter[str]] = defaultdict(Counter)
    for sample in samples[::2]:
        (asked,) = sample.asked
        answers[asked.question, known(sample)][asked.answer] += 1
    others = samples[1::2]
    return sum(
        counts.most_common(1)[0][0] == asked.answer
        for sample in others
        for asked in sample.asked
        if (counts := answers[asked.question, known(sample)])
    ) / len(others)


def test_chances_are_those_of_the_best_guess() -> None:
    by_kind: dict[str, list[OmniSample]] = defaultdict(list)
    config = OmniDigitsConfig(num_val=50_000)
    for sample in plan_samples("val", range(1790), LABELS, config):
        by_kind[sample.kind].append(sample)
    sees: dict[str, Callable[[OmniSample], object]] = {
        "image": lambda s: s.shown and s.shown.digit,
        "audio": lambda s: s.dialled,
        "video": lambda s: frozenset((moving.digit, moving.towards) for moving in s.moving),
    }
    for kind, facts in KINDS.items():
        samples = by_kind[kind]
        needed = samples[0].media
        assert tuple(facts.chances) == needed
        for hidden, chance in facts.chances.items():
            others = [sees[medium] for medium in needed if medium != hidden]
            guessed = best_guess(samples, lambda s, others=others: tuple(see(s) for see in others))
            error = (chance * (1 - chance) / (len(samples) / 2)) ** 0.5
            assert abs(guessed - chance) < 4 * error, (kind, hidden)


# -- on disk ---------------------------------------------------------------------------------------


def test_files_are_what_the_text_says(folder: Path) -> None:
    samples = stored(folder)
    assert len(samples) == 98
    for sample in samples.values():
        dialled, moving = sample["dialled"], sample["moving"]
        assert (sample["shown"] is not None) == ("png" in sample)
        if "png" in sample:
            assert Image.open(io.BytesIO(sample["png"])).height >= 24
        if dialled is not None:
            assert heard(*read_clip(sample["flac"])) == dialled
        if moving:
            frames, towards = read_mp4(sample["mp4"]), moving[0]["towards"]
            parts = [frames] if len(moving) == 1 else lanes(frames, towards)
            assert {way(part) for part in parts} == {one["towards"] for one in moving}


def test_splits_share_no_handwritten_digit(folder: Path) -> None:
    sources: dict[str, set[int]] = {"train": set(), "val": set()}
    for key, sample in stored(folder).items():
        shown = [] if sample["shown"] is None else [sample["shown"]]
        sources[key.split("-")[0]] |= {one["source"] for one in (*shown, *sample["moving"])}
    assert min(map(len, sources.values())) > 15
    assert not sources["train"] & sources["val"]


def test_questions_are_read_back(folder: Path) -> None:
    samples = stored(folder)
    for question in read_omni_digits(folder, "val"):
        sample = samples[question.key]
        texts = [message["content"] for message in sample["messages"]]
        assert [question.question, question.answer] == texts
        assert re.findall("<([a-z]+)>", question.question) == list(question.files)
        found = {"image": "png", "audio": "flac", "video": "mp4"}
        assert question.files == {
            medium: sample[ending] for medium, ending in found.items() if ending in sample
        }


def test_same_seed_same_shards(folder: Path, tmp_path: Path) -> None:
    again = write_omni_digits(tmp_path / "again", CONFIG)
    other = OmniDigitsConfig(num_train=70, num_val=28, seed=6)
    different = write_omni_digits(tmp_path / "different", other)
    for shard in ("train/000000.tar", "val/000000.tar"):
        assert (again / shard).read_bytes() == (folder / shard).read_bytes()
        assert (different / shard).read_bytes() != (folder / shard).read_bytes()


def test_a_missing_split_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="write one with `megatron-mimo data omni-digits --out"):
        read_omni_digits(tmp_path, "val")


# -- the tokenizer ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceTokenizer:
    path = write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return HuggingFaceTokenizer(str(path), {"encoder": "<image>", "audio": "<so_embedding>"})


def test_questions_are_words_and_numbers_are_digits(
    folder: Path, tokenizer: HuggingFaceTokenizer
) -> None:
    for question in read_omni_digits(folder, "train"):
        asked = re.sub("<[a-z]+>", "", question.question)
        assert len(tokenizer.encode(asked)) == len(re.findall(r"\w+|\?", asked))
        pieces = re.findall(r"\d| |[a-z]+", question.answer)
        assert len(tokenizer.encode(question.answer)) == len(pieces)
        assert tokenizer.decode(tokenizer.encode(question.answer)) == question.answer


def test_times_of_frames_are_short(tokenizer: HuggingFaceTokenizer) -> None:
    (label,) = group_labels(range(2), 4.0, 2)
    assert len(tokenizer.encode(label)) < len(label) / 2


@pytest.mark.parametrize("text", ["Ça va?", "7 3\n5", "<image>😀", ""])
def test_any_text_comes_back(text: str, tokenizer: HuggingFaceTokenizer) -> None:
    tokens = tokenizer.encode(text)
    assert tokenizer.pretrained.decode(tokens, skip_special_tokens=False) == text


def test_the_tokenizer_is_the_same_each_time(tmp_path: Path) -> None:
    first, second = (write_tokenizer(tmp_path / name) for name in "ab")
    assert (first / "tokenizer.json").read_bytes() == (second / "tokenizer.json").read_bytes()
