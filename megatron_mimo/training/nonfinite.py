"""Steps in a row whose loss or gradients are not finite, and the end of a run that has too many."""

import math

from megatron_mimo.training.step import StepMetrics


class NonfiniteRow:
    """Counts steps in a row that were not applied and that no smaller loss scale can repair.

    What it counts is equal on every rank, so all ranks end at the same step. A batch that is bad
    comes alone; several in a row with the same weights say that the weights are bad.

    Args:
        most: Number of steps in a row that end the run.
        iteration: Number of the iteration after which the run begins or continues.
    """

    def __init__(self, most: int, iteration: int) -> None:
        self._most = most
        self._last_good = iteration
        self._steps: list[tuple[int, StepMetrics]] = []

    def __bool__(self) -> bool:
        """Whether the last step was such a step."""
        return bool(self._steps)

    @property
    def is_full(self) -> bool:
        """Whether the run must end."""
        return len(self._steps) >= self._most

    def note(self, iteration: int, step: StepMetrics) -> None:
        """Count a step, or begin again from zero after one that was applied."""
        update = step.update
        # A float16 gradient that overflows says that the scale is too large: it halves next.
        is_overflow = update.scale_falls and math.isfinite(step.agreed_loss)
        if update.applied:
            self._last_good = iteration
        if update.applied or is_overflow:
            self._steps = []
        else:
            self._steps.append((iteration, step))

    def require_none(self) -> None:
        """Refuse to end here as if all were well.

        Raises:
            RuntimeError: The last step was not finite; the message has its values and what to do.
        """
        if not self._steps:
            return
        iteration, step = self._steps[-1]
        norms = ", ".join(f"{name} {norm:g}" for name, norm in step.update.module_norms.items())
        number = len(self._steps)
        last = f"the last {number} steps were" if number > 1 else "the last step was"
        raise RuntimeError(
            f"iteration {iteration}: loss {step.agreed_loss:g}, gradient norm "
            f"{step.update.grad_norm:g} ({norms}): {last} not finite (--max-nonfinite-steps "
            f"{self._most}), so weights are those of iteration {self._last_good}, and nothing was "
            f"saved since. Continue from a checkpoint before it with a lower --lr or --clip-grad, "
            f"or look at the samples (--sample-trace-dir)"
        )
