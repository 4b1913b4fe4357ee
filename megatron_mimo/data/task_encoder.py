"""What energon does with a stored sample: parse, check, encode."""

import re
from collections.abc import Mapping
from typing import Any

from megatron.energon import (
    Cooker,
    Sample,
    SavableDataset,
    TaskEncoder,
    WorkerConfig,
    basic_sample_keys,
    edataclass,
    stateless,
)
from megatron.energon.cache import FileStore
from megatron.energon.cache.file_store import SystemFileStore
from megatron.energon.epathlib import EPath

from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.conversation import (
    Conversation,
    MalformedError,
    parse_caption,
    parse_conversation,
    parse_json,
)
from megatron_mimo.data.sample import (
    Outcome,
    RawSample,
    RejectedSample,
    SkippedSample,
    UnusableError,
    add_patches,
    name_source,
    try_encode,
)
from megatron_mimo.data.sequences import PackableSample, SequenceDataset
from megatron_mimo.data.tokenizer import Tokenizer
from megatron_mimo.data.unreadable import UNREADABLE_PART, keep_unreadable

IMAGE_PARTS = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "ppm")
_TEXT_PARTS = ("json", "txt")
# What energon's stores of files raise for a file that is not there, whoever asks. Other errors of
# the file system may be one host's alone, and stop the run.
_MISSING = (FileNotFoundError, IsADirectoryError, NotADirectoryError, KeyError)


@edataclass
class _Stored(Sample):
    """The files of a sample, not yet looked into.

    Attributes:
        parts: Ending -> contents; JSON that energon has parsed already as it is.
        media: Holds the files that its JSON names by path.
    """

    parts: dict[str, Any]
    media: FileStore[bytes]


@stateless  # type: ignore[untyped-decorator]
def _cook(sample: dict[str, Any], *, media: Any = None, **_aux: Any) -> _Stored:
    return _Stored(
        **basic_sample_keys(sample),
        parts={
            name: part
            for name, part in sample.items()
            if not name.startswith("__") or name == UNREADABLE_PART
        },
        media=_beside(sample) if media is None else media,
    )


def _beside(sample: dict[str, Any]) -> FileStore[bytes]:
    """The folder of the dataset: of its shards, or of its JSON Lines."""
    path = EPath(str(sample["__sources__"][0].dataset_path))
    return SystemFileStore(path.parent if path.name.endswith(".jsonl") else path)


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
    def encode_sample(self, sample: Any) -> Outcome | PackableSample:
        """Parse, check and encode a sample."""
        parsed = self._parse(sample)
        if self._config.packing_buffer_size is None:
            return self._encode(parsed, with_patches=self._with_patches)
        # Pixels are decoded when a sample leaves the packing buffer: it would be large with them,
        # and slow to fill when a run goes on.
        outcome = self._encode(parsed, with_patches=False)
        packable: PackableSample = PackableSample.derive_from(
            sample,
            outcome=outcome,
            raw=parsed
            if self._with_patches and isinstance(parsed, RawSample) and parsed.images
            else None,
        )
        return packable

    def _parse(self, sample: Any) -> RawSample | SkippedSample | RejectedSample:
        source = _source(sample)
        if not isinstance(sample, _Stored):
            return RejectedSample(
                message=f"sample {sample.__key__!r} of {source} is a {type(sample).__name__}: "
                f"expected a crude dataset; write `__module__: megatron.energon` and "
                f"`__class__: CrudeWebdataset` into its .nv-meta/dataset.yaml"
            )
        return read_sample(
            sample.__key__, source, sample.parts, sample.media, self._config.image_token
        )

    def _encode(
        self, parsed: RawSample | SkippedSample | RejectedSample, *, with_patches: bool
    ) -> Outcome:
        if not isinstance(parsed, RawSample):
            return parsed
        return try_encode(parsed, self._config, self._tokenizer, with_patches=with_patches)

    def build_cook_crude_sample(
        self, dataset: SavableDataset[Any], **settings: Any
    ) -> SavableDataset[Any]:
        """The first stage that energon builds: samples that it cannot read pass through."""
        return super().build_cook_crude_sample(keep_unreadable(dataset), **settings)

    def build_batch(
        self,
        dataset: SavableDataset[Any],
        *,
        batch_size: int | None,
        batch_drop_last: bool = False,
        packing_buffer_size: int | None = None,
        worker_config: WorkerConfig,
    ) -> SavableDataset[Any]:
        """The last stage that energon builds: packing, or nothing. Loaders make the batches."""
        assert batch_size is None, batch_size
        if packing_buffer_size is None:
            return dataset
        return SequenceDataset(
            dataset,
            packing_buffer_size,
            self._config.seq_length,
            lambda sample, raw: add_patches(sample, raw, self._config),
            worker_config=worker_config,
        )


def _source(sample: Any) -> str:
    sources = sample.__sources__
    if not sources:
        return "an unknown dataset"
    return name_source(sources[0].dataset_path, sources[0].shard_name)


def read_sample(
    key: str,
    source: str,
    parts: Mapping[str, Any],
    media: FileStore[bytes],
    image_token: str,
) -> RawSample | SkippedSample | RejectedSample:
    """Make sense of a stored sample: `json` or `txt`, and any number of images.

    Args:
        key: Of the sample.
        source: Dataset and shard, for errors.
        parts: File ending -> contents; `json` may be parsed already. Images are ordered by their
            endings, numbers by value: "2.png" before "10.png".
        media: Has the files that the JSON names, unless images stand among the parts.
        image_token: Placeholder of an image.
    """
    if UNREADABLE_PART in parts:
        return SkippedSample(
            key=key, source=source, kind="unreadable shard", reason=parts[UNREADABLE_PART]
        )
    images = {name: part for name, part in parts.items() if _ending(name) in IMAGE_PARTS}
    texts = [name for name in parts if name in _TEXT_PARTS]
    where = f"sample {key!r} of {source}"
    if len(texts) != 1 or len(images) + 1 < len(parts):
        return RejectedSample(
            message=f"{where} has the files {', '.join(sorted(parts))}: expected json or txt, and "
            f"images ({', '.join(IMAGE_PARTS)})"
        )
    try:
        conversation = _parse(texts[0], parts[texts[0]], image_token, len(images))
    except MalformedError as error:
        return SkippedSample(key=key, source=source, kind="malformed text", reason=str(error))
    except ValueError as error:
        return RejectedSample(message=f"{where} {error}")
    stored = [images[name] for name in sorted(images, key=_natural_order)]
    if not stored:
        try:
            stored = [_fetch(media, path) for path in conversation.image_paths]
        except UnusableError as error:
            return SkippedSample(key=key, source=source, kind=error.kind, reason=str(error))
        except (OSError, ValueError) as error:
            return RejectedSample(
                message=f"{where} names an image that cannot be read here ({error}): check that "
                f"this host can read {media.get_path()}"
            )
    return RawSample(key=key, turns=conversation.turns, images=tuple(stored), source=source)


def _parse(name: str, part: Any, image_token: str, num_images: int) -> Conversation:
    if name == "txt":
        return parse_caption(part, image_token, num_images)
    content = parse_json(part) if isinstance(part, bytes) else part
    return parse_conversation(content, image_token, num_images)


def _fetch(media: FileStore[bytes], path: str) -> bytes:
    try:
        data: bytes = media[path][0]
    except _MISSING as error:
        raise UnusableError(
            "missing file", f"its image {path} is not in {media.get_path()}"
        ) from error
    return data


def _ending(name: str) -> str:
    return name.split(".")[-1].lower()


def _natural_order(name: str) -> list[tuple[int, str]]:
    return [(int(t), "") if t.isdigit() else (-1, t) for t in re.split(r"(\d+)", name) if t]
