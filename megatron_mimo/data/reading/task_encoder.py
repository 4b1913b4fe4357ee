"""The processing of a stored sample in energon: parse, check, encode."""

import re
from collections.abc import Collection, Mapping
from typing import Any, Protocol

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

from megatron_mimo.border import reason_of
from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.inputs import Inputs
from megatron_mimo.data.loader.sequences import PackableSample, SequenceDataset
from megatron_mimo.data.reading.unreadable import UNREADABLE_PART, keep_unreadable
from megatron_mimo.data.samples.media import MediaFolder, require_below, shortened
from megatron_mimo.data.samples.sample import (
    Outcome,
    RawSample,
    RejectedSample,
    SkippedSample,
    UnusableError,
    add_content,
    name_source,
    try_encode,
)
from megatron_mimo.data.text.clean import MalformedError
from megatron_mimo.data.text.conversation import (
    Conversation,
    forms_of,
    parse_caption,
    parse_conversation,
    parse_json,
)
from megatron_mimo.data.text.tokenizer import Tokenizer
from megatron_mimo.media.audio.endings import AUDIO_ENDINGS
from megatron_mimo.media.video.endings import VIDEO_ENDINGS

_TEXT_PARTS = ("json", "txt")


@edataclass
class _Stored(Sample):
    """The files of a sample, before parsing.

    Attributes:
        parts: File ending -> contents; JSON that energon has already parsed stays parsed.
        media: Store of energon with the files that the JSON names by path.
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
    """The folder of the dataset's shards, or of its JSON Lines file."""
    path = EPath(str(sample["__sources__"][0].dataset_path))
    return SystemFileStore(path.parent if path.name.endswith(".jsonl") else path)


class Media(Protocol):
    """The files that samples name by path."""

    @property
    def folder(self) -> object:
        """Where they are, for messages."""
        ...

    def read(self, path: str, what: str) -> bytes:
        """Contents of a file.

        Raises:
            UnusableError: The sample may not name it, or it is missing.
            OSError: This host cannot read it.
        """
        ...


class _Stores:
    """Files in the shards of a dataset, or in a remote folder, that a metadataset names as `media`.

    Args:
        store: Store of energon, which looks a name up in its index.
    """

    def __init__(self, store: FileStore[bytes]) -> None:
        self._store = store

    @property
    def folder(self) -> str:
        return str(self._store.get_path())

    def read(self, path: str, what: str) -> bytes:
        require_below(path, what, self.folder)
        try:
            data: bytes = self._store[path][0]
        except (OSError, MemoryError):
            raise
        # A name that it does not have, in any form.
        except Exception as error:
            raise UnusableError(
                "missing file", f"its {what} {shortened(path)} is not in {self.folder}"
            ) from error
        return data


class MimoTaskEncoder(TaskEncoder):
    """Converts stored samples to outcomes. It raises no errors: see `sample.Outcome`."""

    # Bytes stay unchanged; items are decoded by `sample.encode_sample`.
    decoder = None
    cookers = (Cooker(_cook),)

    def __init__(
        self, config: DataConfig, tokenizer: Tokenizer, *, content: Collection[str]
    ) -> None:
        super().__init__()
        self._config = config
        self._tokenizer = tokenizer
        self._content = content
        self._folders: dict[str, MediaFolder] = {}

    @stateless  # type: ignore[untyped-decorator]
    def encode_sample(self, sample: Any) -> Outcome | PackableSample:
        """Parse, check and encode a sample."""
        parsed = self.parse(sample)
        if self._config.packing_buffer_size is None:
            return self._encode(parsed, self._content)
        # Items are decoded when a sample leaves the packing buffer: with their content it would be
        # large, and slow to fill when a run continues.
        outcome = self._encode(parsed, ())
        inputs = self._config.inputs
        packable: PackableSample = PackableSample.derive_from(
            sample,
            outcome=outcome,
            raw=parsed
            if isinstance(parsed, RawSample) and parsed.has_items(self._content, inputs)
            else None,
        )
        return packable

    def parse(self, sample: Any) -> RawSample | SkippedSample | RejectedSample:
        """Parse a stored sample, without checking or encoding it."""
        source = _source(sample)
        if not isinstance(sample, _Stored):
            return RejectedSample(
                message=f"sample {sample.__key__!r} of {source} is a {type(sample).__name__}: "
                f"expected a crude dataset; write `__module__: megatron.energon` and "
                f"`__class__: CrudeWebdataset` into its .nv-meta/dataset.yaml"
            )
        media = self._media(sample.media)
        return read_sample(sample.__key__, source, sample.parts, media, self._config.inputs)

    def _media(self, store: FileStore[bytes]) -> Media:
        """The files that samples of a dataset may name."""
        if not isinstance(store, SystemFileStore) or not store.base_dir.is_local():
            return _Stores(store)
        # Energon would follow any path, and fetch what is named by URL.
        folder = store.get_path()
        if folder not in self._folders:
            self._folders[folder] = MediaFolder(folder, self._config.media_root)
        return self._folders[folder]

    def _encode(
        self, parsed: RawSample | SkippedSample | RejectedSample, content: Collection[str]
    ) -> Outcome:
        if not isinstance(parsed, RawSample):
            return parsed
        return try_encode(parsed, self._config, self._tokenizer, content=content)

    def build_cook_crude_sample(
        self, dataset: SavableDataset[Any], **settings: Any
    ) -> SavableDataset[Any]:
        """The first stage that energon builds, which keeps samples that it cannot read."""
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
            lambda sample, raw: add_content(sample, raw, self._config, self._content),
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
    media: Media,
    inputs: Inputs,
) -> RawSample | SkippedSample | RejectedSample:
    """Parse a stored sample: `json` or `txt`, and any number of items.

    Where both are there, `txt` is the caption, and `json` must have no other text.

    Args:
        key: Key of the sample.
        source: Dataset and shard, for error messages.
        parts: File ending -> contents; `json` may be parsed already. A part is an item of the
            kind with whose noun it begins ("image.2.png", "audio.mp4"), else of the first kind
            whose files have its ending. Items are ordered by their endings, numbers by value:
            "2.png" before "10.png".
        media: Files that the JSON names; not used for a module with items among the parts.
        inputs: Kinds of items of the run.
    """
    if UNREADABLE_PART in parts:
        return SkippedSample(
            key=key, source=source, kind="unreadable shard", reason=parts[UNREADABLE_PART]
        )
    texts = {name.lower(): part for name, part in parts.items() if name.lower() in _TEXT_PARTS}
    others = [name for name in parts if name.lower() not in _TEXT_PARTS]
    modules = {name: _module_of(name, inputs) for name in others}
    where = f"sample {key!r} of {source}"
    if len(texts) + len(others) < len(parts) or not texts or None in modules.values():
        return RejectedSample(message=f"{where} {_wrong_files(parts, inputs)}")
    items: dict[str, list[Any]] = {module: [] for module in inputs}
    for name in sorted(modules, key=_natural_order):
        items[modules[name] or ""].append(parts[name])
    stored = {module: len(of_module) for module, of_module in items.items()}
    try:
        conversation = _parse(texts, inputs, stored)
    except MalformedError as error:
        return SkippedSample(key=key, source=source, kind="malformed text", reason=str(error))
    except ValueError as error:
        return RejectedSample(message=f"{where} {error}")
    for module, paths in conversation.paths.items():
        if items[module]:
            continue
        words = inputs[module].words
        try:
            items[module] = [media.read(path, words.noun) for path in paths]
        except UnusableError as error:
            return SkippedSample(key=key, source=source, kind=error.kind, reason=str(error))
        except OSError as error:
            return RejectedSample(
                message=f"{where} names {words.one} that cannot be read here "
                f"({reason_of(error)}): check that this host can read {media.folder}"
            )
    return RawSample(
        key=key,
        turns=conversation.turns,
        items={module: tuple(of_module) for module, of_module in items.items() if of_module},
        source=source,
    )


def _module_of(name: str, inputs: Inputs) -> str | None:
    """The module whose item a part is; None for other parts."""
    first, ending = name.split(".")[0].lower(), name.split(".")[-1].lower()
    takers = [module for module, kind in inputs.items() if ending in kind.endings]
    # A named part may have the ending of another kind: "audio.mp4" is the sound of a video.
    named = [module for module, kind in inputs.items() if takers and kind.words.noun == first]
    return next(iter(named or takers), None)


def _wrong_files(parts: Mapping[str, Any], inputs: Inputs) -> str:
    known = ", ".join(
        f"{kind.words.plural} ({', '.join(kind.endings)})" for kind in inputs.values()
    )
    dotted = [name for name in parts if name.lower().endswith((".json", ".txt"))]
    why = "; a key ends at its first dot: rename files without further dots" if dotted else ""
    unknown = [
        noun
        for noun, endings in (("audio", AUDIO_ENDINGS), ("video", VIDEO_ENDINGS))
        if noun not in {kind.words.noun for kind in inputs.values()}
        and any(name.lower().rpartition(".")[2] in endings for name in parts)
    ]
    if unknown:
        why += (
            f"; the model takes no {' and no '.join(unknown)}: use a dataset without, or a model "
            f"that takes them, without --load-hf-without {unknown[0]}"
        )
    return f"has the files {', '.join(sorted(parts))}: expected json or txt, and {known}{why}"


def _parse(texts: Mapping[str, Any], inputs: Inputs, stored: Mapping[str, int]) -> Conversation:
    if "json" not in texts:
        return parse_caption(texts["txt"], inputs, stored)
    part = texts["json"]
    content = parse_json(part) if isinstance(part, bytes) else part
    if "txt" not in texts:
        return parse_conversation(content, inputs, stored)
    # As img2dataset writes them: a caption, and what is known about its image.
    forms = [form for form in forms_of(content) if form != "caption"]
    if forms:
        raise ValueError(
            f"has a json with {' and '.join(forms)} and a txt: expected one text; remove the txt"
        )
    return parse_caption(texts["txt"], inputs, stored)


def _natural_order(name: str) -> list[tuple[int, str]]:
    return [(int(t), "") if t.isdigit() else (-1, t) for t in re.split(r"(\d+)", name) if t]
