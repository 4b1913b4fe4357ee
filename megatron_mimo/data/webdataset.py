"""Write tar shards and the metadata that makes a folder of them an Energon dataset."""

import contextlib
import io
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path


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
        for member in tar:
            key, ending = member.name.split(".", 1)
            file = tar.extractfile(member)
            assert file is not None, member.name
            samples.setdefault(key, {})[ending] = file.read()
    return samples


def prepare(folder: Path, shards: Sequence[str]) -> None:
    """Index the shards and write .nv-meta, as `energon prepare` does after its questions.

    Args:
        folder: Of the dataset.
        shards: Paths in it; the first folder of each, "train/" or "val/", is its split.
    """
    from megatron.energon.flavors import BaseWebdatasetFactory

    # It reports on standard output, which belongs to the command line.
    with contextlib.redirect_stdout(io.StringIO()):
        BaseWebdatasetFactory.prepare_dataset(
            folder,
            list(shards),
            split_parts_patterns=[("train", "train/.*"), ("val", "val/.*")],
            workers=1,
        )
    (folder / ".nv-meta" / "dataset.yaml").write_text(
        "__module__: megatron.energon\n__class__: CrudeWebdataset\n", encoding="utf-8"
    )
