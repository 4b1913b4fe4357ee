# Names what ended a Slurm step, for launch.sh: which rank, which node, and who says so.
# shellcheck shell=bash

# States of a node that has failed, or that Slurm has taken out; "*" stands for not responding.
readonly _BAD_STATES='DOWN|FAIL|DRAIN|ERROR|NOT_RESPONDING|UNKNOWN|[*]'

# Nodes of the job that Slurm holds for failed: "NAME STATE REASON" in each line.
_bad_nodes() {
  local line node state reason
  # One node after the other, as Slurm prints them with --oneliner.
  scontrol --oneliner show node "${SLURM_JOB_NODELIST:-}" 2>/dev/null | while IFS= read -r line; do
    node=$(sed -nE 's/.*NodeName=([^ ]+).*/\1/p' <<<"$line")
    state=$(sed -nE 's/.* State=([^ ]+).*/\1/p' <<<"$line")
    reason=$(sed -nE 's/.* Reason=(.*)/\1/p' <<<"$line")
    [[ ! $state =~ $_BAD_STATES ]] || printf '%s %s %s\n' "$node" "$state" "$reason"
  done
}

# name_failures LOGS CODE: LOGS holds srun.log and rank-*.log of the step, which ended with CODE.
name_failures() {
  local logs=$1 code=$2 bad nodes first
  # What srun and the ranks wrote may still be on its way to a shared disk.
  sleep 2
  bad=$(_bad_nodes) || true
  nodes=$({
    awk 'NF { print $1 }' <<<"$bad"
    sed -nE 's/^srun: error: Node failure on ([^ ]+).*/\1/p' "$logs/srun.log"
  } | sort -u | paste -sd ' ' -)
  first=$(grep -hE '^rank [0-9]+ \(.*\) on .* failed first' "$logs"/rank-*.log 2>/dev/null |
    sort -u | head -n 1) || true
  {
    printf 'launch: the step failed with exit code %s\n' "$code"
    printf 'launch: failed nodes: %s\n' "${nodes:-none that Slurm knows of}"
    printf 'launch: first rank to fail: %s\n' "${first:-not known, see $logs/rank-*.log}"
    [[ -z $bad ]] || printf '  node   %s\n' "${bad//$'\n'/$'\n  node   '}"
    grep -hE '^srun: (error|Job step)' "$logs/srun.log" | sort -u | head -n 20 | sed 's/^/  /'
    sacct --jobs="${SLURM_JOB_ID:-}" --noheader --parsable2 \
      --format=JobIDRaw,State,ExitCode,NodeList 2>/dev/null | sed 's/^/  sacct  /'
  } | tee "$logs/failure.txt" >&2 || true
}

# How the earlier attempts of this job ended; with their failed nodes, where Slurm keeps them.
name_earlier_failures() {
  local fields=Start,End,State,ExitCode ended
  ended=$(sacct --jobs="$SLURM_JOB_ID" --duplicates --allocations --noheader --parsable2 \
    --format="$fields,FailedNode" 2>/dev/null) ||
    ended=$(sacct --jobs="$SLURM_JOB_ID" --duplicates --allocations --noheader --parsable2 \
      --format="$fields" 2>/dev/null) || return 0
  printf 'launch: earlier attempt: %s\n' "${ended//$'\n'/$'\nlaunch: earlier attempt: '}"
}
