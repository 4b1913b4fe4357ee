#!/usr/bin/env bash
# Starts a training run: the one launcher behind every script in this folder.
#
#   launch.sh SCRIPT FLAGS...
#
# In a Slurm job the ranks are the tasks of one srun step; with MIMO_LOCAL_RANKS=N they are N
# processes of this machine. README.md lists the variables, and says why things are as they are.
#
# Exit codes: 0 done or requeued, 2 wrong usage, else the step's own.
set -euo pipefail

scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=SCRIPTDIR/failures.sh
source "$scripts/failures.sh"

say() { printf '%s launch: %s\n' "$(date '+%Y-%m-%d %H:%M:%S')" "$*"; }

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# What the recipes set for every run; NCCL_PROTO differs between them and stands in each script.
export CUDA_DEVICE_MAX_CONNECTIONS=1
export NVTE_FWD_LAYERNORM_SM_MARGIN=16
export NVTE_BWD_LAYERNORM_SM_MARGIN=16
export NVTE_ALLOW_NONDETERMINISTIC_ALGO=1
export NCCL_P2P_NET_CHUNKSIZE=2097152
export NCCL_SHM_DISABLE=1
export NCCL_NVLS_ENABLE=0
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export TORCH_NCCL_AVOID_RECORD_STREAMS=0
# Leftovers of an outer torchrun would be taken for this run's.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE

# Sets: local, nodes, ranks_per_node, world, name.
read_place() {
  local=${MIMO_LOCAL_RANKS:-}
  name=${SLURM_JOB_NAME:-$(basename "${script%.*}")}
  nodes=1
  ranks_per_node=${local:-${MIMO_RANKS_PER_NODE:-8}}
  [[ $ranks_per_node =~ ^[1-9][0-9]*$ ]] ||
    fail "MIMO_RANKS_PER_NODE or MIMO_LOCAL_RANKS is '$ranks_per_node': expected a whole number"
  if [[ -n $local ]]; then
    name=$(basename "${script%.*}")
  elif [[ -n ${SLURM_JOB_ID:-} ]]; then
    nodes=${SLURM_JOB_NUM_NODES:?not set, though SLURM_JOB_ID is: submit with sbatch}
  elif [[ -n ${MIMO_DRY_RUN:-} ]]; then
    nodes=$(sed -nE 's/^#SBATCH --nodes=([0-9]+)$/\1/p' "$script")
    [[ -n $nodes ]] || fail "$script has no '#SBATCH --nodes=N': nothing to try here"
  else
    fail "$script is not in a Slurm job: submit it with sbatch, or see with" \
      "'MIMO_DRY_RUN=1 bash $script' what it would start"
  fi
  world=$((nodes * ranks_per_node))
}

# Sets: first_weights, the flags for what the run begins with.
read_first_weights() {
  first_weights=()
  local given=${MIMO_FIRST_WEIGHTS:-}
  local path=${given#*:}
  case $given in
    '' | random) ;;
    nemotron:?*) first_weights=(--load-nemotron-checkpoint "$path") ;;
    vision:?*) first_weights=(--load-vision-from "$path") ;;
    *)
      fail "MIMO_FIRST_WEIGHTS is '$given': expected nemotron:DIR (a Megatron checkpoint of the" \
        "whole model), vision:DIR (one with its vision encoder) or random"
      ;;
  esac
  # An untrained router sends most tokens to few experts, which says nothing of a trained one.
  case $given in random | vision:*) first_weights+=(--moe-router-force-load-balancing) ;; esac
}

check_paths() {
  local variable path
  for variable in MIMO_DATA_PATH MIMO_TOKENIZER MIMO_FIRST_WEIGHTS MIMO_HF_FOLDER; do
    path=${!variable:-}
    path=${path#nemotron:} path=${path#vision:}
    [[ -n $path && $path != random ]] || continue
    [[ $path == /* ]] || fail "$variable names $path: expected an absolute path"
    [[ -e $path ]] || fail "$variable names $path, which does not exist on $(hostname)"
  done
}

# Refuses a folder without a tokenizer.
check_tokenizer() {
  local folder=${MIMO_TOKENIZER:-} name
  [[ -n $folder ]] || return 0
  # All that transformers writes and reads have one of these.
  for name in tokenizer.json tokenizer_config.json tokenizer.model vocab.json vocab.txt; do
    [[ ! -e $folder/$name ]] || return 0
  done
  fail "MIMO_TOKENIZER names $folder, which holds no tokenizer: expected tokenizer.json, as" \
    "save_pretrained of transformers writes it"
}

# Refuses a dataset with fewer samples than the lanes that check_flags has found.
check_samples() {
  local info=${MIMO_DATA_PATH:-}/.nv-meta/.info.json lanes samples
  # A metadataset names its datasets elsewhere; the run counts their samples.
  [[ -f $info ]] || return 0
  lanes=$(sed -nE 's/^ *llm-dp: *([0-9]+)$/\1/p' "$logs/config.yaml")
  samples=$(grep -oE '": [0-9]+' "$info" | awk '{ all += $2 } END { print all + 0 }')
  [[ -z $lanes ]] || ((samples >= lanes)) ||
    fail "MIMO_DATA_PATH names $MIMO_DATA_PATH, which has $samples samples, and the run has $lanes" \
      "lanes (--llm-dp): expected at least a sample for each"
}

# Sets: run, checkpoints, logs. Attempts of one job have a folder of logs each.
make_folders() {
  run=${MIMO_RUN_DIR:-$root/runs/$name}
  [[ $run == /* ]] || fail "MIMO_RUN_DIR is $run: expected an absolute path"
  checkpoints=$run/checkpoints
  logs=$run/logs/${SLURM_JOB_ID:-local}.${SLURM_RESTART_COUNT:-0}
  mkdir -p "$checkpoints" "$logs" || fail "cannot write to $run: set MIMO_RUN_DIR"
}

# Prints the Python of this machine that has the program.
find_python() {
  local python=${MIMO_PYTHON:-}
  if [[ -z $python ]]; then
    python=$root/.venv/bin/python
    [[ -x $python ]] || python=python
  fi
  command -v "$python" ||
    fail "there is no $python: 'make install' in $root sets one up; or set MIMO_PYTHON or" \
      "MIMO_CONTAINER"
}

# Prints the Python of this machine, also where the run's own is in a container.
find_python_here() {
  [[ ${#container[@]} == 0 ]] || local MIMO_PYTHON=
  find_python
}

# Sets: python, container (flags of srun for one, by pyxis).
read_program() {
  container=()
  if [[ -z ${MIMO_CONTAINER:-} || -n $local ]]; then
    python=$(find_python)
    return
  fi
  python=${MIMO_PYTHON:-python}
  local path mounts=$root:$root,$run:$run
  for path in "${MIMO_DATA_PATH:-}" "${MIMO_TOKENIZER:-}" "${MIMO_FIRST_WEIGHTS:-}" \
    "${MIMO_HF_FOLDER:-}"; do
    path=${path#nemotron:} path=${path#vision:}
    [[ -z $path || $path == random ]] || mounts+=,$path:$path
  done
  container=(
    "--container-image=$MIMO_CONTAINER"
    "--container-mounts=$mounts${MIMO_CONTAINER_MOUNTS:+,$MIMO_CONTAINER_MOUNTS}"
    "--container-workdir=$root"
  )
}

# Resolves every flag at the run's real number of ranks, starting none. Writes $logs/config.yaml.
check_flags() {
  local command=(-m megatron_mimo.cli train --nproc "$world" --print-config "${flags[@]}")
  if [[ ${#container[@]} == 0 ]]; then
    command=("$python" "${command[@]}")
  elif [[ -n ${MIMO_DRY_RUN:-} ]]; then
    command=("$(find_python_here)" "${command[@]}")
  else
    # The program is in the container only.
    command=(srun --nodes=1 --ntasks=1 --ntasks-per-node=1 "${container[@]}" "$python" "${command[@]}")
  fi
  "${command[@]}" >"$logs/config.yaml" 2>"$logs/config.err" && return
  cat "$logs/config.err" >&2
  fail "$name cannot run on $nodes nodes x $ranks_per_node ranks = $world ranks, as said above." \
    "Nothing was started. If it is the number of ranks, submit with the script's own number of" \
    "nodes, or change its grids."
}

# With MIMO_DRY_RUN=full builds and steps every distinct role of the run here, without content.
check_roles() {
  [[ ${MIMO_DRY_RUN:-} == full ]] || return 0
  local code=0
  "$(find_python_here)" -m megatron_mimo.cli plan --dry-run --nproc "$world" "${flags[@]}" || code=$?
  ((code == 0)) || exit "$code"
}

# The iteration that the newest checkpoint ends, 0 without one, and for weights that no iteration led
# to. The text is compared with a pattern first: bash runs a command that stands in arithmetic.
saved_iteration() {
  local text='' tracker=$checkpoints/latest_checkpointed_iteration.txt
  if [[ ! -f $tracker ]]; then
    echo 0
    return
  fi
  # The end of the file is what `read` takes for a failure.
  read -r text <"$tracker" || true
  case $text in
    release) echo 0 ;;
    '' | *[!0-9]* | ????????????????*)
      fail "$tracker holds '${text:0:40}': expected the number of an iteration, or 'release';" \
        "write the one to go on from into it, as the iter_ folders beside it are named"
      ;;
    # A number with leading zeros would be octal.
    *) echo "$((10#$text))" ;;
  esac
}

# Whether the run left because its time was up, as opposed to having come to its end.
ran_out_of_time() {
  ((signalled)) && return
  local minutes
  minutes=$(sed -nE 's/^exit-duration-in-mins: ([0-9.]+)$/\1/p' "$logs/config.yaml")
  [[ -n $minutes ]] && awk -v m="$minutes" -v s="$SECONDS" 'BEGIN { exit !(s >= 60 * m) }'
}

# Puts the job back into the queue, unless it would only burn another slot.
requeue() {
  local before=$1 after
  after=$(saved_iteration)
  if ((after <= before)); then
    say "not requeued: no checkpoint was saved after iteration $before in this attempt. Raise" \
      "the time limit, or send the signal earlier (--signal), if saving takes longer."
    exit 1
  fi
  say "saved iteration $after (began after $before); requeueing job $SLURM_JOB_ID"
  if ! scontrol requeue "$SLURM_JOB_ID"; then
    say "the job cannot be requeued: submit $name again to go on from iteration $after"
    exit 1
  fi
  exit 0
}

# With MIMO_DRY_RUN prints a command, and fails so that it is not run.
only_show() {
  [[ -n ${MIMO_DRY_RUN:-} ]] || return 0
  printf '%q ' "$@"
  printf '\n'
  return 1
}

train_here() {
  local command=("$python" -m megatron_mimo.cli train --nproc "$world" "${flags[@]}")
  only_show "${command[@]}" || return 0
  exec "${command[@]}"
}

train_on_slurm() {
  local code before share cpus=()
  if [[ -n ${SLURM_CPUS_ON_NODE:-} ]]; then
    # srun would give each task one core; data is read beside the training process.
    share=$((SLURM_CPUS_ON_NODE / ranks_per_node))
    cpus=("--cpus-per-task=$((share > 0 ? share : 1))")
  fi
  # Ranks in a row share a node, as tensor-parallel groups expect. python is the task itself, with
  # no shell around it: Slurm sends signals to tasks alone.
  local step=(
    srun --nodes="$nodes" --ntasks="$world" --ntasks-per-node="$ranks_per_node" "${cpus[@]}"
    --distribution=block --kill-on-bad-exit=1 --output="$logs/rank-%4t.log" "${container[@]}"
    "$python" -u -m megatron_mimo.training "${flags[@]}"
  )
  only_show "${step[@]}" || return 0
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  # What the ranks' watchers know each other by; srun hands it to every task.
  [[ -n ${MIMO_FAILFAST_SECRET:-} ]] ||
    MIMO_FAILFAST_SECRET=$(od -An -v -tx1 -N32 /dev/urandom | tr -d ' \n')
  export MIMO_FAILFAST_SECRET
  before=$(saved_iteration)
  say "job $SLURM_JOB_ID, attempt ${SLURM_RESTART_COUNT:-0}: $world ranks on $SLURM_JOB_NODELIST," \
    "after iteration $before; logs in $logs"
  ((${SLURM_RESTART_COUNT:-0} == 0)) || name_earlier_failures
  signalled=0 told_to_end=0 pid=
  trap 'on_time_limit' USR1
  # Slurm tells the ranks itself; this shell stays to name what happened.
  trap 'told_to_end=1' TERM
  "${step[@]}" 2> >(tee "$logs/srun.log" >&2) &
  pid=$!
  # A signal ends `wait` early, and the step goes on.
  while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done
  # Bash remembers how it ended.
  code=0
  wait "$pid" || code=$?
  if ((code == 0 && told_to_end == 0)); then
    if ran_out_of_time; then requeue "$before"; fi
    say "done, after iteration $(saved_iteration)"
    return
  fi
  ((told_to_end == 0)) || say "Slurm told the job to end: cancelled, preempted, or a node failed"
  ((code == 0)) || name_failures "$logs" "$code"
  exit "$code"
}

on_time_limit() {
  signalled=1
  say "the time limit is near: telling all ranks to save and leave"
  # srun passes it on to every task.
  [[ -z $pid ]] || kill -USR1 "$pid"
}

(($# > 0)) || fail "launch.sh SCRIPT FLAGS...: the scripts beside it call it"
script=$1
shift
root=$(dirname "$scripts")
cd "$root"
read_place
read_first_weights
check_paths
check_tokenizer
make_folders
read_program
# Blanks and line ends separate them; the end of the text is what `read` takes for a failure.
read -r -d '' -a extra <<<"${MIMO_EXTRA_FLAGS:-}" || true
flags=(
  "$@"
  "${first_weights[@]}"
  --save "$checkpoints"
  --load "$checkpoints"
  --tensorboard-dir "$run/tensorboard"
  # Of a flag that stands twice the last one holds.
  "${extra[@]}"
)
check_flags
check_samples
check_roles
if [[ -n $local ]]; then train_here; else train_on_slurm; fi
