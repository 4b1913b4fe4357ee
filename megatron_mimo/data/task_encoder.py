"""What energon does with a stored sample: parse, check, encode."""

import json
import re
from dataclasses import dataclass
from typing import Any

from megatron.energon import Cooker, Sample, TaskEncoder, edataclass, stateless

from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.sample import (
    Outcome,
    RawSample,
    RejectedSample,
    SkippedSample,
    try_encode,
)
from megatron_mimo.data.tokenizer import Tokenizer

_IMAGE_PARTS = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "ppm")


@edataclass
class _Stored(Sample):
    """The files of a webdataset sample, not yet looked into.

    Attributes:
        parts: Ending -> contents.
    """

    parts: dict[str, bytes]


@stateless  # type: ignore[untyped-decorator]
def _cook(sample: dict[str, Any]) -> _Stored:
    return _Stored(
        __key__=sample["__key__"],
        __restore_key__=sample["__restore_key__"],
        __subflavors__=sample.get("__subflavors__"),
        __sources__=sample.get("__sources__"),
        parts={name: part for name, part in sample.items() if not name.startswith("__")},
    )


class MimoTaskEncoder(TaskEncoder):
    """Turns stored samples into outcomes. Nothing raises in here: see `sample.Outcome`."""

    # Bytes come through untouched; images are decoded by `sample.encode_sample`.
    decoder = None
    cookers = (Cooker(_cook),)

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, *, with_patches: bool) -> None:
        super().__init__()
        self._config = config
        self._tokenizer = tokenizer
        self._with_patches = with_patches

    @stateless  # type: ignore[untyped-decorator]
    def encode_sample(self, sample: Any) -> Outcome:
        """Parse, check and encode a sample."""
        source = _source(sample)
        if not isinstance(sample, _Stored):
            return RejectedSample(
                message=f"sample {sample.__key__!r} of {source} is a {type(sample).__name__}: "
                f"expected a crude dataset; write `__module__: megatron.energon` and "
                f"`__class__: CrudeWebdataset` into its .nv-meta/dataset.yaml"
            )
        parsed = parse_parts(sample.__key__, source, sample.parts)
        if not isinstance(parsed, RawSample):
            return parsed
        return try_encode(parsed, self._config, self._tokenizer, with_patches=self._with_patches)


def _source(sample: Any) -> str:
    sources = sample.__sources__
    if not sources:
        return "an unknown dataset"
    return f"dataset {sources[0].dataset_path}, shard {sources[0].shard_name}"


@dataclass(frozen=True, slots=True)
class _Text:
    question: str
    answer: str


def parse_parts(
    key: str, source: str, parts: dict[str, bytes]
) -> RawSample | SkippedSample | RejectedSample:
    """Make sense of a stored sample: `json` with question and answer, and any number of images.

    Args:
        key: Of the sample.
        source: Dataset and shard, for errors.
        parts: File ending -> contents. Images are ordered by their endings, numbers by value:
            "2.png" before "10.png".
    """
    where = f"sample {key!r} of {source}"
    unknown = [
        name for name in parts if name != "json" and name.split(".")[-1].lower() not in _IMAGE_PARTS
    ]
    if unknown or "json" not in parts:
        return RejectedSample(
            message=f"{where} has the files {', '.join(sorted(parts))}: expected json and images "
            f"({', '.join(_IMAGE_PARTS)})"
        )
    text = _parse_text(parts["json"])
    if isinstance(text, UnicodeDecodeError | json.JSONDecodeError):
        return SkippedSample(key=key, source=source, reason=f"its json is malformed: {text}")
    if isinstance(text, str):
        return RejectedSample(message=f"{where} {text}")
    names = sorted((name for name in parts if name != "json"), key=_natural_order)
    return RawSample(
        key=key,
        question=text.question,
        answer=text.answer,
        images=tuple(parts[name] for name in names),
        source=source,
    )


def _parse_text(data: bytes) -> _Text | str | UnicodeDecodeError | json.JSONDecodeError:
    """Question and answer; or what is wrong with the contents; or why they are no JSON."""
    try:
        content = json.loads(data.decode())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        return error
    fields = content if isinstance(content, dict) else {}
    question, answer = fields.get("question"), fields.get("answer")
    if isinstance(question, str) and isinstance(answer, str):
        return _Text(question, answer)
    found = ", ".join(fields) if isinstance(content, dict) else type(content).__name__
    return f"has a json with {found or 'no fields'}: expected the texts question and answer"


def _natural_order(name: str) -> list[tuple[int, str]]:
    return [(int(t), "") if t.isdigit() else (-1, t) for t in re.split(r"(\d+)", name) if t]
