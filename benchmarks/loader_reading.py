"""Reading a sample for the language model: image headers only, against decoding its images."""

import io
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from benchlib.ranks import turns
from benchlib.report import Row, Size
from PIL import Image

from megatron_mimo.data import ByteTokenizer, DataConfig, DataRole, RawSample, SourceRole
from megatron_mimo.data.reading.readers import train_streams
from megatron_mimo.data.reading.webdataset import prepare, write_shard
from megatron_mimo.data.samples.sample import try_encode
from megatron_mimo.media.images import ImageConfig, ImageInput, decode_image

# Pictures of a data set of web pages and photographs: (width, height).
_SIZES = ((320, 240), (640, 480), (500, 375), (448, 448), (360, 640), (800, 600))
_ANSWER_BYTES = 1200
_OPTIONS: dict[str, dict[str, int]] = {"JPEG": {"quality": 90}, "PNG": {}, "WEBP": {"quality": 85}}


_ROUNDS: dict[Size, int] = {"smoke": 1, "quick": 5, "full": 15}


def rows(size: Size) -> list[Row]:
    """Time of a sample on ranks of the language model.

    The peer does the same and decodes the images, as a reader does that knows no roles; it throws
    the pixels away. In the last row both read shards through energon, and the peer cuts patches.

    Args:
        size: Number of repetitions.
    """
    images = ImageInput(config=ImageConfig(patch_dim=16, max_patches=0))
    config = DataConfig(seq_length=16384, inputs={"encoder": images})
    tokenizer = ByteTokenizer()
    rounds = _ROUNDS[size]
    found = []
    for kind in _OPTIONS:
        samples = list(_samples(kind))

        def read(*, decoding: bool, samples: list[RawSample] = samples) -> None:
            for sample in samples:
                try_encode(sample, config, tokenizer, content=())
                if decoding:
                    for image in sample.items["encoder"]:
                        decode_image(image)

        found.append(_row(f"a sample with a {kind} picture", "decoded", read, rounds, len(samples)))
    with tempfile.TemporaryDirectory() as folder:
        path = _write(Path(folder))
        energon = replace(config, provider="energon", path=str(path), shuffle_buffer_size=0)
        streams = [
            train_streams(energon, _role(pixels=pixels), tokenizer)[0] for pixels in (False, True)
        ]

        def read_shards(*, decoding: bool) -> None:
            for _ in range(len(_OPTIONS) * len(_SIZES)):
                next(streams[decoding])

        number = len(_OPTIONS) * len(_SIZES)
        found.append(_row("a sample from shards", "cut into patches", read_shards, rounds, number))
    return found


def _row(line: str, otherwise: str, read: Callable[..., None], rounds: int, samples: int) -> Row:
    milliseconds: dict[str, list[float]] = {"headers": [], "images": []}
    for repetition in range(rounds + 1):
        for way in turns(tuple(milliseconds), repetition):
            start = time.perf_counter()
            read(decoding=way == "images")
            # The first round warms up.
            if repetition:
                milliseconds[way].append(1e3 * (time.perf_counter() - start) / samples)
    return Row(
        table="Image headers alone",
        line=line,
        column=f"by the same {otherwise}",
        ours=tuple(milliseconds["headers"]),
        peer=tuple(milliseconds["images"]),
        target=1 / 3,
        unit="ms",
    )


def _write(folder: Path) -> Path:
    """All pictures as an Energon dataset."""
    (folder / "train").mkdir()
    stored = [
        (
            f"{kind}{sample.key}",
            {
                "json": json.dumps({"question": sample.question, "answer": sample.answer}).encode(),
                kind.lower(): bytes(sample.items["encoder"][0]),
            },
        )
        for kind in _OPTIONS
        for sample in _samples(kind)
    ]
    write_shard(folder / "train/0.tar", stored)
    prepare(folder, ["train/0.tar"])
    return folder


def _role(*, pixels: bool) -> DataRole:
    return DataRole(
        lanes=(0,),
        num_lanes=1,
        text_lane=None if pixels else 0,
        sources={"encoder": SourceRole(rank=0 if pixels else None, serving={0: (0,)})},
    )


def _samples(kind: str) -> Iterator[RawSample]:
    answer = json.dumps({"said": "it shows "}) * (_ANSWER_BYTES // 22)
    for number, (width, height) in enumerate(_SIZES):
        file = io.BytesIO()
        _picture(width, height, number).save(file, kind, **_OPTIONS[kind])
        yield RawSample.asking(
            key=str(number),
            question="<image>What does the picture show?",
            answer=answer,
            items={"encoder": (file.getvalue(),)},
        )


def _picture(width: int, height: int, seed: int) -> Image.Image:
    """Soft shapes and a little noise, which compress about as photographs do."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (height // 32, width // 32, 3), dtype=np.uint8)
    soft = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    noisy = np.asarray(soft) + random.normal(0, 6, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
