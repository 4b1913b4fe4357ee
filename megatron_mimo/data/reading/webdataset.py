"""Tar shards, and the metadata that makes a folder of them an Energon dataset."""

import contextlib
import io
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import yaml

from megatron_mimo.border import border

# As energon splits a stored name: everything up to the first dot of the last part is the key.
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
# Names that energon ignores.
_META = re.compile(r"__[^/]*__($|/)")


class ShardWriter:
    """Writes one shard, sample by sample; equal samples give equal bytes.

    Args:
        path: Path to the tar file, in a folder that exists.
    """

    def __init__(self, path: Path) -> None:
        self._tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)

    def add(self, key: str, parts: Mapping[str, bytes]) -> None:
        """Write a sample.

        Args:
            key: Key of the sample.
            parts: File ending -> contents: {"png": ...} of key "a" is stored as "a.png".
        """
        for ending, data in parts.items():
            member = tarfile.TarInfo(f"{key}.{ending}")
            member.size = len(data)
            self._tar.addfile(member, io.BytesIO(data))
        # An archive keeps all that it has written.
        self._tar.members.clear()  # type: ignore[attr-defined]

    def close(self) -> None:
        """End the file."""
        self._tar.close()


def write_shard(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> None:
    """Write one shard; equal samples give equal bytes.

    Args:
        path: Path to the tar file, in a folder that exists.
        samples: Key of each sample, and file ending -> contents, as `ShardWriter.add` takes them.
    """
    with contextlib.closing(ShardWriter(path)) as shard:
        for key, parts in samples:
            shard.add(key, parts)


def read_shard(path: Path) -> dict[str, dict[str, bytes]]:
    """The samples of a shard, in stored order: key -> file ending -> contents."""
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as tar:
        for key, members in group_members(tar):
            parts = samples.setdefault(key, {})
            for ending, member in members.items():
                file = tar.extractfile(member)
                assert file is not None, member.name
                parts[ending] = file.read()
    return samples


def group_members(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """The samples of an open shard, in stored order: key, and file ending -> member.

    Only headers are read. Consecutive files with the same key are a sample; files that energon
    ignores are left out.
    """
    current: str | None = None
    members: dict[str, tarfile.TarInfo] = {}
    for member in tar:
        # An archive keeps all that it has listed; a large one would fill the memory.
        tar.members.clear()  # type: ignore[attr-defined]
        match = _NAME.match(member.name)
        if not member.isreg() or _META.match(member.name) or match is None:
            continue
        key, ending = match.groups()
        if key != current and current is not None:
            yield current, members
            members = {}
        current = key
        members[ending] = member
    if current is not None:
        yield current, members


def prepare(
    folder: Path,
    shards: Sequence[str] | Mapping[str, Sequence[str]],
    *,
    exclude: Sequence[str] = (),
    workers: int = 1,
    source: Path | None = None,
) -> None:
    """Index the shards and write .nv-meta, as `energon prepare` does after its questions.

    Args:
        folder: Path to the folder of the dataset.
        shards: Paths of the shards within it by split; or only paths, whose first folder, "train/"
            or "val/", is the split.
        exclude: Samples that readers skip, each as "SHARD/KEY".
        workers: Number of processes that index shards.
        source: Path of what the shards were made of, for messages; None for the folder itself.

    Raises:
        ValueError: Two samples have the same key, a shard's name has a brace, or energon cannot
            index the shards.
    """
    from megatron.energon.flavors import BaseWebdatasetFactory

    shown = folder if source is None else source
    splits = shards if isinstance(shards, Mapping) else _by_folder(shards)
    for name in [*(name for names in splits.values() for name in names), *exclude]:
        if set(name) & set("{}\\"):
            raise ValueError(
                f"{shown}: {name!r} has a brace or backslash in its name, which energon reads as "
                f"a pattern: rename it"
            )
    report = io.StringIO()
    # It reports on standard output, which the command line uses; and ends the process on
    # duplicate keys.
    with (
        border(lambda why: f"{shown} cannot be indexed: {why}"),
        contextlib.redirect_stdout(report),
    ):
        try:
            BaseWebdatasetFactory.prepare_dataset(
                folder,
                [name for names in splits.values() for name in names],
                split_parts_ratio=[("train", 1.0)],
                workers=workers,
            )
        except SystemExit as stop:
            duplicate = re.search(r'duplicate key: "(.*)"', report.getvalue())
            if duplicate is None:
                raise ValueError(report.getvalue()) from stop
        else:
            duplicate = None
    if duplicate is not None:
        files = [name for names in splits.values() for name in names]
        where = _shards_with(duplicate[1], folder, files)
        raise ValueError(
            f"{shown}: samples share the key {duplicate[1]!r}{where}: expected each key once; "
            f"rename the files, or run `energon prepare --fix-duplicates`"
        )
    meta = folder / ".nv-meta"
    split = {
        "split_parts": {part: list(names) for part, names in splits.items()},
        "exclude": list(exclude),
    }
    (meta / "split.yaml").write_text(yaml.safe_dump(split, sort_keys=False), encoding="utf-8")
    (meta / "dataset.yaml").write_text(
        "__module__: megatron.energon\n__class__: CrudeWebdataset\n", encoding="utf-8"
    )


def _shards_with(key: str, folder: Path, names: Sequence[str]) -> str:
    """The first shards with a sample of this key, as a part of a message."""
    found = []
    for name in names:
        with tarfile.open(folder / name) as tar:
            found += [name for other, _ in group_members(tar) if other == key]
        if len(found) > 1:
            return f", one in {found[0]} and one in {found[1]}"
    return ""


def _by_folder(shards: Sequence[str]) -> dict[str, list[str]]:
    splits: dict[str, list[str]] = {"train": [], "val": []}
    for name in shards:
        splits[name.split("/", 1)[0]].append(name)
    return splits
