"""Which files of a folder make which split of a dataset of Hugging Face's.

Three kinds of folders are known: what `save_to_disk` wrote; a copy of a repository of the hub whose
card names the files of each split; and one whose files say by their names what they are.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from megatron_mimo.border import border
from megatron_mimo.data.samples.media import shortened

TABLES = (".parquet", ".arrow")
# Files of each split, in order; none where they are named and not there.
Splits = Mapping[str, tuple[Path, ...]]

_STATE, _DICT, _CARD = "state.json", "dataset_dict.json", "README.md"
# The words by which `datasets` knows a split in names of files and folders.
_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_WORD = re.compile(rf"(?:^|[-._ 0-9])({'|'.join(_WORDS)})(?=[-._ 0-9]|$)")
_SHARD = re.compile(r"(?P<name>.+)-(?P<number>[0-9]{5})-of-(?P<total>[0-9]{5})\b")
_FRONT = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)


def is_table(path: Path, below: Path) -> bool:
    """Whether a file holds rows of a dataset; hidden ones, such as downloads under way, do not."""
    inside = path.relative_to(below).parts
    return path.suffix.lower() in TABLES and not any(part.startswith(".") for part in inside)


def splits_of(source: Path, subset: str | None) -> Splits:
    """The splits of a dataset, in its own order.

    Args:
        source: Path to the folder, or to one file.
        subset: Subset to take, of those that the card names; None for the only one.

    Raises:
        ValueError: What describes the dataset is damaged, or several subsets leave the choice.
    """
    if source.is_file():
        return _without_subset({_named(Path(source.name)): (source,)}, source, subset)
    for name, saved in ((_DICT, _saved_splits), (_STATE, _saved_split)):
        if (source / name).is_file():
            return _without_subset(saved(source), source, subset)
    card = _card(source / _CARD) if (source / _CARD).is_file() else {}
    if card.get("configs"):
        return _of_card(source, card["configs"], subset)
    return _without_subset(_by_name(source), source, subset)


def choose(splits: Splits, name: str | None, source: Path, flag: str) -> tuple[str, Sequence[Path]]:
    """A split and its files.

    Args:
        splits: What `splits_of` found.
        name: Name of the split; None for the only one.
        source: Path to the dataset.
        flag: The flag that names it.

    Raises:
        ValueError: There is none of this name, several leave the choice, or some files are missing.
    """
    listed = ", ".join(splits)
    if name is None:
        if len(splits) > 1:
            raise ValueError(
                f"{source} has the splits {listed}: choose one with {flag}; --val-split names one "
                f"to validate on"
            )
        name = next(iter(splits))
    elif name not in splits:
        raise ValueError(f"{flag} {shortened(name)}: {source} has the splits {listed}")
    files = splits[name]
    if not files:
        raise ValueError(
            f"{source / _CARD} names files of the split {name}, and none of them is there as "
            f"parquet or arrow: download them, or name a folder or file that has them"
        )
    _require_whole(files, name, source)
    return name, files


# -- save_to_disk ----------------------------------------------------------------------------------


def _saved_splits(source: Path) -> Splits:
    path = source / _DICT
    names = _json(path).get("splits")
    if not _is_texts(names):
        raise ValueError(f"{path} has no list of splits: expected what save_to_disk writes")
    for name in names:
        if not (_below(source, name) / _STATE).is_file():
            raise ValueError(f"{path} names the split {shortened(name)}, whose {_STATE} is missing")
    return {name: _saved_files(source / name) for name in names}


def _saved_split(source: Path) -> Splits:
    name = _json(source / _STATE).get("_split")
    return {name if isinstance(name, str) else "train": _saved_files(source)}


def _saved_files(folder: Path) -> tuple[Path, ...]:
    path = folder / _STATE
    state = _json(path)
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise ValueError(
            f"{path} selects rows by a file of indices, as old versions of datasets did: load it "
            f"and save it again"
        )
    entries = state.get("_data_files")
    names = [entry.get("filename") for entry in entries or () if isinstance(entry, dict)]
    if not names or not _is_texts(names):
        raise ValueError(f"{path} names no files of data: expected what save_to_disk writes")
    files = tuple(_below(folder, name) for name in names)
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"{path} names {missing[0].name}, which is not there: copy all of it")
    return files


# -- repositories of the hub -----------------------------------------------------------------------


def _card(path: Path) -> Mapping[str, Any]:
    """What the card says in its front matter; empty where it has none."""
    with border(lambda why: f"{path} cannot be read: {why}"):
        front = _FRONT.search(path.read_text(encoding="utf-8"))
    if front is None:
        return {}
    with border(lambda why: f"{path} has front matter that is not YAML: {why}"):
        found = yaml.safe_load(front[1])
    return found if isinstance(found, dict) else {}


def _of_card(source: Path, configs: Any, subset: str | None) -> Splits:
    """The splits of a subset, as `configs` of a card has them."""
    if not isinstance(configs, list) or not all(isinstance(one, dict) for one in configs):
        raise ValueError(f"{source / _CARD} has configs of an unknown form: expected a list")
    by_name = {str(one.get("config_name", "default")): one for one in configs}
    default = [name for name, one in by_name.items() if one.get("default") is True]
    chosen = subset or ([*default, *by_name][0] if default or len(by_name) == 1 else "default")
    if chosen not in by_name:
        given = "several subsets" if subset is None else f"no subset {shortened(subset)}"
        raise ValueError(f"{source} has {given}: choose one of {', '.join(by_name)} with --subset")
    config = by_name[chosen]
    root = _below(source, str(config.get("data_dir") or "."))
    patterns = config.get("data_files")
    if patterns is None:
        return _by_name(root)
    return {
        split: tuple(
            dict.fromkeys(path for pattern in of_split for path in _matching(root, pattern))
        )
        for split, of_split in _patterns(patterns, source / _CARD).items()
    }


def _patterns(data_files: Any, card: Path) -> dict[str, list[str]]:
    """Patterns of files by split."""
    if isinstance(data_files, str) or _is_texts(data_files):
        data_files = {"train": data_files}
    elif isinstance(data_files, list) and all(isinstance(one, dict) for one in data_files):
        data_files = {one.get("split", "train"): one.get("path") for one in data_files}
    found = {}
    for split, given in (data_files if isinstance(data_files, dict) else {}).items():
        found[str(split)] = [given] if isinstance(given, str) else given
    if not found or not all(map(_is_texts, found.values())):
        raise ValueError(f"{card} has data_files of an unknown form: expected splits and paths")
    return found


def _matching(root: Path, pattern: str) -> list[Path]:
    _below(root, pattern)
    with border(lambda why: f"{root / _CARD} has the path {shortened(pattern)}: {why}"):
        return sorted(path for path in root.glob(pattern) if is_table(path, root))


def _by_name(folder: Path) -> Splits:
    """The splits by names of files and folders."""
    splits: dict[str, list[Path]] = {}
    for path in sorted(path for path in folder.rglob("*") if is_table(path, folder)):
        splits.setdefault(_named(path.relative_to(folder)), []).append(path)
    if not splits:
        raise ValueError(f"{folder} holds no parquet or arrow file")
    return {split: tuple(paths) for split, paths in splits.items()}


def _named(path: Path) -> str:
    """The split that a file belongs to by its own name and its folders', as `datasets` has it."""
    shard = _SHARD.match(path.name)
    if shard is not None and path.parent.name == "data":
        return shard["name"]
    for name in (*reversed(path.parent.parts), path.stem):
        word = _WORD.search(name)
        if word is not None:
            return _WORDS[word[1]]
    return "train" if shard is None else shard["name"]


def _require_whole(files: Sequence[Path], split: str, source: Path) -> None:
    """Refuse a split of which some of the numbered files were not copied."""
    if source.is_file():
        return  # Named by itself.
    numbers: dict[tuple[Path, str, str], set[int]] = {}
    for file in files:
        found = _SHARD.match(file.name)
        if found is not None:
            key = (file.parent, found["name"], found["total"])
            numbers.setdefault(key, set()).add(int(found["number"]))
    for (folder, name, total), present in numbers.items():
        if len(present) < int(total):
            missing = next(number for number in range(int(total)) if number not in present)
            raise ValueError(
                f"{folder} has {len(present)} of {int(total)} files of the split {split}: "
                f"{name}-{missing:05d}-of-{total} is missing; download it, or name one file"
            )


# -- common ----------------------------------------------------------------------------------------


def _without_subset(splits: Splits, source: Path, subset: str | None) -> Splits:
    if subset is not None:
        raise ValueError(
            f"--subset {shortened(subset)}: {source} has no card ({_CARD}) that names subsets; "
            f"name the folder of the subset itself"
        )
    return splits


def _json(path: Path) -> Mapping[str, Any]:
    with border(lambda why: f"{path} cannot be read: {why}"):
        found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no object: expected what save_to_disk writes")
    return found


def _below(folder: Path, name: str) -> Path:
    """A path in a folder; a dataset names nothing outside of itself."""
    if name.startswith("/") or "://" in name or ".." in name.split("/") or "\0" in name:
        raise ValueError(f"{folder} names {shortened(name)}, which is outside of it")
    return folder / name


def _is_texts(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)
