"""Stored samples that energon cannot read, made samples like others.

energon drops such a sample without a word, or stops. Here each becomes a sample that says what is
wrong with it, so that it is counted, and left out by every reader of its lane.
"""

import tarfile
from typing import Any

from megatron.energon import SavableDataset
from megatron.energon.flavors import CrudeSample
from megatron.energon.flavors.webdataset.sample_loader import WebdatasetSampleLoaderDataset
from megatron.energon.source_info import SourceInfo
from megatron.energon.wrappers.map_dataset import MapDataset

# The part of a sample that stands for all others, where it cannot be read.
UNREADABLE_PART = "__unreadable__"

# What a shard that is missing, empty or cut short raises, for whoever reads it. Other errors of the
# file system may be one host's alone, and stop the run.
_SHARD_ERRORS = (FileNotFoundError, EOFError, ValueError, tarfile.TarError)


def keep_unreadable(dataset: SavableDataset[Any]) -> SavableDataset[Any]:
    """Let a crude dataset, as energon built it, yield samples for what it cannot read.

    Of a sample in a damaged shard, `UNREADABLE_PART` says why. A line of JSON Lines that does not
    parse keeps its bytes.
    """
    if isinstance(dataset, MapDataset) and isinstance(
        dataset.dataset, WebdatasetSampleLoaderDataset
    ):
        loader = dataset.dataset
        loader.join_readers = [_Guarded(reader) for reader in loader.join_readers]
        dataset.map_fn = _KeepingMalformed(dataset.map_fn)
    return dataset


class _Guarded:
    """A reader of stored samples whose failures are samples.

    Args:
        reader: Sample number -> sample.
    """

    def __init__(self, reader: Any) -> None:
        self._reader = reader

    def __len__(self) -> int:
        return len(self._reader)

    def __str__(self) -> str:
        return str(self._reader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    def __getitem__(self, index: int) -> Any:
        try:
            return self._reader[index]
        except _SHARD_ERRORS as error:
            path, shard = _place(self._reader, index)
            source = SourceInfo(dataset_path=path, index=index, shard_name=shard, file_names=())
            return {
                "__key__": str(index),
                "__shard__": shard,
                "__restore_key__": ("Webdataset", index),
                "__sources__": (source,),
                UNREADABLE_PART: f"its shard cannot be read: {error}",
            }


class _KeepingMalformed:
    """Makes a sample of a line's parts, its JSON as bytes where it does not parse.

    Args:
        load: Stored parts -> sample.
    """

    def __init__(self, load: Any) -> None:
        self._load = load
        # energon names the function in the config that it compares when a run goes on.
        self.__module__ = load.__module__
        self.__qualname__ = load.__qualname__

    def __call__(self, stored: Any) -> Any:
        try:
            return self._load(stored)
        except (ValueError, RecursionError):
            return CrudeSample(stored.data[0])


def _place(reader: Any, index: int) -> tuple[Any, str]:
    """Dataset and shard of a sample."""
    bounds = getattr(reader, "shard_count_cumsum", None)
    if bounds is None:
        return getattr(reader, "jsonl_path", "an unknown dataset"), "of an unknown name"
    number = next(i for i, end in enumerate(bounds[1:]) if index < end)
    return reader.base_path, reader.tar_filenames[reader.shard_tar_file_idxs[number]]
