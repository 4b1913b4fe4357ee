"""One rank of a training run: `python -m megatron_mimo.training`, started by a launcher."""

import sys

from megatron_mimo.training.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
