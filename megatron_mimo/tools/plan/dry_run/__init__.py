"""`megatron-mimo plan --dry-run`: a step of every distinct role of a layout, on one machine.

- `roles` tells which ranks of a layout do the same: integers.
- `worker` is one role: a process that builds a rank with the product's own code, on paper
  (`runtime.paper`), and runs a training step.
- `samples` has the microbatches of that step.
- `command` starts the workers, `table` shows what they found.
"""

from collections.abc import Sequence

FLAG = "--dry-run"


def asks_for_dry_run(argv: Sequence[str]) -> bool:
    """Whether the arguments of `plan` ask for a dry run, which takes other flags."""
    return any(token.replace("_", "-") == FLAG for token in argv)
