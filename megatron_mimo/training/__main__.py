"""One rank of a training run: `python -m megatron_mimo.training`, started by a launcher."""

from megatron_mimo import interrupts  # noqa: F401 - an interrupt is quiet from here on

# isort: split
import sys

from megatron_mimo.training.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
