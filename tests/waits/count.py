"""Lists what would wait for the device."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.waits.methods import Methods, host_copy
from tests.waits.places import DEVICE, Places, names_device

# Operators whose result, or its size, the host reads.
READS = frozenset(
    f"aten::{name}"
    for name in (
        "_local_scalar_dense",
        "_unique",
        "_unique2",
        "bincount",
        "equal",
        "is_nonzero",
        "masked_select",
        "nonzero",
        "repeat_interleave",
        "unique_consecutive",
        "unique_dim",
    )
)
_INDEXING = frozenset({"aten::index", "aten::index_put", "aten::index_put_"})
# Operators that may have tensors of both places.
_BETWEEN = frozenset({"aten::copy_", "aten::_to_copy", "aten::set_"}) | _INDEXING
_PACKAGES = ("megatron_mimo", "megatron", "transformer_engine")
# What stands for a kernel or for the device itself.
_STANDS_FOR_DEVICE = "/megatron_mimo/runtime/host/"


@dataclass(frozen=True, order=True)
class Wait:
    """Something that would wait, or fail, on a GPU.

    Attributes:
        kind: What happens: "copy to device", "copy to host", "read", "synchronize", or "mixed" for
            an operator that refuses tensors of two places.
        where: File and function that does it, as "package/file.py function".
        what: Name of the operator or method.
    """

    kind: str
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what} ({self.kind})"


@contextmanager
def counting() -> Iterator[list[Wait]]:
    """Pretend that this rank computes on a device; the list grows with every wait.

    Models and runners have to be built inside, by `Device("cpu")`, for their weights to be on the
    device.
    """
    places, waits = Places(), list[Wait]()

    def note(kind: str, what: str) -> None:
        where = _where(what)
        if where is not None:
            waits.append(Wait(kind, where, what))

    with ExitStack() as stack:
        for owner, name, value in _replacements(places, note):
            stack.enter_context(_replaced(owner, name, value))
        stack.enter_context(_Operators(places, note))
        yield waits


class _Operators(TorchDispatchMode):
    """Sees every operator, those of backward too."""

    def __init__(self, places: Places, note: Callable[[str, str], None]) -> None:
        super().__init__()
        self._places, self._note = places, note

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        here = [x for x in tensors if self._places.on_device(x)]
        if here:
            self._judge(name, args, kwargs, [x for x in tensors if not self._places.on_device(x)])
        to_device = name == "aten::_to_copy" and kwargs.get("device") == DEVICE
        if to_device and not here:
            self._copy_to_device(args[0], kwargs.get("non_blocking", False), name)
        result = func(*args, **kwargs)
        # Zeros for a gradient that is missing; those that Python code makes say where.
        in_backward = not tensors and _in_backward() and not self._places.making
        # An output that was given, as of a copy to the host, stays where it is.
        computed = (here or to_device) and not func._schema.is_mutable
        if in_backward or computed:
            for x in tree_leaves(result):
                if isinstance(x, Tensor):
                    self._places.device.add(x)
        return result

    def _judge(self, name: str, args: Any, kwargs: Any, on_host: list[Tensor]) -> None:
        """What an operator with tensors on the device does."""
        if name in READS and not (name == "aten::repeat_interleave" and kwargs.get("output_size")):
            self._note("read", name)
        elif name == "aten::copy_" and on_host:
            target, source, *rest = args
            if on_host[0] is source:
                self._copy_to_device(source, bool(rest and rest[0]), name)
            elif not (rest and rest[0] and target in self._places.pinned):
                self._note("copy to host", name)
        elif name in _INDEXING:
            self._index(name, args)
        elif name not in _BETWEEN and any(x.dim() for x in on_host):
            self._note("mixed", name)

    def _copy_to_device(self, source: Tensor, non_blocking: bool, name: str) -> None:
        of_gloo = self._places.finishing
        if not of_gloo and not self._places.copies_without_waiting(source, non_blocking):
            self._note("copy to device", name)

    def _index(self, name: str, args: Any) -> None:
        indices = [x for x in args[1] if isinstance(x, Tensor)]
        if any(x.dim() and not self._places.on_device(x) for x in indices):
            self._note("copy to device", name)
        if any(x.dtype in (torch.bool, torch.uint8) for x in indices):
            # One value for all that a mask selects is filled in without counting them.
            fills = name != "aten::index" and args[2].numel() == 1 and len(indices) == 1
            if not fills:
                self._note("read", name)


def _in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)


Replacement = tuple[Any, str, Any]


def _replacements(places: Places, note: Callable[[str, str], None]) -> Iterator[Replacement]:
    """What says where tensors are made, moved and read."""
    from megatron.core.transformer.moe import token_dispatcher

    from megatron_mimo.runtime import Device, staging
    from megatron_mimo.runtime.host import cuda_namespace, tensors

    yield Device, "torch", property(lambda _self: DEVICE)
    yield staging, "needs_copies", names_device
    yield torch.cuda, "current_device", lambda: DEVICE

    def synchronize(*_args: Any, **_kwargs: Any) -> None:
        note("synchronize", "synchronize")

    wait = torch.distributed.Work.wait

    def finish(work: Any, *args: Any, **kwargs: Any) -> Any:
        """gloo copies from buffers of its own, which NCCL does not need."""
        places.finishing = True
        try:
            return wait(work, *args, **kwargs)
        finally:
            places.finishing = False

    yield torch.distributed.Work, "wait", finish
    yield torch.cuda, "synchronize", synchronize
    yield cuda_namespace.HostStream, "synchronize", synchronize
    yield cuda_namespace.HostEvent, "synchronize", synchronize
    move: Any = token_dispatcher.maybe_move_tensor_to_cpu  # type: ignore[attr-defined]

    def move_to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        """On a side stream; the dispatcher waits for it later, and that is counted."""
        if isinstance(tensor, Tensor) and places.on_device(tensor):
            tensor = host_copy(tensor)
        return move(tensor, as_numpy, record_stream)

    yield token_dispatcher, "maybe_move_tensor_to_cpu", move_to_host
    for name in tensors._FACTORIES:
        yield torch, name, _factory(name, getattr(torch, name), places, note)
    for name in tensors._NEW_METHODS:
        yield Tensor, name, _factory(name, getattr(Tensor, name), places, note)
    yield from Methods(places, note).replacements()


def _factory(
    name: str, make: Callable[..., Tensor], places: Places, note: Callable[[str, str], None]
) -> Callable[..., Tensor]:
    """A factory that notes what it makes on the device."""

    def made(*args: Any, **kwargs: Any) -> Tensor:
        device = kwargs.get("device")
        inherits = name.startswith("new_") and device is None and places.on_device(args[0])
        if names_device(device):
            kwargs["device"] = torch.device("cpu")
        places.making = True
        try:
            tensor = make(*args, **kwargs)
        finally:
            places.making = False
        if names_device(device) or inherits:
            # From a list of numbers; from a tensor there, nothing is copied.
            source = args[1 if inherits else 0] if args else None
            numbers = name in ("tensor", "as_tensor", "asarray", "new_tensor")
            if numbers and not (isinstance(source, Tensor) and places.on_device(source)):
                note("copy to device", f"torch.{name}")
            places.device.add(tensor)
        if kwargs.get("pin_memory"):
            places.pinned.add(tensor)
        return tensor

    return made


def _where(what: str) -> str | None:
    """Innermost code of ours or of megatron-core; None for what stands for the device."""
    frame, found = sys._getframe(2), None
    while frame is not None:
        path = frame.f_code.co_filename
        # gloo copies to buffers of its own, which NCCL does not need.
        is_gloo = path.endswith("/torch/distributed/distributed_c10d.py") and found is None
        if "/tests/fused/" in path or (is_gloo and what == "aten::copy_"):
            return None
        if found is None and _STANDS_FOR_DEVICE not in path:
            for package in _PACKAGES:
                _, slash, rest = path.rpartition(f"/{package}/")
                if slash:
                    found = f"{package}/{rest} {frame.f_code.co_name}"
                    break
        frame = frame.f_back  # type: ignore[assignment]
    return found or "elsewhere"


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute; afterwards it is as it was, or inherited again."""
    own = name in vars(owner)
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)
