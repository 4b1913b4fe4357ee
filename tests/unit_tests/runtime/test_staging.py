from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_mimo.runtime import staging
from megatron_mimo.runtime.staging import Staging, map_tensors

HOST = torch.device("cpu")


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    patches: Tensor
    lengths: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Whole:
    parts: tuple[Part | None, ...]
    by_name: dict[str, Tensor]
    batch: int
    text: str | None = None


def whole(value: float) -> Whole:
    part = Part(patches=torch.full((2, 3), value), lengths=(1, 1))
    return Whole(parts=(part, None), by_name={"a": torch.tensor([value])}, batch=2)


def test_tensors_of_nested_values_are_mapped() -> None:
    mapped = map_tensors(whole(1.0), lambda tensor: tensor + 1)
    assert mapped.parts[0] is not None and mapped.parts[1] is None
    assert torch.equal(mapped.parts[0].patches, torch.full((2, 3), 2.0))
    assert mapped.parts[0].lengths == (1, 1)
    assert mapped.by_name["a"].tolist() == [2.0]
    assert (mapped.batch, mapped.text) == (2, None)


def test_a_host_uses_inputs_where_they_are() -> None:
    inputs = whole(1.0)
    on_host = Staging(HOST)
    assert on_host.pin(inputs) is inputs
    assert on_host.ahead([None, inputs]).take(1) is inputs


class Stream:
    """A stream that tells what is asked of it."""

    def __init__(self, told: list[str], name: str) -> None:
        self.told, self.name, self.number = told, name, 0

    def record_event(self) -> str:
        self.number += 1
        return f"event {self.number}"

    def wait_event(self, event: str) -> None:
        self.told.append(f"{self.name} waits for {event}")


def test_one_microbatch_is_copied_ahead_and_held_for_the_stream_that_uses_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []
    copies, compute = Stream(told, "copies"), Stream(told, "compute")

    def copy(tensor: Tensor, device: Any, *, non_blocking: bool) -> Tensor:
        assert non_blocking
        told.append(f"copy {tensor.sum():g}")
        return tensor.clone()

    def record(tensor: Tensor, stream: Stream) -> None:
        told.append(f"{stream.name} uses {tensor.sum():g}")

    monkeypatch.setattr(staging, "needs_copies", lambda _device: True)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _device: copies)
    monkeypatch.setattr(torch.cuda, "stream", lambda _stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: compute)
    monkeypatch.setattr(Tensor, "to", copy)
    monkeypatch.setattr(Tensor, "record_stream", record)
    values = [torch.tensor([1.0]), None, torch.tensor([3.0])]
    ahead = Staging(HOST).ahead(values)
    assert told == ["copy 1"]
    assert ahead.take(0).tolist() == [1.0]
    assert told[1:] == ["copy 3", "compute waits for event 1", "compute uses 1"]
    assert ahead.take(2).tolist() == [3.0]
    assert told[4:] == ["compute waits for event 2", "compute uses 3"]
    # A stage may leave a microbatch out.
    told.clear()
    assert Staging(HOST).ahead(values).take(2).tolist() == [3.0]
    assert told == ["copy 1", "copy 3", "compute waits for event 4", "compute uses 3"]
