"""Items of a sample as figures of a page, as their encoders take them: pixels, frames, sound."""

import base64
import html
import io
import math
import wave
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image

from megatron_mimo.data.inputs import Inputs, Item, ItemInput
from megatron_mimo.data.samples.sample import EncodedSample, RawSample
from megatron_mimo.media.audio import AudioInput, EncodedClip
from megatron_mimo.media.audio.decode import decode_or_silence
from megatron_mimo.media.images import EncodedImage
from megatron_mimo.media.processors import ProcessedImage, ProcessorInput
from megatron_mimo.media.video.clip import EncodedVideo
from megatron_mimo.media.video.config import VideoConfig
from megatron_mimo.media.video.input import VideoInput
from megatron_mimo.tools.data.statistics import kind_of_item

# Bounds on what a page holds of one item.
_MOST_FRAMES, _LONGEST_SIDE = 16, 192
_MOST_SECONDS = 30
_COLUMNS = 400


def figures(document: EncodedSample, stored: RawSample, inputs: Inputs) -> str:
    """A figure of each item that can be shown, in the order of the modules and of the tokens.

    Args:
        document: Sample with the content of its items.
        stored: The same sample with the files of its items.
        inputs: Kinds of items.
    """
    numbers: Counter[str] = Counter()
    made = []
    for module, items in document.items.items():
        for item in items:
            name = kind_of_item(item, module, inputs)
            source = stored.items[name][numbers[name]]
            numbers[name] += 1
            kind = inputs[name]
            made.append(_figure(f"{kind.words.noun} {numbers[name]}", item, source, kind))
    return "".join(made)


def _figure(name: str, item: Item, source: Any, kind: ItemInput) -> str:
    """The figure of an item; nothing for items of kinds that are not known here."""
    if isinstance(item, EncodedVideo) and isinstance(kind, VideoInput):
        shown, words = _strip(item, kind.config, name)
    elif isinstance(item, EncodedClip) and isinstance(kind, AudioInput):
        shown, words = _sound(source, kind, name)
    elif (seen := _seen(item, kind)) is not None:
        pictures, words = seen
        shown = "".join(_picture(pixels, name) for pixels in pictures)
    else:
        return ""
    return (
        f"<figure>{shown}<figcaption>{html.escape(name)}: {words}, {item.rows} rows</figcaption>"
        f"</figure>"
    )


def _picture(pixels: NDArray[np.uint8], name: str) -> str:
    data = base64.b64encode(_png(pixels)).decode("ascii")
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(name)}">'


def _seen(item: Item, kind: ItemInput) -> tuple[list[NDArray[np.uint8]], str] | None:
    """What an encoder sees of an image, and words for it; None for items of other kinds."""
    if isinstance(item, EncodedImage):
        patch_dim = _patch_dim(item)
        rows, columns = item.grids[0]
        pieces = f", {len(item.grids)} pieces" if len(item.grids) > 1 else ""
        size = f"{columns * patch_dim} x {rows * patch_dim} pixels"
        return list(unpatchify(item)), f"{size}, {columns} x {rows} patches{pieces}"
    if isinstance(item, ProcessedImage) and isinstance(kind, ProcessorInput):
        pictures = kind.pictures(item)
        height, width = pictures[0].shape[:2]
        pieces = f", {len(pictures)} tiles" if len(pictures) > 1 else ""
        size = f"{width} x {height} pixels"
        return pictures, f"{size}, {item.outline.num_tokens} tokens of the tower{pieces}"
    return None


def _png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _patch_dim(image: EncodedImage) -> int:
    assert image.patches is not None, "the image was encoded without patches"
    return math.isqrt(image.patches.shape[1] // 3)


def unpatchify(image: EncodedImage) -> Iterator[NDArray[np.uint8]]:
    """The pixels of an image's pieces, uint8 [H, W, 3] each, from its patches.

    Args:
        image: Encoded image with patches.
    """
    patch_dim = _patch_dim(image)
    assert image.patches is not None
    start = 0
    for rows, columns in image.grids:
        patches = image.patches[start : start + rows * columns]
        start += rows * columns
        pixels = rearrange(
            patches,
            "(row column) (c y x) -> (row y) (column x) c",
            row=rows,
            y=patch_dim,
            x=patch_dim,
        )
        yield np.rint(pixels.clip(0, 255)).astype(np.uint8)


# -- videos ----------------------------------------------------------------------------------------


def _strip(video: EncodedVideo, config: VideoConfig, name: str) -> tuple[str, str]:
    """Small pictures of some frames of a video, evenly chosen, and words for it."""
    frames = list(frames_of(video, config))
    chosen = np.unique(np.linspace(0, len(frames) - 1, _MOST_FRAMES).round().astype(int))
    pictures = "".join(_picture(_small(frames[at]), f"{name}, frame {at + 1}") for at in chosen)
    rows, columns = video.grid
    size = f"{columns * config.patch_dim} x {rows * config.patch_dim} pixels"
    shown = f", {len(chosen)} shown" if len(chosen) < len(frames) else ""
    words = f"{len(frames)} frames of {size}{shown}, {columns} x {rows} patches"
    return f'<div class="frames">{pictures}</div>', words


def frames_of(video: EncodedVideo, config: VideoConfig) -> Iterator[NDArray[np.uint8]]:
    """The frames of a video as its encoder takes them, uint8 [H, W, 3] each.

    Args:
        video: Encoded video with patches.
        config: Settings that it was encoded with.
    """
    assert video.patches is not None, "the video was encoded without patches"
    rows, columns = video.grid
    pixels = rearrange(
        video.patches,
        "(group row column) (frame c y x) -> (group frame) (row y) (column x) c",
        row=rows,
        column=columns,
        frame=config.temporal_patch,
        c=3,
        y=config.patch_dim,
    )
    # The last group may be filled up with its last frame.
    last = 1 + video.labels[-1].count(" and ")
    number = (len(video.labels) - 1) * config.temporal_patch + last
    for frame in pixels[:number]:
        yield np.rint(frame.clip(0, 255)).astype(np.uint8)


def _small(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    picture = Image.fromarray(pixels)
    picture.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    return np.asarray(picture)


# -- clips -----------------------------------------------------------------------------------------


def _sound(source: Any, kind: AudioInput, name: str) -> tuple[str, str]:
    """The wave form of a clip as its encoder hears it, a player of its beginning, and words."""
    heard, _ = decode_or_silence(source, kind.examine(source), kind.config)
    rate = kind.config.sampling_rate
    played = heard[: _MOST_SECONDS * rate]
    data = base64.b64encode(_wav(played, rate)).decode("ascii")
    player = f'<audio controls src="data:audio/wav;base64,{data}"></audio>'
    shown = f", the first {_MOST_SECONDS} play" if len(played) < len(heard) else ""
    words = f"{len(heard) / rate:.2f} seconds at {rate:,} Hz{shown}"
    return f"{_envelope(heard, name)}{player}", words


def _wav(heard: NDArray[np.float32], rate: int) -> bytes:
    """A WAV file of 16 bits of a wave form."""
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(rate)
        writer.writeframes(np.rint(heard.clip(-1, 1) * 32767).astype("<i2").tobytes())
    return file.getvalue()


def _envelope(heard: NDArray[np.float32], name: str) -> str:
    """A drawing of the largest and smallest sample of each of many parts of a wave form."""
    parts: Sequence[NDArray[np.float32]] = np.array_split(heard, min(_COLUMNS, len(heard)))
    most = max(float(np.abs(heard).max()), 1e-9)
    above = [f"{x},{50 - 48 * float(part.max()) / most:.1f}" for x, part in enumerate(parts)]
    below = [f"{x},{50 - 48 * float(part.min()) / most:.1f}" for x, part in enumerate(parts)]
    points = " ".join([*above, *reversed(below)])
    return (
        f'<svg viewBox="0 0 {len(parts)} 100" preserveAspectRatio="none" role="img" '
        f'aria-label="wave form of {html.escape(name)}"><polygon points="{points}" '
        f'fill="#3b6fb6" stroke="#3b6fb6"/></svg>'
    )
