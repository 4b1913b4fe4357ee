"""Error messages for datasets on disk, with advice."""

from pathlib import Path

from megatron.energon.epathlib import EPath
from megatron.energon.flavors.webdataset.metadata import EnergonDatasetType, get_dataset_type

from megatron_mimo.border import TRACEBACK_FLAG, border, reason_of
from megatron_mimo.data.reading.metadataset import check_folder, check_metadataset


def checked_path(given: str) -> str:
    """The dataset's path, after checks for common mistakes.

    Raises:
        ValueError: The path does not exist, or energon cannot read it.
    """
    path = Path(given)
    with border(lambda why: f"--data-path {given} is not a path of a dataset: {why}"):
        found = path.exists()
        if found and not (path.is_file() or path.is_dir()):
            raise ValueError("it is neither a file nor a folder")
    if not found:
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
    if kind is EnergonDatasetType.METADATASET:
        check_metadataset(path)
    elif kind is EnergonDatasetType.WEBDATASET:
        check_folder(path)
    return str(path)


def unreadable_split(path: str, split: str, reason: str) -> str:
    """The message for a failure to open a split."""
    needed = (
        f"expected a metadataset of energon that names {split} under splits, and for it datasets "
        f"that are prepared"
        if path.endswith(".yaml")
        else f"expected .nv-meta with split.yaml and dataset.yaml, and shards for {split}; run "
        f"`energon prepare {path}` again"
    )
    return f"--data-path {path}: the {split} split cannot be opened ({reason}): {needed}"


def unreadable_shard(path: str, error: Exception) -> str:
    """The message for a failure to read samples."""
    return (
        f"--data-path {path}: a shard cannot be read ({reason_of(error)}): check that every tar "
        f"file of the dataset is there and whole, and run `energon prepare` after changing one; "
        f"{TRACEBACK_FLAG} shows where it was noticed"
    )


def unfit_state(path: str, error: Exception) -> str:
    """The message for readers that cannot continue from where others stopped."""
    return (
        f"--data-path {path}: the checkpoint's readers stood where this run's cannot go on "
        f"({reason_of(error)}): keep the dataset, --shuffle-buffer-size and --packing-buffer-size "
        f"as they were, or start again with --finetune and without --dataloader-load"
    )
