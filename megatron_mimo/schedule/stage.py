"""One pipeline stage of a module on this rank, through one step."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megatron_mimo.bridge.boundary import Traffic


class Stage:
    """Runs the forward and backward of one stage, and transfers its inputs and outputs.

    The state of a microbatch is released as soon as it has been used. Of an output that was sent,
    only its node in the autograd graph is kept, so its memory is free once the send is complete
    (megatron-core's `deallocate_output_tensor` replaces the tensor's data for the same purpose).

    Args:
        compute: Function that runs the model: (index of a microbatch, inputs by the name of the
            module that they come from) -> output.
        has_work: Function that says whether the model runs on a microbatch at all.
        before: Name of the module that feeds this stage -> traffic on the boundary to it; the
            previous stage belongs to the same module. Empty on a stage without inputs.
        after: Traffic to the next stage; None on the last stage, whose output is a loss.
        idle: Function that is called in place of the forward, and with True of the backward, of a
            microbatch on which the model does not run.
    """

    def __init__(
        self,
        compute: Callable[[int, Mapping[str, Tensor]], Tensor],
        has_work: Callable[[int], bool],
        *,
        before: Mapping[str, Traffic],
        after: Traffic | None,
        idle: Callable[[bool], None] = lambda backward: None,
    ) -> None:
        self._compute = compute
        self._idle = idle
        self._has_work = has_work
        self._before = before
        self._after = after
        self._inputs: dict[int, dict[str, Tensor]] = {}
        self._outputs: dict[int, Tensor] = {}
        # What backward starts from: a loss, or the node of an output in the graph.
        self._heads: dict[int, Tensor | GradientEdge] = {}
        self._output_grads: dict[int, Tensor] = {}

    def post_input(self, m: int) -> None:
        """Post the receives of a microbatch's input, except those posted with this rank's sends."""
        for traffic in self._before.values():
            if not traffic.has_both_ends:
                traffic.post_forward(m, None)

    def wait_input(self, m: int) -> None:
        """Wait for a microbatch's input."""
        found = {}
        for name, traffic in self._before.items():
            rows = traffic.wait_forward(m)
            if rows is not None:
                # A leaf of this stage's graph: its gradient is what is sent back.
                found[name] = rows.detach().requires_grad_(traffic.returns[m])
        if found:
            self._inputs[m] = found

    def forward(self, m: int) -> None:
        """Run the model."""
        if not self._has_work(m):
            self._idle(False)
            return
        output = self._compute(m, self._inputs.get(m, {}))
        if self._after is not None:
            self._outputs[m] = output
        elif output.requires_grad:
            # A frozen model has nothing to do for a microbatch without rows.
            self._heads[m] = output
        if not self._runs_backward(m):
            self._release_inputs(m, list(self._before))

    def send_output(self, m: int) -> None:
        """Send a microbatch's output to the next stage."""
        assert self._after is not None
        output = self._outputs.pop(m, None)
        self._after.post_forward(m, None if output is None else output.detach())
        if output is not None and self._after.returns[m] and output.requires_grad:
            self._heads[m] = get_gradient_edge(output)

    def wait_sent(self, m: int) -> None:
        """Wait until a microbatch's output has been sent."""
        assert self._after is not None
        self._after.wait_sent(m)

    def post_grad(self, m: int) -> None:
        """Post the receive of the gradient of a microbatch's output."""
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
        elif not self._has_work(m):
            self._idle(True)
        if self._after is not None:
            self._after.release_backward(m)
        self._release_inputs(m, [n for n, of in self._before.items() if not of.returns[m]])

    def send_grad(self, m: int) -> None:
        """Send the gradients of a microbatch's inputs back.

        Raises:
            RuntimeError: No gradient reached an input.
        """
        for name, traffic in self._before.items():
            if not traffic.returns[m]:
                continue
            leaf = self._inputs.get(m, {}).get(name)
            if leaf is not None and leaf.grad is None:
                raise RuntimeError(
                    f"microbatch {m}: no gradient reached the {leaf.shape[0]} rows that this stage "
                    f"was given by {name}: does its output depend on them?"
                )
            traffic.post_backward(m, None if leaf is None else leaf.grad)
            self._release_inputs(m, [name])

    def drain(self) -> None:
        """Wait until everything has been sent."""
        for traffic in self._before.values():
            traffic.drain()
        if self._after is not None:
            self._after.drain()

    def _runs_backward(self, m: int) -> bool:
        return torch.is_grad_enabled() and (self._after is None or self._after.returns[m])

    def _release_inputs(self, m: int, names: list[str]) -> None:
        held = self._inputs.get(m, {})
        for name in names:
            held.pop(name, None)
            self._before[name].release_forward(m)
        if not held:
            self._inputs.pop(m, None)
