"""What is wrong with a dataset on disk, in words that say what to do."""

import tarfile
from pathlib import Path

from megatron.energon.epathlib import EPath
from megatron.energon.flavors.webdataset.empty_dataset_error import EmptyDatasetError
from megatron.energon.flavors.webdataset.metadata import EnergonDatasetType, get_dataset_type

# What reading a missing, empty or cut shard raises.
READ_ERRORS = (OSError, EOFError, ValueError, tarfile.TarError)
# What energon raises when it cannot make sense of a folder.
OPEN_ERRORS = (AssertionError, EmptyDatasetError, OSError, ValueError, KeyError, TypeError)


def checked_path(given: str) -> str:
    """The dataset's path, after the mistakes that users make first.

    Raises:
        ValueError: Nothing is there, or nothing that energon could read.
    """
    path = Path(given)
    if not path.exists():
        raise ValueError(
            f"--data-path {path} does not exist: expected an Energon dataset; "
            f"`megatron-mimo data digits --out {path}` writes one to try"
        )
    kind = get_dataset_type(EPath(path))
    if path.is_dir() and kind is not EnergonDatasetType.WEBDATASET:
        raise ValueError(
            f"--data-path {path} is not prepared for Energon: {path / '.nv-meta' / '.info.json'} "
            f"is missing; run `megatron-mimo data prepare {path}` on a folder of tar files, or on "
            f"images or JSON Lines with --out, the dataset to make"
        )
    if path.is_file() and kind not in (EnergonDatasetType.METADATASET, EnergonDatasetType.JSONL):
        raise ValueError(
            f"--data-path {path} is a file that Energon cannot train from here: expected a "
            f"dataset folder, JSON Lines ending in .jsonl, or a metadataset ending in .yaml"
        )
    if kind is EnergonDatasetType.JSONL and not path.with_suffix(".jsonl.idx").is_file():
        raise ValueError(
            f"--data-path {path} is not prepared for Energon: {path.with_suffix('.jsonl.idx')} is "
            f"missing; run `energon prepare {path}`, or make shards of it with `megatron-mimo data "
            f"prepare {path} --out DIR`"
        )
    return str(path)


def unreadable_split(path: str, split: str, error: Exception) -> ValueError:
    """For an error while a split's metadata was read."""
    reason = str(error) or type(error).__name__
    return ValueError(
        f"--data-path {path}: the {split} split cannot be opened ({reason}): expected .nv-meta "
        f"with split.yaml and dataset.yaml, and shards for {split}; run `energon prepare {path}` "
        f"again"
    )


def unreadable_shard(path: str, error: Exception) -> str:
    """The message for an error while samples were read."""
    reason = str(error).strip() or type(error).__name__
    return (
        f"--data-path {path}: a shard cannot be read ({reason}): check that every tar file of "
        f"the dataset is there and whole, and run `energon prepare` after changing one"
    )


def unfit_state(path: str, error: Exception) -> str:
    """The message for readers that cannot go on where others stopped."""
    reason = str(error).strip() or type(error).__name__
    return (
        f"--data-path {path}: the checkpoint's readers stood where this run's cannot go on "
        f"({reason}): keep the dataset, --shuffle-buffer-size and --packing-buffer-size as they "
        f"were, or begin anew with --finetune and without --dataloader-load"
    )
