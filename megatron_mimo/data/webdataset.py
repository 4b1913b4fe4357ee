"""Write tar shards and the metadata that makes a folder of them an Energon dataset."""

import contextlib
import io
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import yaml

# As energon cuts a stored name: everything up to the first dot of the last part is the key.
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
# Names that energon passes over.
_META = re.compile(r"__[^/]*__($|/)")


def write_shard(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> None:
    """Write one shard; the same samples give the same bytes.

    Args:
        path: Of the tar file, in a folder that exists.
        samples: Key, and file ending -> contents: ("a", {"png": ...}) is stored as "a.png".
    """
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, parts in samples:
            for ending, data in parts.items():
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


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

    Nothing but headers is read. Files that follow each other and share a key are a sample; what
    energon passes over is left out.
    """
    current: str | None = None
    members: dict[str, tarfile.TarInfo] = {}
    for member in tar:
        # An archive remembers all that it has listed; a large one would fill the memory.
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
) -> None:
    """Index the shards and write .nv-meta, as `energon prepare` does after its questions.

    Args:
        folder: Of the dataset.
        shards: Paths in it by split; or only paths, the first folder of each, "train/" or "val/",
            is then its split.
        exclude: Samples that readers leave out, each as "SHARD/KEY".
        workers: Processes that index.

    Raises:
        ValueError: Two samples have the same key, or a shard's name has a brace.
    """
    from megatron.energon.flavors import BaseWebdatasetFactory

    splits = shards if isinstance(shards, Mapping) else _by_folder(shards)
    for name in [*(name for names in splits.values() for name in names), *exclude]:
        if set(name) & set("{}\\"):
            raise ValueError(
                f"{folder}: {name!r} has a brace or backslash in its name, which energon reads as "
                f"a pattern: rename it"
            )
    report = io.StringIO()
    # It reports on standard output, which belongs to the command line; and ends the process on
    # double keys.
    with contextlib.redirect_stdout(report):
        try:
            BaseWebdatasetFactory.prepare_dataset(
                folder,
                [name for names in splits.values() for name in names],
                split_parts_ratio=[("train", 1.0)],
                workers=workers,
            )
        except SystemExit as stop:
            found = re.search(r'duplicate key: "(.*)"', report.getvalue())
            key = f", for instance {found[1]!r}" if found else ""
            raise ValueError(
                f"{folder}: samples of different shards, or of one, share their key{key}: expected "
                f"each key once; rename the files, or run `energon prepare --fix-duplicates`"
            ) from stop
    meta = folder / ".nv-meta"
    split = {
        "split_parts": {part: list(names) for part, names in splits.items()},
        "exclude": list(exclude),
    }
    (meta / "split.yaml").write_text(yaml.safe_dump(split, sort_keys=False), encoding="utf-8")
    (meta / "dataset.yaml").write_text(
        "__module__: megatron.energon\n__class__: CrudeWebdataset\n", encoding="utf-8"
    )


def _by_folder(shards: Sequence[str]) -> dict[str, list[str]]:
    splits: dict[str, list[str]] = {"train": [], "val": []}
    for name in shards:
        splits[name.split("/", 1)[0]].append(name)
    return splits
