"""Copies of tensors in host memory that is used again."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_mimo.runtime.host_copy import HostCopy

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@given(st.lists(st.tuples(SHAPES, st.sampled_from(DTYPES)), max_size=6))
def test_copies_stay_when_tensors_change(kinds: list[tuple[tuple[int, ...], torch.dtype]]) -> None:
    tensors = [torch.randint(0, 2, shape).to(dtype) for shape, dtype in kinds]
    before = [tensor.clone() for tensor in tensors]
    copies = HostCopy().take(tensors)
    for tensor in tensors:
        tensor += torch.ones((), dtype=tensor.dtype)
    assert len(copies) == len(before)
    for copy, wanted in zip(copies, before, strict=True):
        assert copy.dtype == wanted.dtype
        assert torch.equal(copy, wanted)
        assert copy.untyped_storage().size() == wanted.nbytes


def test_the_next_copies_take_the_same_memory() -> None:
    copier, weights = HostCopy(), torch.arange(12.0)
    tensors = [weights[:5], weights[5:].view(7, 1)]
    places = [copy.data_ptr() for copy in copier.take(tensors)]
    weights *= 2
    again = copier.take(tensors)
    assert [copy.data_ptr() for copy in again] == places
    assert torch.equal(torch.cat([copy.view(-1) for copy in again]), weights)


def test_other_tensors_take_other_memory() -> None:
    copier = HostCopy()
    copier.take([torch.ones(3)])
    for other in (torch.ones(4), torch.ones(3, dtype=torch.float64), torch.ones(3, 1)):
        (copy,) = copier.take([other])
        assert copy.dtype == other.dtype
        assert torch.equal(copy, other)


def test_weights_that_train_are_copied_without_a_graph() -> None:
    (copy,) = HostCopy().take([torch.ones(2, requires_grad=True)])
    assert not copy.requires_grad
