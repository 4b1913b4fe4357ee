"""Train a multimodal model on two process grids: one rank, started by torchrun or srun."""

import sys

from megatron_mimo.training.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
