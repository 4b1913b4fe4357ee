#!/usr/bin/env bash
# Sets up .venv, for `make install`: Python, torch, then this package with all that it needs.
#
#   scripts/install.sh             install
#   scripts/install.sh --dry-run   say what would be done; only a dry run of uv reaches the network
#
# Of the environment:
#   PYTHON              interpreter, 3.12 or newer
#   UV                  path to uv; without it, uv on PATH, and pip where there is none
#   UV_TORCH_BACKEND    build of torch by uv's name for it, such as cpu or cu130. Without it, a Linux
#                       machine that has no NVIDIA GPU gets the build for CPUs, where that can be
#                       reached, and all others the usual one of their index.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-$(command -v python3.12 || command -v python3 || true)}
UV=${UV:-$(command -v uv || true)}
BIN=.venv/bin
DRY_RUN=
case "${1:-}" in
  '') ;;
  --dry-run) DRY_RUN=1 ;;
  *) echo "error: unknown argument '$1': only --dry-run is known" >&2; exit 2 ;;
esac

say() { printf 'install: %s\n' "$*"; }
run() { if [ -n "$DRY_RUN" ]; then printf '  %s\n' "$*"; else "$@"; fi; }

has_gpu() { [ -e /proc/driver/nvidia/version ] || nvidia-smi -L >/dev/null 2>&1; }

check_python() {
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && return
  echo "error: need Python 3.12 or newer, found '$PYTHON' ($("$PYTHON" --version 2>&1)):" \
    "install it, or set PYTHON=/path/to/python3.12" >&2
  exit 2
}

make_environment() {
  if "$BIN/python" -c '' 2>/dev/null; then return; fi
  say "a new environment in .venv, with $("$PYTHON" --version)"
  if [ -n "$UV" ]; then
    run "$UV" venv --quiet --clear --python "$PYTHON" .venv
  elif ! run "$PYTHON" -m venv --clear .venv; then
    echo "error: '$PYTHON -m venv' failed; Debian and Ubuntu keep it in python3-venv" >&2
    exit 2
  fi
}

with_pip() { run "$BIN/python" -m pip install --quiet --disable-pip-version-check "$@"; }
with_uv() { run "$UV" pip install --quiet --compile-bytecode --python "$BIN/python" "$@"; }

# Bring a build of torch that uv has a name for, and of torchvision, which has to fit it; another status
# than 0 where it cannot be reached.
install_torch() {
  local backend=$1 uv=$UV python=$BIN/python said
  if [ -z "$uv" ]; then
    uv=$BIN/uv
    if ! [ -x "$uv" ] && ! with_pip uv; then
      REASON="pip cannot install uv, which knows where that build is"
      return 1
    fi
  fi
  if [ -n "$DRY_RUN" ]; then
    [ -x "$uv" ] || { say "uv would look for the build of torch that it names '$backend'"; return; }
    [ -x "$python" ] || python=$PYTHON
  fi
  local -a torch=(--python "$python" --torch-backend "$backend" -c constraints.txt torch torchvision)
  if ! said=$(UV_HTTP_RETRIES=1 "$uv" pip install --dry-run "${torch[@]}" 2>&1); then
    # The last of uv's causes is the most exact one.
    said=${said##*$'\n'}
    REASON="uv: ${said#*cause: }"
    return 1
  fi
  say "torch, the build that uv names '$backend'"
  run "$uv" pip install --quiet --compile-bytecode "${torch[@]}"
}

REASON=
check_python
make_environment
if [ -n "${UV_TORCH_BACKEND:-}" ]; then
  install_torch "$UV_TORCH_BACKEND" || {
    echo "error: UV_TORCH_BACKEND=$UV_TORCH_BACKEND cannot be had ($REASON): unset it for the usual" \
      "build of torch" >&2
    exit 2
  }
elif [ "$(uname -s)" = Linux ] && ! has_gpu && ! install_torch cpu; then
  say "torch's build for CPUs cannot be reached ($REASON): taking the usual one, whose CUDA libraries" \
    "make .venv 5.6 GB instead of 1.5"
fi
say "megatron_mimo and the packages of constraints.txt (a few minutes the first time)"
unset UV_TORCH_BACKEND  # What it asked for is there, and satisfies what follows.
if [ -n "$UV" ]; then with_uv -e '.[demo,dev]' -c constraints.txt; else with_pip -e '.[demo,dev]' -c constraints.txt; fi
[ -n "$DRY_RUN" ] || say "done: .venv has $(du -sh .venv | cut -f1). Next: source $BIN/activate, then make demo"
