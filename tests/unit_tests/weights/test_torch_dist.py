"""Folders of torch.distributed.checkpoint against torch's own writer and reader."""

import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_mimo.weights.pickled import NamesCodeError
from megatron_mimo.weights.torch_dist import (
    METADATA,
    Place,
    describe,
    load_object,
    load_plain,
    load_tensor,
    parse,
)

DTYPES = (torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.float8_e4m3fn)


class Runs:
    """An object whose pickle runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that torch has written: tensors of many dtypes, and objects."""
    folder = tmp_path_factory.mktemp("dcp") / "folder"
    state: dict[str, Any] = {str(dtype): torch.arange(6).view(2, 3).to(dtype) for dtype in DTYPES}
    state |= {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4), "steps": {"a": 1}}
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_torch_writes_is_read_as_torch_reads_it(folder: Path) -> None:
    found, theirs = describe(folder), FileSystemReader(folder).read_metadata()
    tensors = {
        key: (tuple(entry.size), entry.properties.dtype)
        for key, entry in theirs.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    assert {key: (t.shape, t.dtype) for key, t in found.tensors.items()} == tensors
    assert len(tensors) == len(DTYPES) + 2
    assert set(found.objects) == theirs.state_dict_metadata.keys() - tensors.keys()
    for key, tensor in found.tensors.items():
        for chunk in tensor.chunks:
            stored = load_tensor(folder, chunk.place)
            assert (tuple(stored.shape), stored.dtype) == (chunk.shape, tensor.dtype), key
    assert [load_object(folder, place) for place in found.objects.values()] == [1]
    assert found.ends == {
        path.name: path.stat().st_size for path in folder.iterdir() if path.name != METADATA
    }


def changed(folder: Path, change: Any) -> bytes:
    """The description after a change."""
    metadata = pickle.loads((folder / METADATA).read_bytes())
    change(metadata)
    return pickle.dumps(metadata)


def first_place(metadata: Any) -> Any:
    return next(iter(metadata.storage_data.values()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(first_place(m), "relative_path", "../../etc/passwd"),
         "is in '../../etc/passwd': expected a file of the folder"),
        (lambda m: setattr(first_place(m), "relative_path", "/etc/passwd"), "expected a file of"),
        (lambda m: setattr(first_place(m), "offset", -1), "has sizes"),
        (lambda m: setattr(first_place(m), "length", 1.5), "has sizes"),
        (lambda m: setattr(first_place(m), "transform_descriptors", ["zstd"]), "is compressed"),
        (lambda m: m.storage_data.clear(), "has a part that is in no file"),
        (lambda m: setattr(m, "storage_data", 3), "storage_data is a int"),
        (lambda m: m.state_dict_metadata["scalar"].chunks.clear(), "are not the whole of it"),
        (lambda m: setattr(m.state_dict_metadata["torch.int8"], "size", torch.Size([1, 3])),
         "has a part outside of its shape"),
        (lambda m: setattr(m.state_dict_metadata["torch.int8"].properties, "dtype", "int8"),
         "the dtype of torch.int8 is a str"),
        (lambda m: m.state_dict_metadata.update({5: 6}), "a key is a int"),
    ],
)  # fmt: skip
def test_a_description_that_contradicts_itself_is_refused(
    change: Any, message: str, folder: Path
) -> None:
    with pytest.raises(ValueError) as error:
        parse(changed(folder, change), folder)
    assert str(error.value).startswith(f"{folder / METADATA} cannot be read (")
    assert message in str(error.value)


def test_a_description_that_names_code_is_refused(folder: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    content = changed(folder, lambda m: setattr(m, "planner_data", Runs(f"touch {ran}")))
    with pytest.raises(NamesCodeError, match=r"\.metadata names posix.system, which reading it"):
        parse(content, folder)
    assert not ran.exists()
    # With trust as torch reads it.
    assert len(parse(content, folder, trust=True).tensors) == len(DTYPES) + 2
    assert ran.exists()


@pytest.mark.parametrize("old", [False, True])
def test_a_tensor_that_is_code_is_refused(old: bool, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    content = io.BytesIO()
    torch.save(
        [torch.ones(2), Runs(f"touch {ran}")], content, _use_new_zipfile_serialization=not old
    )
    (tmp_path / "file").write_bytes(b"before" + content.getvalue() + b"after")
    place = Place("file", 6, len(content.getvalue()))
    with pytest.raises(NamesCodeError, match=r"file names posix.system, which reading it would"):
        load_object(tmp_path, place)
    assert not ran.exists()
    assert load_object(tmp_path, place, trust=True)[1] == 0
    assert ran.exists()


def test_damage_is_one_line(tmp_path: Path) -> None:
    content = io.BytesIO()
    torch.save(torch.ones(2), content)
    for damaged in (b"", b"no tensor", content.getvalue()[:-30], b"\0" * 200):
        with pytest.raises(ValueError, match=r"\AFILE cannot be read \(.*\)\Z"):
            load_plain(io.BytesIO(damaged), "FILE")
    (tmp_path / "text").write_bytes(b"")
    torch.save("text", tmp_path / "text")
    size = (tmp_path / "text").stat().st_size
    with pytest.raises(ValueError, match="text holds a str: expected a tensor"):
        load_tensor(tmp_path, Place("text", 0, size))
    with pytest.raises(ValueError, match="gone cannot be read"):
        load_tensor(tmp_path, Place("gone", 0, 1))
    with pytest.raises(FileNotFoundError):
        describe(tmp_path)
