"""Train a multimodal model on two process grids: one rank, started by torchrun or srun."""

from megatron_mimo import interrupts  # noqa: F401 - an interrupt is quiet from here on

# isort: split
import sys

from megatron_mimo.training.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
