"""Writes small datasets with `datasets`, and what that package reads of them.

Usage: python write_hub_datasets.py FOLDER, in a process that can import `datasets`.
"""

import io
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets.arrow_dataset
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from datasets import Sequence as ListOfFields
from datasets.data_files import get_data_patterns, resolve_pattern
from PIL import Image as Picture

# The hash of a table takes pickling that this Python does not do; nothing here is cached.
datasets.arrow_dataset.generate_fingerprint = lambda dataset: "0"
TEXT, INT = Value("string"), Value("int64")


def picture(number: int, kind: str = "PNG", mode: str = "RGB") -> dict[str, Any]:
    """An image as the hub stores it."""
    shape = (9 + number % 3, 12, {"L": 1, "RGB": 3, "RGBA": 4}[mode])
    pixels = np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)
    content = io.BytesIO()
    Picture.fromarray(pixels.squeeze()).convert(mode).save(content, kind)
    return {"bytes": content.getvalue(), "path": f"{number}.somewhere"}


def turns(*texts: str, keys: Sequence[str], roles: Sequence[str]) -> list[dict[str, str]]:
    return [dict(zip(keys, (roles[n % 2], text), strict=True)) for n, text in enumerate(texts)]


def part(kind: str, text: str | None = None, index: int | None = None) -> dict[str, Any]:
    return {"type": kind, "text": text, "index": index}


LLAVA = {"keys": ("from", "value"), "roles": ("human", "gpt")}
CHAT = {"keys": ("role", "content"), "roles": ("user", "assistant")}
ROUND = {"user": TEXT, "assistant": TEXT, "source": TEXT}
PART = {"index": INT, "text": TEXT, "type": TEXT}
VOTES = ["racket", "net", "a net", "net", "net"]

# Name -> rows, and types where they do not follow from the rows.
FORMS: dict[str, tuple[dict[str, list[Any]], dict[str, Any]]] = {
    "vqa": (
        {
            "question_type": ["what is", "is the"],
            "multiple_choice_answer": ["net", "yes"],
            "answers": [
                [{"answer": text, "answer_id": n} for n, text in enumerate(VOTES)],
                [{"answer": "yes", "answer_id": 1}],
            ],
            "question_id": [262148000, 262148001],
            "question": ["What is behind?", "Is the sky blue?"],
            "image": [picture(1, "JPEG"), picture(1, "JPEG")],
        },
        {"answers": List({"answer": TEXT, "answer_id": INT})},
    ),
    "textvqa": (
        {
            "image": [picture(2, mode="L"), picture(3, "WEBP")],
            "question": ["Which brand?", "What time?"],
            "answers": [["nokia", "nokia", "toshiba"], ["5:41", "5:40"]],
            "ocr_tokens": [["NOKIA"], []],
            "flickr_url": ["http://x/1.jpg", None],
        },
        {},
    ),
    "chartqa": (
        {
            "image": [picture(4, mode="RGBA")],
            "query": ["How many?\nCount."],
            "label": [["14"]],
            "human_or_machine": [1],
        },
        {"human_or_machine": ClassLabel(names=["human", "machine"])},
    ),
    "scienceqa": (
        {
            "image": [picture(5), None, picture(6)],
            "question": ["Which is north?", "Which word?", "Which is hot?"],
            "choices": [["Maine", "Texas"], ["a", "b", "c"], ["ice", "fire"]],
            "answer": [1, 2, 0],
            "task": ["closed choice"] * 3,
            "lecture": ["", "Words.", "Heat."],
        },
        {"answer": Value("int8")},
    ),
    "letters": (
        {
            "image": [picture(7)] * 3,
            "question": ["Which?"] * 3,
            "options": [["red", "green"], ["red", "green"], ["1", "2"]],
            "answer": ["B", "red", "2"],
        },
        {},
    ),
    "classes": (
        {"image": [picture(8)], "question": ["Which?"], "answer": [1], "split_of_origin": [2.5]},
        {"answer": ClassLabel(names=["cat", "dog"])},
    ),
    "cauldron": (
        {
            "images": [[picture(9), picture(10, "BMP")], [picture(11)]],
            "texts": [
                [{"user": "Same?", "assistant": "No.", "source": "nlvr"}],
                [
                    {"user": "What?", "assistant": "A card.", "source": "x"},
                    {"user": "Which colour?", "assistant": "Red.", "source": "x"},
                ],
            ],
        },
        {"texts": List(ROUND)},
    ),
    "fields": (
        {
            "images": [[picture(9)]],
            "texts": [{"user": ["What?", "Why?"], "assistant": ["A.", "B."], "source": ["x", "x"]}],
        },
        {"texts": ListOfFields(ROUND)},
    ),
    "llava": (
        {
            "id": ["a", "b"],
            "image": [picture(12), None],
            "conversations": [
                turns("<image>\nWhat?", "A card.", "Why?", "So.", **LLAVA),
                turns("2 + 2?", "4", **LLAVA),
            ],
        },
        {},
    ),
    "chat": (
        {
            "images": [[picture(13)], [picture(14), picture(15)]],
            "messages": [
                turns("What?", "A card.", **CHAT),
                turns("One <image>, two <image>?", "Yes.", **CHAT),
            ],
        },
        {},
    ),
    "parts": (
        {
            "images": [[picture(16), picture(17)]],
            "messages": [
                [
                    {
                        "role": "user",
                        "content": [
                            part("text", "Left: "),
                            part("image", index=1),
                            part("text", " right: "),
                            part("image", index=0),
                        ],
                    },
                    {"role": "assistant", "content": [part("text", "Yes.")]},
                ]
            ],
        },
        {"messages": List({"content": List(PART), "role": TEXT})},
    ),
}


def dataset_of(name: str) -> Dataset:
    rows, types = FORMS[name]
    kinds = {
        "image": Image(),
        "images": List(Image()),
    }
    known = {column: kinds[column] for column in rows if column in kinds} | types
    plain = Dataset.from_dict({column: rows[column] for column in rows if column not in known})
    return Dataset.from_dict(
        rows, features=Features({**{c: known.get(c) or plain.features[c] for c in rows}})
    )


def pixels_of(dataset: Dataset) -> list[list[np.ndarray]]:
    """Pixels of the images of each row, transparent ones over white."""
    found = []
    for row in dataset:
        images = row["images"] if "images" in row else [row["image"]]
        found.append([])
        for image in images:
            if image is not None:
                canvas = Picture.new("RGBA", image.size, "white")
                canvas.alpha_composite(image.convert("RGBA"))
                found[-1].append(np.asarray(canvas.convert("RGB")))
    return found


# Layout -> files, of which `datasets` says the splits.
LAYOUTS: dict[str, list[str]] = {
    "sharded": ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet",
                "data/testmini-00000-of-00001-0123456789abcdef.parquet",
                "data/val-00000-of-00001.parquet"],
    "flat": ["train-00000-of-00001.parquet", "val-00000-of-00001.parquet"],
    "folders": ["default/train/0000.parquet", "default/validation/0000.parquet"],
    "words": ["my_dev.parquet", "my.training.parquet", "eval 1.parquet"],
    "none": ["a.parquet", "b/latest.parquet"],
}  # fmt: skip


def splits_of(folder: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for split, patterns in get_data_patterns(str(folder)).items():
        paths: set[str] = set()
        for pattern in patterns:
            with suppress(FileNotFoundError):  # Of several patterns one is enough.
                paths.update(resolve_pattern(pattern, str(folder)))
        found[str(split)] = sorted(str(Path(path).relative_to(folder)) for path in paths)
    return found


def main(out: Path) -> None:
    for name in FORMS:
        dataset = dataset_of(name)
        (out / name / "data").mkdir(parents=True)
        dataset.to_parquet(out / name / "data/train-00000-of-00001.parquet", batch_size=1)
        arrays = {
            f"{row}-{n}": image
            for row, images in enumerate(pixels_of(dataset))
            for n, image in enumerate(images)
        }
        np.savez(out / f"{name}.npz", **arrays)
    vqa = dataset_of("vqa")
    DatasetDict({"train": vqa, "validation": vqa.select([1])}).save_to_disk(out / "saved")
    found = {}
    for name, files in LAYOUTS.items():
        for file in files:
            (out / "layouts" / name / file).parent.mkdir(parents=True, exist_ok=True)
            (out / "layouts" / name / file).write_bytes(b"")
        found[name] = splits_of(out / "layouts" / name)
    (out / "layouts.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
