"""Conversion of stored samples that energon cannot read to samples with an error.

energon drops such a sample silently, or stops. Here each becomes a sample that has its error, so
that it is counted, and skipped by every reader of its lane.
"""

from typing import Any

from megatron.energon import SavableDataset
from megatron.energon.flavors import CrudeSample
from megatron.energon.flavors.webdataset.sample_loader import WebdatasetSampleLoaderDataset
from megatron.energon.source_info import SourceInfo
from megatron.energon.wrappers.map_dataset import MapDataset

from megatron_mimo.border import reason_of

# The part that replaces all others of a sample that cannot be read.
UNREADABLE_PART = "__unreadable__"


def keep_unreadable(dataset: SavableDataset[Any]) -> SavableDataset[Any]:
    """Make a crude dataset of energon yield samples in place of those that it cannot read.

    For a sample in a damaged shard, `UNREADABLE_PART` has the reason. A line of JSON Lines that
    does not parse keeps its bytes.
    """
    if isinstance(dataset, MapDataset) and isinstance(
        dataset.dataset, WebdatasetSampleLoaderDataset
    ):
        loader = dataset.dataset
        loader.join_readers = [_Guarded(reader) for reader in loader.join_readers]
        dataset.map_fn = _KeepingMalformed(dataset.map_fn)
    return dataset


class _Guarded:
    """A reader of stored samples that returns its errors as samples.

    Args:
        reader: Reader of energon: sample number -> sample.
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
        except (OSError, MemoryError) as error:
            # Others than of a missing file may concern only one host, and stop the run.
            if not isinstance(error, FileNotFoundError):
                raise
            return self._unreadable(index, error)
        # A damaged shard makes energon raise nearly anything, the same on every rank.
        except Exception as error:
            return self._unreadable(index, error)
        finally:
            # An archive keeps a record of each file that it reads, for as long as it is open.
            for archive in getattr(self._reader, "itar_files_cache", {}).values():
                archive.members.clear()

    def _unreadable(self, index: int, error: Exception) -> dict[str, Any]:
        path, shard = _place(self._reader, index)
        source = SourceInfo(dataset_path=path, index=index, shard_name=shard, file_names=())
        return {
            "__key__": str(index),
            "__shard__": shard,
            "__restore_key__": ("Webdataset", index),
            "__sources__": (source,),
            UNREADABLE_PART: f"its shard cannot be read: {reason_of(error)}",
        }


class _KeepingMalformed:
    """Makes a sample from the parts of a line, with JSON as bytes where it does not parse.

    Args:
        load: Function of energon: stored parts -> sample.
    """

    def __init__(self, load: Any) -> None:
        self._load = load
        # energon names the function in the config that it compares when a run continues.
        self.__module__ = load.__module__
        self.__qualname__ = load.__qualname__

    def __call__(self, stored: Any) -> Any:
        try:
            return self._load(stored)
        except Exception:
            return CrudeSample(stored.data[0])


def _place(reader: Any, index: int) -> tuple[Any, str]:
    """Dataset and shard of a sample."""
    bounds = getattr(reader, "shard_count_cumsum", None)
    if bounds is None:
        return getattr(reader, "jsonl_path", "an unknown dataset"), "of an unknown name"
    number = next(i for i, end in enumerate(bounds[1:]) if index < end)
    return reader.base_path, reader.tar_filenames[reader.shard_tar_file_idxs[number]]
