"""Image processing of a folder, to and from the files of transformers' processor."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_mimo.settings.ranges import MOST_POSITIONS

PROCESSOR, PREPROCESSOR = "processor_config.json", "preprocessor_config.json"
VIDEO_FILE = "video_preprocessor_config.json"
IMAGES, VIDEOS, SOUNDS = "image_processor", "video_processor", "feature_extractor"
"""Sections of processor_config.json."""
_CLASS = "NemotronH_Omni_Reasoning_V3"
MERGE = 0.5
"""Side of a grid of rows, as a fraction of that of patches."""
# Defaults of transformers' image processor.
MIN_PATCHES, MAX_PATCHES = 1024, 13312
_CONTEXT = 16384
_VIDEO_PATCHES = 1024
# A context that no image fills, which is how the processor says that images are not bounded.
_NO_BOUND = 2**40
# Fields of before transformers had the model, and of its code in a folder.
_OLDER = ("norm_mean", "norm_std", "auto_map", "do_normalize")


def read_processing(folder: Path) -> dict[str, Any]:
    """The image processor's settings, where transformers looks for them; empty without a file.

    Raises:
        ValueError: A file is not JSON.
    """
    for name, section in ((PROCESSOR, IMAGES), (PREPROCESSOR, None)):
        found = read_json(folder / name)
        held: dict[str, Any] | None = found if section is None else found.get(section)
        if held:
            return held
    return {}


def read_max_patches(processing: Mapping[str, Any]) -> int:
    """Largest number of patches of an image; the language model's context is a bound too.

    Args:
        processing: The image processor's settings.

    Returns:
        The number; 0 where images are not bounded.
    """
    context: int = processing.get("max_model_len", _CONTEXT)
    least: int = processing.get("min_num_patches", MIN_PATCHES)
    of_context = max(_patches(context), least)
    most: int = processing.get("max_num_patches", MAX_PATCHES)
    bound = max(min(most or of_context, of_context), least)
    return 0 if bound > MOST_POSITIONS else bound


def write_processor(
    folder: Path,
    *,
    patch_dim: int,
    pixel_mean: tuple[float, float, float],
    pixel_std: tuple[float, float, float],
    min_patches: int,
    max_patches: int,
    frames: int,
) -> None:
    """Write how transformers makes patches of images.

    What the folder says of sounds and videos stays; where it says nothing, transformers' defaults
    are written, since its processor does not load without them.

    Args:
        folder: Folder to write into.
        patch_dim: Side of a patch in pixels, P.
        pixel_mean: Mean of each channel, in [0, 1].
        pixel_std: Standard deviation of each channel.
        min_patches: Smallest number of patches of an image.
        max_patches: Largest number of patches; 0 is uncapped.
        frames: Number of frames of a video that are embedded at once.

    Raises:
        ValueError: A file of the folder is not JSON.
    """
    images = {
        "image_processor_type": f"{_CLASS}ImageProcessor",
        "do_normalize": True,
        "image_mean": list(pixel_mean),
        "image_std": list(pixel_std),
        "patch_size": patch_dim,
        "downsample_ratio": MERGE,
        "min_num_patches": min_patches,
        "max_num_patches": max_patches,
        # One image may have as many as there are, however long the context is.
        "max_model_len": max(_CONTEXT, _context(max_patches)) if max_patches else _NO_BOUND,
    }
    videos = {
        "video_processor_type": f"{_CLASS}VideoProcessor",
        "norm_mean": list(pixel_mean),
        "norm_std": list(pixel_std),
        "patch_size": patch_dim,
        "downsample_ratio": MERGE,
        "video_target_num_patches": min(_VIDEO_PATCHES, max_patches or _VIDEO_PATCHES),
    }
    found, before = read_json(folder / PROCESSOR), read_processing(folder)
    merged = {name: value for name, value in before.items() if name not in _OLDER} | images
    whole = {
        "processor_class": f"{_CLASS}Processor",
        "video_temporal_patch_dim": frames,
        VIDEOS: videos,
        SOUNDS: _sounds(folder),
        **found,
        IMAGES: merged,
    }
    older = read_json(folder / PREPROCESSOR)
    if (folder / VIDEO_FILE).exists() and VIDEOS not in found:
        del whole[VIDEOS]
    if "feature_extractor_type" in older and SOUNDS not in found:
        del whole[SOUNDS]
    write_json(folder / PROCESSOR, whole)
    if older:
        # So that the two do not differ.
        kept = {name: value for name, value in older.items() if name not in _OLDER}
        write_json(folder / PREPROCESSOR, kept | images)


def _sounds(folder: Path) -> dict[str, Any]:
    """What transformers has for recordings, with as many mel bins as the folder's audio takes."""
    audio = read_json(folder / "config.json").get("audio_config") or {}
    bins = {"feature_size": audio["num_mel_bins"]} if "num_mel_bins" in audio else {}
    return {"feature_extractor_type": "ParakeetFeatureExtractor", **bins}


def _patches(context: int) -> int:
    """Number of patches of an image that fills a context, as the processor counts them."""
    return round(1 / MERGE) ** 2 * (context - 4)


def _context(patches: int) -> int:
    return -(-patches // _patches(5)) + 4


def read_json(path: Path) -> dict[str, Any]:
    """Contents of a JSON file of a folder; empty where there is none.

    Raises:
        ValueError: The file is not JSON.
    """
    if not path.exists():
        return {}
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return found


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file of a folder."""
    path.write_text(json.dumps(content, indent=2) + "\n")
