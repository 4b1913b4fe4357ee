"""Collectives of torch's process groups by name: what their arguments say of sizes and dtypes."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from tests.strict.errors import StrictError
from tests.strict.notes import Note


def _of(tensors: Iterable[Tensor]) -> str:
    """Sizes and dtypes: "128 float32"."""
    return ", ".join(f"{t.numel()} {str(t.dtype).removeprefix('torch.')}" for t in tensors)


def _flat(nested: Iterable[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for one in nested:
        found += [one] if isinstance(one, Tensor) else _flat(one)
    return found


def _sum(opts: Any) -> str:
    """Name of a reduction: "SUM"."""
    return str(opts.reduceOp.op.name)


def _require(holds: bool, text: str) -> None:
    if not holds:
        raise StrictError(f"{text}: NCCL would read or write beyond its tensors")


def _all_reduce(_rank: int, _size: int, tensors: Sequence[Tensor], opts: Any) -> Note:
    return Note(f"all_reduce {_sum(opts)} of {_of(tensors)}")


def _broadcast(_rank: int, _size: int, tensors: Sequence[Tensor], opts: Any) -> Note:
    return Note(f"broadcast of {_of(tensors)} from rank {opts.rootRank}")


def _reduce(_rank: int, _size: int, tensors: Sequence[Tensor], opts: Any) -> Note:
    return Note(f"reduce {_sum(opts)} of {_of(tensors)} to rank {opts.rootRank}")


def _gather(_rank: int, _size: int, _out: Any, tensors: Sequence[Tensor], opts: Any) -> Note:
    return Note(f"gather of {_of(tensors)} to rank {opts.rootRank}")


def _scatter(_rank: int, _size: int, tensors: Sequence[Tensor], _in: Any, opts: Any) -> Note:
    return Note(f"scatter of {_of(tensors)} from rank {opts.rootRank}")


def _all_gather(rank: int, _size: int, out: Any, tensors: Sequence[Tensor], *_opts: Any) -> Note:
    for pieces, mine in zip(out, tensors, strict=True):
        text = f"all_gather of {_of([mine])} into {_of(pieces)}"
        _require(pieces[rank].numel() == mine.numel(), text)
    return Note(f"all_gather of {_of(_flat(out))}")


def _reduce_scatter(rank: int, _size: int, out: Sequence[Tensor], pieces: Any, opts: Any) -> Note:
    for mine, whole in zip(out, pieces, strict=True):
        text = f"reduce_scatter of {_of(whole)} into {_of([mine])}"
        _require(whole[rank].numel() == mine.numel(), text)
    return Note(f"reduce_scatter {_sum(opts)} of {_of(_flat(pieces))}")


def _all_gather_single(_rank: int, size: int, out: Any, given: Any, *_opts: Any) -> Note:
    for whole, mine in zip(_flat([out]), _flat([given]), strict=True):
        text = f"all_gather of {_of([mine])} into {_of([whole])} on {size} ranks"
        _require(whole.numel() == size * mine.numel() and whole.dtype == mine.dtype, text)
    return Note(f"all_gather of {_of(_flat([given]))}")


def _reduce_scatter_single(_rank: int, size: int, out: Any, given: Any, opts: Any) -> Note:
    for mine, whole in zip(_flat([out]), _flat([given]), strict=True):
        text = f"reduce_scatter of {_of([whole])} into {_of([mine])} on {size} ranks"
        _require(whole.numel() == size * mine.numel() and whole.dtype == mine.dtype, text)
    return Note(f"reduce_scatter {_sum(opts)} of {_of(_flat([given]))}")


def _all_to_all(_rank: int, _size: int, out: Any, given: Any, *_opts: Any) -> Note:
    dtype = _flat(out)[0].dtype
    sizes = ([tensor.numel() for tensor in _flat(one)] for one in (given, out))
    return Note(f"all_to_all of {dtype}", *sizes)


def _all_to_all_single(
    _rank: int, size: int, out: Tensor, given: Tensor, takes: Any, gives: Any, *_opts: Any
) -> Note:
    numbers = []
    for tensor, lengths in ((given, gives), (out, takes)):
        width = tensor[0].numel() if len(tensor) else 0
        rows = list(lengths) or [len(tensor) // size] * size
        _require(sum(rows) == len(tensor), f"all_to_all of {_of([tensor])} in pieces of {rows}")
        numbers.append([int(row) * width for row in rows])
    return Note(f"all_to_all of {given.dtype}", *numbers)


def _barrier(*_args: Any, **_kwargs: Any) -> Note:
    return Note("barrier")


COLLECTIVES: dict[str, Callable[..., Note]] = {
    "all_gather_single": _all_gather_single,
    "all_gather_single_coalesced": _all_gather_single,
    "all_to_all_single": _all_to_all_single,
    "allgather": _all_gather,
    "allreduce": _all_reduce,
    "allreduce_coalesced": _all_reduce,
    "alltoall": _all_to_all,
    "barrier": _barrier,
    "broadcast": _broadcast,
    "gather": _gather,
    "reduce": _reduce,
    "reduce_scatter": _reduce_scatter,
    "reduce_scatter_single": _reduce_scatter_single,
    "reduce_scatter_single_coalesced": _reduce_scatter_single,
    "scatter": _scatter,
}
"""Method of a process group -> its note, from (rank, size, *arguments of the method).

The names are those that `torch.distributed` calls; another one is an error that says so."""

OLD_NAMES = {
    "_allgather_base": "all_gather_single",
    "_reduce_scatter_base": "reduce_scatter_single",
    "allgather_into_tensor_coalesced": "all_gather_single_coalesced",
    "alltoall_base": "all_to_all_single",
    "reduce_scatter_tensor_coalesced": "reduce_scatter_single_coalesced",
}
"""What older versions of torch call them."""


def tensors_of(args: Sequence[Any]) -> list[Tensor]:
    """All tensors among the arguments of a collective."""
    found: list[Tensor] = []
    for one in args:
        if isinstance(one, Tensor):
            found.append(one)
        elif isinstance(one, list | tuple) and not (one and isinstance(one[0], int)):
            found += tensors_of(one)
    return found
