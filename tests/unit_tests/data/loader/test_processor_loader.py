"""Steps of images of folders of vision-language models: manifests, packed inputs and facts."""

import io
import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_mimo.data import DataConfig
from megatron_mimo.data.inputs import placeholders
from megatron_mimo.data.loader.batch import Microbatch, TextBatch
from megatron_mimo.data.loader.stream_loader import build_train_loader
from megatron_mimo.data.loader.wire import WireTypes, decode_step, encode_step
from megatron_mimo.data.reading.webdataset import prepare, write_shard
from megatron_mimo.data.role import DataRole, SourceRole, data_role
from megatron_mimo.data.text.tokenizer import HuggingFaceTokenizer
from megatron_mimo.media.processors import ProcessedImages, ProcessorInput, read_processor
from megatron_mimo.topology import Layout, ModuleGridSpec
from tests.unit_tests.data.loader.test_wire import assert_same
from tests.unit_tests.media.processors.folders import MODEL_TYPES, save_folder

NAMES = {"qwen3_vl": {"image_grid_thw"}, "qwen3_5": {"image_grid_thw"}}


class Folder(NamedTuple):
    kind: ProcessorInput
    tokenizer: HuggingFaceTokenizer


Load = Callable[[str], Folder]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    root = tmp_path_factory.mktemp("folders")

    @cache
    def load(model_type: str) -> Folder:
        folder = root / model_type
        kind = read_processor(folder, model_type, save_folder(model_type, folder))
        return Folder(kind, HuggingFaceTokenizer(str(folder), placeholders({"encoder": kind})))

    return load


def facts_of(microbatch: Microbatch) -> Mapping[str, torch.Tensor]:
    assert microbatch.text is not None
    return microbatch.text.facts


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_both_ends_describe_the_same_images(load: Load, model_type: str) -> None:
    folder = load(model_type)
    config = DataConfig(
        inputs={"encoder": folder.kind},
        seq_length=256,
        micro_batch_size=2,
        global_batch_size=8,
        text_only_fraction=0.2,
    )
    layout = Layout.of(
        ModuleGridSpec(name="encoder", dp=2),
        ModuleGridSpec(name="llm", dp=2, offset=2),
        world_size=4,
    )
    # The same layout with one encoder rank has all images of a lane in one place.
    steps = [
        build_train_loader(config, data_role(layout, rank), folder.tokenizer).next_step()
        for rank in range(4)
    ]
    token = folder.tokenizer.placeholder_ids["encoder"]
    for encoder, text in ((steps[0], steps[2]), (steps[1], steps[3])):
        for sent, taken in zip(encoder.microbatches, text.microbatches, strict=True):
            assert sent.manifest == taken.manifest
            assert not taken.inputs and taken.text is not None
            places = [
                (entry.sequence, entry.start + row)
                for entry in taken.manifest
                for row in range(entry.rows)
            ]
            assert places == [tuple(p) for p in (taken.text.input_ids == token).nonzero().tolist()]
            if not taken.manifest:
                assert not sent.inputs and not taken.text.facts
                continue
            images = sent.inputs["encoder"]
            assert isinstance(images, ProcessedImages)
            assert sum(images.rows) == len(places)
            lines = [entry.rows for entry in sent.manifest]
            if model_type == "mistral3":
                assert len(lines) > len(images.rows)
            elif model_type != "llava_onevision":
                # Its images may stand side by side.
                assert lines == list(images.rows)
            facts = taken.text.facts
            assert set(facts) == NAMES.get(model_type, set())
            for name, values in facts.items():
                given = dict(zip(images.names, images.tensors, strict=True))
                assert values.dtype == torch.int64
                assert values.tolist() == given[name].tolist()
    types = WireTypes.of(config.inputs)
    for step in steps:
        assert_same(decode_step(encode_step(step, types), types), step)


def test_facts_of_a_packed_sequence_are_those_of_its_documents(load: Load, tmp_path: Path) -> None:
    from transformers import AutoProcessor

    folder = load("qwen3_vl")
    processor = AutoProcessor.from_pretrained(folder.kind.folder)
    random = np.random.default_rng(0)
    samples: list[tuple[str, Mapping[str, bytes]]] = []
    grids: dict[str, list[Any]] = {}
    for number in range(24):
        key, files, images = f"s{number:02d}", {}, []
        for image in range(number % 3):
            pixels = random.integers(0, 256, (*random.integers(8, 40, 2), 3), dtype=np.uint8)
            images.append(Image.fromarray(pixels))
            file = io.BytesIO()
            images[-1].save(file, "png")
            files[f"{image}.png"] = file.getvalue()
        text = {"question": "<image>" * len(images) + "?", "answer": "a" * (1 + number)}
        samples.append((key, {**files, "json": json.dumps(text).encode()}))
        made = processor.image_processor(images, return_tensors="pt") if images else None
        grids[key] = [] if made is None else made["image_grid_thw"].tolist()
    (tmp_path / "train").mkdir()
    write_shard(tmp_path / "train/0.tar", samples)
    prepare(tmp_path, ["train/0.tar"])
    config = DataConfig(
        provider="energon",
        path=str(tmp_path),
        inputs={"encoder": folder.kind},
        seq_length=256,
        packing_buffer_size=8,
        global_batch_size=4,
    )
    role = DataRole(
        lanes=(0,),
        num_lanes=1,
        text_lane=0,
        sources={"encoder": SourceRole(rank=None, serving={0: (0,)})},
    )
    loader = build_train_loader(config, role, folder.tokenizer)
    several = False
    for _ in range(2):
        for microbatch in loader.next_step().microbatches:
            text = microbatch.text
            assert isinstance(text, TextBatch) and not microbatch.inputs
            wanted = [grid for key in text.sample_keys for grid in grids[key]]
            several |= sum(bool(grids[key]) for key in text.sample_keys) > 1
            assert text.facts["image_grid_thw"].tolist() == wanted
    assert several
