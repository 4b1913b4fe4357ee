"""Imported once by the process that ranks are forked from, see `launch.ranks`."""

import os
import signal
from contextlib import suppress

from megatron_mimo.launch.parent import end_with_parent

# Ctrl-C reaches this process too. The launcher ends it; ranks are to handle it as ever.
_before = signal.signal(signal.SIGINT, signal.SIG_IGN)
# Otherwise it would outlive a killed launcher, and the ranks would not notice the launcher's end.
# Imports take seconds, so this comes first. Ranks, whose records list such variables, need it not.
end_with_parent(int(os.environ.pop("MIMO_LAUNCHER")))


def _import_all() -> None:
    from megatron_mimo.launch.preload import preload

    # What is wrong with this machine's packages each rank finds again, and reports under its name.
    with suppress(ValueError):
        preload()


_import_all()
signal.signal(signal.SIGINT, _before)
