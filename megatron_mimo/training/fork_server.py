"""Imported, once, by the process that ranks are forked from: see `training.launch`."""

import signal

from megatron_mimo.training.preload import end_with_parent, preload

# It would outlive a launcher that was killed, and nobody would notice that one's end.
end_with_parent(signal.SIGKILL)
preload()
