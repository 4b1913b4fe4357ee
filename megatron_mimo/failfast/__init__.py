"""If any rank fails, all ranks end within seconds, and the first failure is shown last.

Each rank has a *watcher*: a small process of its own, which imports nothing but the standard
library. It sees its rank die or stop, whatever the rank was doing; the watcher of rank 0 is also
the *hub*, which hears from all watchers once a second and decides which rank failed first. A
separate process, because a thread of the rank cannot run while the rank is stopped, ends with
it after `kill -9`, and seems to have ended while a library holds Python's lock for long.

`guard_rank` is what a rank uses. docs/how-to/failures.md says what users see.
"""

from megatron_mimo.failfast.guard import Guard, guard_rank
from megatron_mimo.failfast.report import (
    EXIT_FAILED,
    EXIT_USAGE,
    FailureReport,
    render,
)

__all__ = ["EXIT_FAILED", "EXIT_USAGE", "FailureReport", "Guard", "guard_rank", "render"]
