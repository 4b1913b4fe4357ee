"""More workers than samples, and buffers beyond the memory, are refused with figures."""

import os
from pathlib import Path

import pytest

from megatron_mimo.data.reading.capacity import check_capacity
from megatron_mimo.data.source import SourceConfig


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Shards of a terabyte, which take no room on the disk."""
    (tmp_path / "shards").mkdir()
    for number in range(2):
        path = tmp_path / "shards" / f"{number}.tar"
        path.touch()
        os.truncate(path, 2**39)
    return tmp_path


def config(path: Path, **settings: int) -> SourceConfig:
    return SourceConfig(provider="energon", path=str(path), **settings)  # type: ignore[arg-type]


def test_more_workers_than_samples_are_refused(tmp_path: Path) -> None:
    check_capacity(config(tmp_path, num_workers=25), [30, 20], 2, 1)
    with pytest.raises(ValueError) as error:
        check_capacity(config(tmp_path, num_workers=26), [30, 20], 2, 1)
    assert str(error.value) == (
        f"--num-workers 26 x --llm-dp 2 is 52 workers, and the train split of --data-path "
        f"{tmp_path} has 50 samples: expected at least a sample for each; set --num-workers 25 or "
        f"fewer"
    )


def test_more_lanes_than_samples_are_refused(tmp_path: Path) -> None:
    check_capacity(config(tmp_path), [2, 1], 3, 1)
    with pytest.raises(ValueError) as error:
        check_capacity(config(tmp_path), [2, 1], 4, 1)
    assert str(error.value) == (
        f"--llm-dp 4 is 4 lanes, and the train split of --data-path {tmp_path} has 3 samples: "
        f"expected at least a sample for each; set --llm-dp 3 or fewer, or add samples"
    )


def test_buffers_beyond_the_memory_are_refused(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = {"SC_PHYS_PAGES": 2**24, "SC_PAGE_SIZE": 4096}  # 64 GiB
    monkeypatch.setattr("os.sysconf", memory.__getitem__)
    samples = [2**20]  # of 1 MiB
    check_capacity(config(dataset, shuffle_buffer_size=60_000), samples, 1, 1)
    check_capacity(config(dataset, shuffle_buffer_size=10**8), [2**15], 64, 1)
    for settings, lanes, flag in (
        ({"shuffle_buffer_size": 70_000}, 1, "--shuffle-buffer-size 70,000"),
        ({"shuffle_buffer_size": 20_000, "num_workers": 4}, 1, "--shuffle-buffer-size 20,000"),
        ({"shuffle_buffer_size": 20_000}, 4, "--shuffle-buffer-size 20,000"),
        ({"packing_buffer_size": 90_000}, 1, "--packing-buffer-size 90,000"),
    ):
        with pytest.raises(
            ValueError, match=f"^{flag}: .* GiB, and this machine has 64.0 GiB; set"
        ):
            check_capacity(config(dataset, **settings), samples, 4, lanes)


def test_sources_of_unknown_size_are_not_guessed(tmp_path: Path) -> None:
    check_capacity(config(tmp_path / "a.jsonl", shuffle_buffer_size=10**8), [10**9], 1, 1)
