"""Where the readers stood: files of this version, of earlier ones, and of strangers."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.energon.flavors.webdataset.sample_loader import SliceState
from megatron.energon.savable import FlexState

from megatron_mimo.checkpoint import folder as folders
from megatron_mimo.checkpoint.loader_file import file_content, lanes_text, read_lanes
from megatron_mimo.data.reading.snapshot import read_snapshot, write_snapshot

STATE = FlexState(
    datasets=[FlexState(__class__="Loader", slices=[SliceState(index=3, current=7), None])],
    rng=bytes(range(256)),
    keys=[("Webdataset", 4), ("Buffer", ("Webdataset", 5))],
)


class Runs:
    """An object whose pickle runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def lanes(snapshot: Any) -> dict[int, Any]:
    """States of two lanes; one reads a dataset."""
    workers = {5: {"drawn": 9, "since": 1, "snapshot": snapshot}}
    return {
        0: {"step": 4, "stream": {"num_samples": (3, 4), "per_lane": 1, "workers": workers}},
        1: {"step": 4, "stream": {"drawn": 8}},
    }


def older(folder: Path, snapshot: Any) -> Path:
    """A file as earlier versions wrote it."""
    path = folder / folders.OLDER_LOADER
    torch.save({"lanes": lanes(snapshot), "num_lanes": 2}, path)
    return path


def test_states_of_all_ranks_come_back(tmp_path: Path) -> None:
    states = lanes(write_snapshot(20, STATE))
    parts = [lanes_text({lane: states[lane]}) for lane in (1, 0)]
    (tmp_path / folders.LOADER).write_bytes(file_content(parts))
    assert read_lanes(tmp_path) == states
    drawn, state = read_snapshot(read_lanes(tmp_path)[0]["stream"]["workers"][5]["snapshot"])
    assert (drawn, state) == (20, STATE)


@pytest.mark.parametrize("protocol", range(3, 6))
def test_a_file_of_an_earlier_version_is_read_without_running_anything(
    protocol: int, tmp_path: Path
) -> None:
    older(tmp_path, pickle.dumps((20, STATE), protocol))
    assert read_lanes(tmp_path) == lanes(write_snapshot(20, STATE))


def test_code_in_a_file_is_named_and_does_not_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    named = "names posix.system, which reading it would run"
    for snapshot in (
        Runs(f"touch {ran}"),
        pickle.dumps((20, FlexState(a=Runs(f"touch {ran}")))),
    ):
        path = older(tmp_path, snapshot)
        with pytest.raises(ValueError, match=f"{path} {named}.*--trust-checkpoint"):
            read_lanes(tmp_path)
        assert not ran.exists()
    read_lanes(tmp_path, trust=True)
    assert ran.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"[1]",
        b'{"dict": []}',
        b'{"dict": [["lanes", 1]]}',
        b'{"dict": [["lanes", {"dict": [["0", 1]]}]]}',
        b"\xff",
    ],
)
def test_damage_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / folders.LOADER).write_bytes(content)
    with pytest.raises(ValueError, match=r"loader.json cannot be read: .*\Z"):
        read_lanes(tmp_path)
    (tmp_path / folders.LOADER).unlink()
    with pytest.raises(ValueError, match=r"loader.pt cannot be read: No such file"):
        read_lanes(tmp_path)
    older(tmp_path, content)
    with pytest.raises(ValueError, match=r"loader.pt cannot be read"):
        read_lanes(tmp_path)
