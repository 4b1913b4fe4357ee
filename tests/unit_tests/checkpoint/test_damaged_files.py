"""Damaged files of checkpoints: a value or one line, and nothing ever runs.

By hand, with `pytest -n 0 -s`: MIMO_DAMAGED=10000 MIMO_SEED=1.
"""

import io
import os
import pickle
import random
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from megatron.energon.flavors.webdataset.sample_loader import SliceState
from megatron.energon.savable import FlexState

from megatron_mimo.checkpoint import folder as folders
from megatron_mimo.checkpoint.loader_file import file_content, lanes_text, read_lanes
from megatron_mimo.data.reading.snapshot import from_pickle, read_snapshot, write_snapshot
from megatron_mimo.weights.torch_dist import METADATA, describe, load_plain

NUMBER = int(os.environ.get("MIMO_DAMAGED", "60"))
SEED = int(os.environ.get("MIMO_SEED", "0"))
_STATE = FlexState(
    datasets=[FlexState(__class__="Loader", slices=[SliceState(index=3, current=7), None])],
    rng=bytes(range(256)),
    keys=[("Webdataset", n) for n in range(20)],
)
_NAMES = ("os\nsystem", "builtins\neval", "subprocess\nPopen", "torch\nload", "a\nb", "")
_PIECES = (
    *(f"c{name}\n".encode() for name in _NAMES),
    *(b"\x8c\x02os\x8c\x06system\x93", b"\x8c\x04trueq\x00\x85R", b"(S'touch ran'\ntR", b"}", b"]"),
    *(b"(", b".", b"\x80\x04", b"b", b"R", b"\x81", b"o", b"i", b"\xff" * 4, b"\x00" * 9, b"N}b"),
)
# What would run, among all events that Python reports.
_RUNS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "ctypes.")


def _metadata(folder: Path) -> bytes:
    """A description by torch itself."""
    state = {"weight": torch.ones(4, 3), "scalar": torch.tensor(1.0), "rng": {"a": 1}}
    dcp.save(state, checkpoint_id=folder / "whole", no_dist=True)
    return (folder / "whole" / METADATA).read_bytes()


def _torch_saved(value: Any) -> bytes:
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


def _lanes() -> dict[int, Any]:
    worker = {"drawn": 9, "since": 1, "snapshot": write_snapshot(20, _STATE)}
    return {0: {"step": 4, "stream": {"num_samples": (3, 4), "workers": {5: worker}}}}


def _in_file(name: str, read: Callable[[Path], Any]) -> Callable[[bytes, Path], Any]:
    def reads(content: bytes, folder: Path) -> Any:
        (folder / name).write_bytes(content)
        try:
            return read(folder)
        finally:
            (folder / name).unlink()

    return reads


# Name -> the whole file, and what reads it.
KINDS: dict[str, tuple[Callable[[Path], bytes], Callable[[bytes, Path], Any]]] = {
    ".metadata": (_metadata, _in_file(METADATA, describe)),
    "loader.json": (
        lambda _: file_content([lanes_text(_lanes())]),
        _in_file(folders.LOADER, read_lanes),
    ),
    "loader.pt": (
        lambda _: _torch_saved({"lanes": _lanes(), "num_lanes": 1}),
        _in_file(folders.OLDER_LOADER, read_lanes),
    ),
    "common.pt": (
        lambda _: _torch_saved({"args": Namespace(a=1, b=(2, "c")), "iteration": 3}),
        lambda content, _: load_plain(io.BytesIO(content), "FILE", more=(Namespace,)),
    ),
    "state": (
        lambda _: write_snapshot(20, _STATE).encode(),
        lambda content, _: read_snapshot(content.decode(errors="replace")),
    ),
    "pickled state": (
        lambda _: pickle.dumps((20, _STATE), 4),
        lambda content, _: from_pickle(content, "FILE"),
    ),
}


def damaged(whole: bytes, chance: random.Random) -> bytes:
    """A file of which some bytes were cut, changed, repeated or replaced by pieces of an attack."""
    found = bytearray(whole)
    for _ in range(chance.choice((1, 1, 1, 2, 4, 16))):
        at, length = chance.randrange(len(found) + 1), chance.choice((0, 1, 1, 2, 8, 64))
        match chance.randrange(5):
            case 0:
                found[at : at + length] = b""
            case 1:
                found[at : at + length] = chance.randbytes(length)
            case 2:
                found[at:at] = found[at : at + length]
            case 3:
                found[at : at + length] = chance.choice(_PIECES)
            case _ if chance.random() < 0.1:
                del found[at:]
    return bytes(found)


class _Watch:
    """What has run. It stays, since an audit hook cannot be removed."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if event.startswith(_RUNS):
            self.ran.append(f"{event} {args!r}")


@pytest.fixture(scope="module")
def watch() -> _Watch:
    """Hears what runs in this process."""
    return _Watch()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_damaged_file_is_a_value_or_one_line_and_nothing_runs(
    kind: str, watch: _Watch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, read = KINDS[kind]
    whole = make(tmp_path)
    read(whole, tmp_path)
    monkeypatch.chdir(tmp_path)
    chance, refused = random.Random(f"{SEED} {kind}"), 0
    watch.ran.clear()
    for number in range(NUMBER):
        content = damaged(whole, chance)
        try:
            read(content, tmp_path)
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error), (number, str(error))
            str(error).encode()
        except BaseException as error:
            error.add_note(f"seed {SEED}, input {number}: {content!r:.300}")
            raise
        assert not watch.ran, (number, watch.ran)
    assert not (tmp_path / "ran").exists()
    assert refused > NUMBER // 10
    print(f"{kind}: {NUMBER} damaged, {refused} refused, seed {SEED}")
