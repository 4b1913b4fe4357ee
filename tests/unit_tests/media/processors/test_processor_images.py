"""Images of folders of vision-language models against the processors of transformers."""

import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_mimo.media.images import blank_image
from megatron_mimo.media.items import BrokenItemError
from megatron_mimo.media.processors import ProcessedImages, ProcessorInput, read_processor
from tests.unit_tests.media.processors.folders import MODEL_TYPES, save_folder

Kind = tuple[ProcessorInput, Any]
Load = Callable[[str], Kind]
# Wide and high images, small and large ones, whole patches and others; heights and widths.
SIZES = ((24, 40), (64, 64), (9, 131), (133, 8), (48, 16), (200, 190))


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Family -> its items, and the processor of transformers."""
    from transformers import AutoProcessor

    root = tmp_path_factory.mktemp("folders")

    @cache
    def load(model_type: str) -> Kind:
        folder = root / model_type
        config = save_folder(model_type, folder)
        return read_processor(folder, model_type, config), AutoProcessor.from_pretrained(folder)

    return load


def picture(height: int, width: int, seed: int = 0) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng((seed, height, width))
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def encode(kind: ProcessorInput, images: Sequence[np.ndarray[Any, Any]]) -> list[Any]:
    """The images of a sample."""
    one = kind.among(len(images))
    return [one.encode(image, one.examine(image), with_content=True)[0] for image in images]


def theirs(processor: Any, images: Sequence[np.ndarray[Any, Any]]) -> Mapping[str, Any]:
    """What the processor makes of a sample with a text of images."""
    text = processor.image_token * len(images)
    pictures = [Image.fromarray(image) for image in images]
    made: Mapping[str, Any] = processor(
        text=[text], images=[pictures], return_tensors="pt", add_special_tokens=False
    )
    return made


def unpadded(name: str, model_type: str, value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Without the padding of Gemma's processor beyond the largest image."""
    if model_type != "gemma4":
        return value
    assert like.shape[1] < value.shape[1]
    rest = value[:, like.shape[1] :]
    assert (rest == (0 if name == "pixel_values" else -1)).all()
    return value[:, : like.shape[1]]


@pytest.mark.parametrize("sizes", [SIZES, SIZES[:1], SIZES[2:3]], ids=["many", "one", "wide"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_sample_is_that_of_the_processor(
    load: Load, model_type: str, sizes: Sequence[tuple[int, int]]
) -> None:
    kind, processor = load(model_type)
    images = [picture(*size) for size in sizes]
    items, made = encode(kind, images), theirs(processor, images)
    packed = kind.pack(items, [0] * len(items))
    assert packed is not None
    assert packed.places == tuple(range(len(images)))
    for name, ours in zip(packed.names, packed.tensors, strict=True):
        wanted = unpadded(name, model_type, made[name], ours)
        assert ours.dtype == wanted.dtype
        torch.testing.assert_close(ours, wanted, rtol=0, atol=0)
    # The text: every mark is one token, and so is a row.
    numbers = {mark: processor.tokenizer.convert_tokens_to_ids(mark) for mark in kind.marks}
    token = processor.image_token_id
    written = []
    for piece in (piece for item in items for piece in kind.layout(item)):
        written += [token] * piece if isinstance(piece, int) else [numbers[piece]]
    assert written == made["input_ids"][0].tolist()


@pytest.mark.parametrize("several", [False, True], ids=["alone", "several"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_headers_tell_the_number_of_rows(load: Load, model_type: str, several: bool) -> None:
    kind, processor = load(model_type)
    kind = kind.among(1 + several)
    rng = np.random.default_rng(7)
    for height, width in np.exp(rng.uniform(np.log(6), np.log(400), (500, 2))).astype(int).tolist():
        image = np.broadcast_to(np.uint8(0), (height, width, 3))
        shape = kind.examine(image)
        item, _ = kind.encode(image, shape, with_content=False)
        if kind.several:
            assert item.rows == processor.num_image_tokens + 1
            continue
        (wanted,) = processor._get_num_multimodal_tokens(image_sizes=[(height, width)])[
            "num_image_tokens"
        ]
        # Mistral's counts the marks too.
        marks = len(item.outline.lines) if model_type == "mistral3" else 0
        assert item.rows + marks == wanted, (height, width)


def test_a_size_that_the_processor_refuses_is_a_broken_image(load: Load) -> None:
    kind, processor = load("qwen3_vl")
    image = picture(2, 500)
    with pytest.raises(ValueError, match="absolute aspect ratio") as error:
        theirs(processor, [image])
    with pytest.raises(BrokenItemError, match="image of 500 x 2 pixels is not taken by") as found:
        kind.examine(image)
    assert str(error.value) in str(found.value)


def test_a_file_that_does_not_decode_is_a_blank(load: Load) -> None:
    import io

    kind, _ = load("qwen3_vl")
    file = io.BytesIO()
    Image.fromarray(picture(40, 40)).save(file, "bmp")
    shape = kind.examine(file.getvalue())
    item, reason = kind.encode(file.getvalue()[:-200], shape, with_content=True)
    blank, none = kind.encode(np.asarray(blank_image(40, 40)), shape, with_content=True)
    assert reason is not None and none is None
    assert item.content is not None and blank.content is not None
    assert (item.content["pixel_values"] == blank.content["pixel_values"]).all()


def test_images_of_samples_with_several_come_last(load: Load) -> None:
    kind, _ = load("llava_onevision")
    alone, pair = encode(kind, [picture(40, 24)]), encode(kind, [picture(8, 60), picture(60, 8)])
    packed = kind.pack([*pair, *alone], [0] * 3)
    assert packed is not None
    assert packed.places == (1, 2, 0)
    assert packed.rows == (17, 17, alone[0].rows)
    counts = dict(zip(packed.names, packed.tensors, strict=True))["batch_num_images"]
    assert counts.tolist() == [1, 2]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_tower_makes_as_many_rows(load: Load, model_type: str) -> None:
    from transformers import AutoConfig, AutoModelForImageTextToText

    kind, _ = load(model_type)
    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(kind.folder)
    model = AutoModelForImageTextToText.from_config(config).eval()
    rng = np.random.default_rng(3)
    sizes = np.exp(rng.uniform(np.log(8), np.log(200), (12, 2))).astype(int).tolist()
    # The first of two images alone on its rank, and images of one to three in a sample.
    samples = [sizes[:1], sizes[1:3], sizes[3:4], sizes[4:7], *([size] for size in sizes[7:])]
    items = [
        item
        for number, sample in enumerate(samples)
        for item in encode(kind, [picture(*size, seed=number) for size in sample])
    ]
    for chosen in (items, items[1:2], items[1:4]):
        packed = kind.pack(chosen, [0] * len(chosen))
        assert packed is not None
        rows = rows_of(model, packed)
        assert tuple(len(each) for each in rows) == packed.rows == tuple(i.rows for i in chosen)
        for item, found in zip(chosen, rows, strict=True):
            single = kind.pack([item], [0])
            assert single is not None
            torch.testing.assert_close(found, rows_of(model, single)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "size"),
    # Sizes that the processors keep.
    [
        ("gemma4", (56, 80)),
        ("llava_onevision", (16, 16)),
        ("mistral3", (32, 40)),
        ("qwen3_vl", (32, 40)),
    ],
)
def test_pictures_are_what_the_tower_sees(
    load: Load, model_type: str, size: tuple[int, int]
) -> None:
    kind, _ = load(model_type)
    image = picture(*size)
    seen = kind.pictures(encode(kind, [image])[0])
    assert len(seen) == (2 if model_type == "llava_onevision" else 1)
    for pixels in seen:
        assert pixels.dtype == np.uint8
        assert (pixels == image).all()


def rows_of(model: Any, packed: ProcessedImages) -> list[torch.Tensor]:
    """Rows of each image, in manifest order."""
    with torch.no_grad():
        found = model.get_image_features(**dict(zip(packed.names, packed.tensors, strict=True)))
    made = found.pooler_output
    return [made[place] for place in packed.places]


# -- folders ---------------------------------------------------------------------------------------


def test_a_folder_of_an_unknown_family_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="type idefics3, whose images are not known: expected one"):
        read_processor(tmp_path, "idefics3", {})


def test_a_folder_without_a_processor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no processor: expected processor_config.json or pre"):
        read_processor(tmp_path, "gemma4", {})


def test_a_folder_that_does_not_load_is_refused(tmp_path: Path) -> None:
    config = save_folder("qwen3_vl", tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "processor_config.json").write_text('{"image_processor": {}}')
    with pytest.raises(ValueError, match="holds no processor that transformers can load"):
        read_processor(tmp_path, "qwen3_vl", config)


def test_a_processor_of_another_family_is_refused(tmp_path: Path) -> None:
    config = save_folder("qwen3_vl", tmp_path)
    with pytest.raises(ValueError, match="a Qwen3VLProcessor with a Qwen2VLImageProcessor: expect"):
        read_processor(tmp_path, "mistral3", config)


def test_a_processor_that_contradicts_the_model_is_refused(tmp_path: Path) -> None:
    config = save_folder("qwen3_vl", tmp_path)
    tower = {**config["vision_config"], "patch_size": 8}
    with pytest.raises(
        ValueError, match="has image_processor.patch_size 4, and config.json vision"
    ):
        read_processor(tmp_path, "qwen3_vl", {**config, "vision_config": tower})
    with pytest.raises(
        ValueError, match="'<.image_pad.>' as token 7, and config.json says that im"
    ):
        read_processor(tmp_path, "qwen3_vl", {**config, "image_token_id": 9})


def test_without_torchvision_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = save_folder("qwen3_vl", tmp_path)
    monkeypatch.setattr("megatron_mimo.media.processors.read.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs torchvision, which is not installed: pip install"):
        read_processor(tmp_path, "qwen3_vl", config)


def test_a_processor_without_a_number_that_it_needs_is_refused(tmp_path: Path) -> None:
    config = save_folder("llava_onevision", tmp_path)
    file = tmp_path / "processor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_image_tokens": None}))
    with pytest.raises(ValueError, match="has a processor that takes no image: TypeError"):
        read_processor(tmp_path, "llava_onevision", config)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_reader_processes_get_the_image_processor_alone(load: Load, model_type: str) -> None:
    kind, _ = load(model_type)
    sent = pickle.dumps(kind)
    assert len(sent) < 20_000
    taken: ProcessorInput = pickle.loads(sent)
    assert taken == kind
    (ours,), (theirs,) = (encode(each, [picture(24, 40)]) for each in (kind, taken))
    assert ours.outline == theirs.outline
    for name, value in ours.content.items():
        assert (value == theirs.content[name]).all()


# -- mock images -----------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_mock_images_fit(load: Load, model_type: str) -> None:
    kind, _ = load(model_type)
    kind.check_mock(128)
    for seed in range(20):
        made = kind.mock(np.random.default_rng(seed), 128)
        items = encode(kind, made.sources)
        assert made.question.count("<image>") == len(items)
        assert sum(item.rows for item in items) + len(made.question) - 7 * len(items) <= 128
    with pytest.raises(ValueError, match="a mock image of the processor of .* takes .* raise it"):
        kind.check_mock(35)
