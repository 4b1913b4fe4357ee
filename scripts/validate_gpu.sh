#!/usr/bin/env bash
# Purpose: validate this machine's GPUs: what the tests run on hosts, on 1, 2 or 8 GPUs.
#
#   scripts/validate_gpu.sh [--gpus N] [--out DIR] ...      --help lists all
#
# Writes the table of docs/gpu-validation.md. Exit codes: 0 all checks pass, 1 one fails, 2 wrong
# usage, or no GPU.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${MIMO_PYTHON:-$root/.venv/bin/python}
[[ -x $python ]] || python=$(command -v "$python" || command -v python) || {
  echo "error: there is no Python: 'make install' in $root sets one up; or set MIMO_PYTHON" >&2
  exit 2
}
cd "$root"
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m tests.validation "$@"
