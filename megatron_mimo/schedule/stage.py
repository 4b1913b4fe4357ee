"""One pipeline stage of a module on this rank, through one step."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megatron_mimo.schedule.boundary import Boundary


class Stage:
    """Runs the forward and backward of one stage and moves what goes in and out.

    What a microbatch leaves behind is dropped as soon as it has been used. Of an output that was
    sent, only its place in the autograd graph is kept, so its memory is free once it has left
    (megatron-core's `deallocate_output_tensor` to the same end replaces the tensor's data).

    Args:
        compute: Runs the model on a microbatch: (index, input or None) to output.
        has_work: Whether the model runs on a microbatch at all.
        before: Boundary to the stage before; None on the first.
        after: Boundary to the stage behind; None on the last, whose output is a loss.
    """

    def __init__(
        self,
        compute: Callable[[int, Tensor | None], Tensor],
        has_work: Callable[[int], bool],
        *,
        before: Boundary | None,
        after: Boundary | None,
    ) -> None:
        self._compute = compute
        self._has_work = has_work
        self._before = before
        self._after = after
        self._inputs: dict[int, Tensor] = {}
        self._outputs: dict[int, Tensor] = {}
        # What backward starts from: a loss, or the place of an output in the graph.
        self._heads: dict[int, Tensor | GradientEdge] = {}
        self._output_grads: dict[int, Tensor] = {}

    def post_input(self, m: int) -> None:
        """Ask for a microbatch's input."""
        assert self._before is not None
        self._before.post_forward(m, None)

    def wait_input(self, m: int) -> None:
        """Wait for a microbatch's input."""
        assert self._before is not None
        rows = self._before.wait_forward(m)
        if rows is not None:
            # A leaf of this stage's graph: its gradient is what goes back.
            self._inputs[m] = rows.detach().requires_grad_(self._returns_input(m))

    def forward(self, m: int) -> None:
        """Run the model."""
        if not self._has_work(m):
            return
        output = self._compute(m, self._inputs.get(m))
        if self._after is not None:
            self._outputs[m] = output
        elif output.requires_grad:
            # A frozen model has nothing to do for a microbatch without rows.
            self._heads[m] = output
        if not self._runs_backward(m):
            self._release_input(m)

    def send_output(self, m: int) -> None:
        """Hand a microbatch's output on."""
        assert self._after is not None
        output = self._outputs.pop(m, None)
        self._after.post_forward(m, None if output is None else output.detach())
        if output is not None and self._after.returns[m] and output.requires_grad:
            self._heads[m] = get_gradient_edge(output)

    def wait_sent(self, m: int) -> None:
        """Wait until a microbatch's output has left."""
        assert self._after is not None
        self._after.wait_sent(m)

    def post_grad(self, m: int) -> None:
        """Ask for the gradient of a microbatch's output."""
        assert self._after is not None
        if self._after.returns[m]:
            self._after.post_backward(m, None)

    def wait_grad(self, m: int) -> None:
        """Wait for the gradient of a microbatch's output."""
        assert self._after is not None
        grad = self._after.wait_backward(m)
        if grad is not None:
            self._output_grads[m] = grad

    def backward(self, m: int) -> None:
        """Run autograd from a microbatch's loss, or from its output with the gradient received."""
        head = self._heads.pop(m, None)
        if head is not None:
            torch.autograd.backward(head, self._output_grads.pop(m, None))
        if self._after is not None:
            self._after.release_backward(m)
        if not self._returns_input(m):
            self._release_input(m)

    def send_grad(self, m: int) -> None:
        """Send the gradient of a microbatch's input back."""
        assert self._before is not None
        if not self._before.returns[m]:
            return
        leaf = self._inputs.pop(m, None)
        if leaf is not None and leaf.grad is None:
            raise RuntimeError(
                f"microbatch {m}: no gradient reached the {leaf.shape[0]} rows that this stage was "
                f"given: does its output depend on them?"
            )
        self._before.post_backward(m, None if leaf is None else leaf.grad)
        self._before.release_forward(m)

    def drain(self) -> None:
        """Wait until everything has left."""
        for boundary in (self._before, self._after):
            if boundary is not None:
                boundary.drain()

    def _returns_input(self, m: int) -> bool:
        return self._before is not None and self._before.returns[m]

    def _runs_backward(self, m: int) -> bool:
        return torch.is_grad_enabled() and (self._after is None or self._after.returns[m])

    def _release_input(self, m: int) -> None:
        self._inputs.pop(m, None)
        if self._before is not None:
            self._before.release_forward(m)
