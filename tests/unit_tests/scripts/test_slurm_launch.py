"""The launcher under a fake Slurm: what is checked, started, saved, requeued and named."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_mimo.data.samples.digits import DigitsConfig, write_digits_dataset
from tests.unit_tests.scripts.fake_slurm import install
from tests.unit_tests.scripts.recipes import SCRIPTS

REPOSITORY = SCRIPTS.parent

# Stands in for Python: it resolves nothing, and its ranks wait for a signal, on which rank 0
# "saves".
_STUB = """#!/bin/bash
case "$*" in
  *--print-config*) echo "exit-duration-in-mins: $STUB_MINUTES"; exit ;;
esac
while (($#)); do [[ $1 != --save ]] || save=$2; shift; done
tracker=$save/latest_checkpointed_iteration.txt
leave() {
  if [[ $SLURM_PROCID == 0 && -z $STUB_SAVES_NOTHING ]]; then
    echo $(($(cat "$tracker" 2>/dev/null || echo 0) + 7)) >"$tracker"
  fi
  exit 0
}
trap 'echo "got SIGUSR1"; leave' USR1
echo "iteration 1 of rank $SLURM_PROCID of $SLURM_NTASKS with $NCCL_PROTO"
if [[ $SLURM_RESTART_COUNT -ge 1 ]]; then leave; fi
if [[ $SLURM_PROCID == "$STUB_FAILS" ]]; then
  echo "rank $SLURM_PROCID (llm dp 0) on node1 failed first: KeyError: 'dog'"
  exit 1
fi
for _ in {1..200}; do sleep "${STUB_ENDS:-0.1}"; [[ -z $STUB_ENDS ]] || leave; done
"""

# A run of three ranks on a host: the scripts' own flags, then these.
_TINY = """
    --model-provider nemotron-moe-vlm-tiny --device cpu --no-moe-grouped-gemm
    --encoder-dp 1 --llm-offset 1 --llm-dp 1 --llm-ep 2
    --patch-dim 8 --class-token-len 2 --dynamic-resolution-max-patches 64
    --seq-length 256 --global-batch-size 2 --num-workers 1 --loader-processes 0
"""


class Cluster:
    """A folder with a fake Slurm, a data folder, and the variables that a user sets."""

    def __init__(self, folder: Path) -> None:
        self.state = folder / "slurm"
        self.run_dir = folder / "run"
        self.state.mkdir()
        install(folder / "bin")
        stub = folder / "python"
        stub.write_text(_STUB)
        stub.chmod(0o755)
        for name in ("data", "tokenizer"):
            (folder / name).mkdir()
        (folder / "tokenizer/tokenizer.json").write_text("{}")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("MIMO_", "SLURM_"))}
        self.env = kept | {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "FAKE_SLURM": str(self.state),
            "MIMO_RUN_DIR": str(self.run_dir),
            "MIMO_DATA_PATH": str(folder / "data"),
            "MIMO_TOKENIZER": str(folder / "tokenizer"),
            "MIMO_FIRST_WEIGHTS": "random",
            "MIMO_RANKS_PER_NODE": "1",
            "MIMO_PYTHON": str(stub),
            "STUB_MINUTES": "220",
        }

    def run(self, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the repository, with variables changed; "" unsets one."""
        merged = {name: value for name, value in (self.env | env).items() if value}
        return subprocess.run(
            command,
            env=merged,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )

    def sbatch(self, *options: str, **env: str) -> subprocess.CompletedProcess[str]:
        return self.run("sbatch", *options, "scripts/parity_3n.sbatch", **env)

    def knob(self, name: str, text: str) -> None:
        (self.state / name).write_text(text)

    def calls(self, command: str) -> list[str]:
        lines = (self.state / "calls").read_text().splitlines()
        return [line for line in lines if line.split()[0] == command]

    def log(self, rank: int, attempt: int = 0) -> str:
        return (self.run_dir / f"logs/4242.{attempt}/rank-{rank:04d}.log").read_text()


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def real_python(**env: str) -> dict[str, str]:
    return {"MIMO_PYTHON": sys.executable} | env


def test_each_rank_is_a_task_with_a_log_of_its_own(cluster: Cluster) -> None:
    done = cluster.sbatch(STUB_ENDS="0.1")
    assert done.returncode == 0, done.stderr
    assert [cluster.log(rank).strip() for rank in range(3)] == [
        f"iteration 1 of rank {rank} of 3 with simple" for rank in range(3)
    ]
    (step,) = cluster.calls("srun")
    for option in ("--nodes=3", "--ntasks=3", "--ntasks-per-node=1", "--kill-on-bad-exit=1"):
        assert option in step.split()
    assert "--cpus-per-task=8" in step and "--distribution=block" in step
    assert not cluster.calls("scontrol")
    assert "done, after iteration 7" in done.stdout


def test_the_time_limit_saves_requeues_and_goes_on(cluster: Cluster) -> None:
    cluster.knob("limit", "iteration 1")
    done = cluster.sbatch()
    assert done.returncode == 0, done.stderr
    assert all("got SIGUSR1" in cluster.log(rank) for rank in range(3))
    assert cluster.calls("scontrol") == ["scontrol requeue 4242"]
    assert "saved iteration 7 (began after 0); requeueing job 4242" in done.stdout
    assert "attempt 1: 3 ranks on node[1-3], after iteration 7" in done.stdout
    assert "done, after iteration 14" in done.stdout
    # A restarted job says how its earlier attempt ended.
    assert "earlier attempt: 2026-01-01T00:00:00|2026-01-01T04:00:00|NODE_FAIL|1:0|node2" in (
        done.stdout
    )


def test_the_programs_own_time_limit_requeues_too(cluster: Cluster) -> None:
    done = cluster.sbatch(STUB_ENDS="1.5", STUB_MINUTES="0.001")
    assert cluster.calls("scontrol")[0] == "scontrol requeue 4242", done.stdout


def test_a_job_that_saves_nothing_is_not_requeued(cluster: Cluster) -> None:
    cluster.knob("limit", "iteration 1")
    done = cluster.sbatch(STUB_SAVES_NOTHING="1")
    assert done.returncode == 1
    assert not cluster.calls("scontrol")
    assert "not requeued: no checkpoint was saved after iteration 0" in done.stdout


@pytest.mark.parametrize("text", ["HOME[$(touch {ran})]", "iter_0000007", ""])
def test_the_text_of_a_tracker_is_never_run(cluster: Cluster, text: str, tmp_path: Path) -> None:
    tracker = cluster.run_dir / "checkpoints/latest_checkpointed_iteration.txt"
    tracker.parent.mkdir(parents=True)
    tracker.write_text(text.format(ran=tmp_path / "ran"))
    done = cluster.sbatch(STUB_ENDS="0.1")
    assert done.returncode == 2
    assert f"error: {tracker} holds '{tracker.read_text()[:40]}': expected the number" in (
        done.stderr
    )
    assert not (tmp_path / "ran").exists()
    assert not [call for call in cluster.calls("srun") if "--kill-on-bad-exit=1" in call]


@pytest.mark.parametrize("text", ["0000008", "release"])
def test_trackers_of_others_are_read(cluster: Cluster, text: str) -> None:
    tracker = cluster.run_dir / "checkpoints/latest_checkpointed_iteration.txt"
    tracker.parent.mkdir(parents=True)
    tracker.write_text(text)
    done = cluster.sbatch(STUB_ENDS="0.1", STUB_SAVES_NOTHING="1")
    assert done.returncode == 0, done.stderr
    assert f"after iteration {8 if text.isdecimal() else 0}; logs in" in done.stdout


def test_a_refused_requeue_says_what_to_do(cluster: Cluster) -> None:
    cluster.knob("limit", "iteration 1")
    cluster.knob("refuse_requeue", "yes")
    done = cluster.sbatch()
    assert done.returncode == 1
    assert "submit mimo-parity-3n again to go on from iteration 7" in done.stdout


def test_a_cancelled_job_stays_cancelled(cluster: Cluster) -> None:
    cluster.knob("cancel", "iteration 1")
    done = cluster.sbatch()
    assert done.returncode == 128 + 15
    assert "Slurm told the job to end: cancelled, preempted, or a node failed" in done.stdout
    assert not [call for call in cluster.calls("scontrol") if "requeue" in call]
    # The shell outlived the signal, to say what happened.
    assert "launch: the step failed with exit code 143" in done.stderr


def test_a_node_failure_is_named(cluster: Cluster) -> None:
    cluster.knob("lose", "1 iteration 1")
    done = cluster.sbatch()
    assert done.returncode == 128 + 9
    assert "launch: failed nodes: node2\n" in done.stderr
    assert "node   node2 DOWN*+NOT_RESPONDING Not responding [slurm@" in done.stderr
    assert "srun: error: Node failure on node2" in done.stderr
    assert "sacct  4242.0|FAILED|1:0|node[1-3]" in done.stderr
    failure = (cluster.run_dir / "logs/4242.0/failure.txt").read_text()
    assert "failed nodes: node2\n" in failure
    assert not [call for call in cluster.calls("scontrol") if "requeue" in call]


@pytest.mark.parametrize("unaware", ["srun", "scontrol"])
def test_one_witness_of_a_node_failure_is_enough(cluster: Cluster, unaware: str) -> None:
    cluster.knob("lose", "1 iteration 1")
    cluster.knob("unaware", unaware)
    done = cluster.sbatch()
    assert "launch: failed nodes: node2\n" in done.stderr


def test_a_failed_rank_is_named_and_no_node_blamed(cluster: Cluster) -> None:
    done = cluster.sbatch(STUB_FAILS="2")
    assert done.returncode not in (0, 2)
    assert (
        "first rank to fail: rank 2 (llm dp 0) on node1 failed first: KeyError: 'dog'"
    ) in done.stderr
    assert "failed nodes: none that Slurm knows of" in done.stderr
    assert "srun: error: node3: task 2: Exited with exit code 1" in done.stderr


def test_another_number_of_nodes_is_refused_before_any_rank_starts(cluster: Cluster) -> None:
    env = real_python(MIMO_RANKS_PER_NODE="8")
    done = cluster.sbatch("--nodes=4", **env)
    assert done.returncode == 2
    assert "encoder grid [0, 8) and llm grid [8, 24) leave ranks [24, 32) unused" in done.stderr
    assert "mimo-parity-3n cannot run on 4 nodes x 8 ranks = 32 ranks" in done.stderr
    assert len(cluster.calls("sbatch")) == 1
    with pytest.raises(IndexError):
        cluster.calls("srun")[0]


def test_a_container_gets_its_image_and_the_paths_of_the_run(cluster: Cluster) -> None:
    done = cluster.sbatch(
        MIMO_CONTAINER="registry#mimo:1", MIMO_CONTAINER_MOUNTS="/scratch:/scratch", STUB_ENDS="0.1"
    )
    assert done.returncode == 0, done.stderr
    check, step = cluster.calls("srun")
    for call in (check, step):
        assert "'--container-image=registry#mimo:1'" in call
        assert f"--container-workdir={REPOSITORY}" in call
        (mounts,) = [w for w in call.split() if w.startswith("--container-mounts=")]
        data = cluster.env["MIMO_DATA_PATH"]
        for path in (REPOSITORY, cluster.run_dir, data, "/scratch"):
            assert f"{path}:{path}" in mounts
    # The layout is checked inside, where the program is: one task.
    assert "--ntasks=1" in check.split() and "--print-config" in check


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"MIMO_DATA_PATH": ""}, "MIMO_DATA_PATH: is not set: the Energon dataset"),
        ({"MIMO_TOKENIZER": ""}, "MIMO_TOKENIZER: is not set: the folder of the tokenizer"),
        ({"MIMO_FIRST_WEIGHTS": ""}, "MIMO_FIRST_WEIGHTS: is not set: nemotron:DIR"),
        ({"MIMO_FIRST_WEIGHTS": "vision:/a"}, "MIMO_FIRST_WEIGHTS names /a, which does not exist"),
        ({"MIMO_FIRST_WEIGHTS": "hf:/tmp"}, "expected nemotron:DIR"),
        ({"MIMO_DATA_PATH": "/no/data"}, "MIMO_DATA_PATH names /no/data, which does not exist"),
        ({"MIMO_DATA_PATH": "scripts"}, "MIMO_DATA_PATH names scripts: expected an absolute path"),
        ({"MIMO_RANKS_PER_NODE": "many"}, "is 'many': expected a whole number"),
        ({"MIMO_PYTHON": "/no/python"}, "there is no /no/python: 'make install'"),
        ({"SLURM_SUBMIT_DIR": "/tmp"}, "no scripts/launch.sh in /tmp"),
    ],
)
def test_what_is_missing_is_named(cluster: Cluster, env: dict[str, str], message: str) -> None:
    done = cluster.sbatch(**env)
    assert done.returncode != 0
    assert message in done.stderr


@pytest.mark.parametrize(
    ("given", "flags"),
    [
        ("random", "--moe-router-force-load-balancing --save"),
        ("vision:{data}", "--load-vision-from {data} --moe-router-force-load-balancing --save"),
        ("nemotron:{data}", "--load-nemotron-checkpoint {data} --save"),
    ],
)
def test_first_weights_become_flags(cluster: Cluster, given: str, flags: str) -> None:
    data = cluster.env["MIMO_DATA_PATH"]
    done = cluster.sbatch(MIMO_FIRST_WEIGHTS=given.format(data=data), STUB_ENDS="0.1")
    assert done.returncode == 0, done.stderr
    (step,) = cluster.calls("srun")
    assert f"--device cuda {flags.format(data=data)}" in step


def test_a_folder_without_a_tokenizer_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    env = real_python(MIMO_DRY_RUN="1", MIMO_TOKENIZER=str(tmp_path / "empty"))
    done = cluster.run("bash", "scripts/parity_3n.sbatch", **env)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"names {tmp_path / 'empty'}, which holds no tokenizer: expected" in done.stderr


@pytest.mark.parametrize(("train", "enough"), [(7, False), (9, True)])
def test_a_dataset_with_fewer_samples_than_lanes_is_refused(
    cluster: Cluster, train: int, enough: bool
) -> None:
    """Of eight lanes; shards of both splits count, since only the run knows which is which."""
    meta = Path(cluster.env["MIMO_DATA_PATH"]) / ".nv-meta"
    meta.mkdir()
    shards = {"train/000000.tar": train - 2, "train/000001.tar": 2}
    text = json.dumps({"energon_version": "7.4.1", "shard_counts": shards}, indent=2)
    (meta / ".info.json").write_text(text)
    env = real_python(MIMO_DRY_RUN="1", MIMO_RANKS_PER_NODE="8")
    done = cluster.run("bash", "scripts/parity_3n.sbatch", **env)
    assert (done.returncode == 0) is enough, done.stderr
    named = "which has 7 samples, and the run has 8 lanes (--llm-dp): expected" in done.stderr
    assert named is not enough


def test_a_dry_run_needs_no_cluster(cluster: Cluster) -> None:
    env = real_python(MIMO_DRY_RUN="1", MIMO_RANKS_PER_NODE="8")
    done = cluster.run("bash", "scripts/production_100n.sbatch", **env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("srun --nodes=100 --ntasks=800 ")
    assert done.stdout.count("srun ") == 1
    assert "-m megatron_mimo.training --encoder-offset 0" in done.stdout
    assert not (cluster.state / "calls").exists()


@pytest.mark.parametrize("code", [0, 1])
def test_a_full_dry_run_tries_the_roles_first(cluster: Cluster, code: int) -> None:
    plan = f'[[ $* != *" plan "* ]] || {{ echo "tried $*"; exit {code}; }}'
    Path(cluster.env["MIMO_PYTHON"]).write_text(f"#!/bin/bash\n{plan}\n")
    env = {"MIMO_DRY_RUN": "full", "MIMO_RANKS_PER_NODE": "8"}
    done = cluster.run("bash", "scripts/parity_3n.sbatch", **env)
    tried, *rest = done.stdout.splitlines()
    assert tried.startswith("tried -m megatron_mimo.cli plan --dry-run --nproc 24 --encoder-offset")
    assert f"--save {cluster.run_dir}/checkpoints" in tried
    assert done.returncode == code
    assert [line.split()[0] for line in rest] == ([] if code else ["srun"])


def test_outside_slurm_a_batch_script_says_how_to_start_it(cluster: Cluster) -> None:
    done = cluster.run("bash", "scripts/parity_3n.sbatch")
    assert done.returncode == 2
    assert "is not in a Slurm job: submit it with sbatch" in done.stderr


def test_local_scripts_start_processes_of_this_machine(cluster: Cluster) -> None:
    env = real_python(MIMO_DRY_RUN="1", SLURM_JOB_ID="1", SLURM_JOB_NUM_NODES="2")
    done = cluster.run("scripts/local_8gpu.sh", **env)
    assert done.returncode == 0, done.stderr
    assert "-m megatron_mimo.cli train --nproc 8 --encoder-offset 0" in done.stdout


def test_bad_flags_for_a_container_are_found_without_it(cluster: Cluster) -> None:
    env = {"MIMO_DRY_RUN": "1", "MIMO_CONTAINER": "mimo.sqsh", "MIMO_RANKS_PER_NODE": "4"}
    done = cluster.run("bash", "scripts/parity_3n.sbatch", **env)
    assert done.returncode == 2
    assert "only 12 were started" in done.stderr


@pytest.fixture
def real_data(cluster: Cluster) -> Callable[[], None]:
    def write() -> None:
        digits = DigitsConfig(num_train=64, num_val=16, val_fraction=16 / 1797, seed=5)
        shutil.rmtree(cluster.env["MIMO_DATA_PATH"])
        write_digits_dataset(cluster.env["MIMO_DATA_PATH"], digits)
        _write_tokenizer(Path(cluster.env["MIMO_TOKENIZER"]))

    return write


def _write_tokenizer(folder: Path) -> None:
    """Letters, and the tokens that the scripts' prompt format and image tags need."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<image>", "<img>", "</img>", "<|im_start|>", "<|im_end|>", "</s>"]
    letters = [chr(code) for code in range(32, 127)] + ["\n", "[UNK]"]
    words = {word: i for i, word in enumerate([*special, *letters])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        unk_token="[UNK]",
        additional_special_tokens=special,
    ).save_pretrained(folder)


@pytest.mark.slow
def test_the_real_program_saves_at_the_time_limit_and_goes_on(
    cluster: Cluster, real_data: Callable[[], None]
) -> None:
    real_data()
    cluster.knob("limit", r"iteration +2/ +12")
    env = real_python(MIMO_EXTRA_FLAGS=f"{_TINY} --train-samples 24", OMP_NUM_THREADS="1")
    done = cluster.sbatch(**env, GLOO_SOCKET_IFNAME="lo")
    assert done.returncode == 0, done.stdout + done.stderr
    assert cluster.calls("scontrol") == ["scontrol requeue 4242"]
    first, second = cluster.log(rank=1), cluster.log(rank=1, attempt=1)
    assert "after receiving SIGUSR1" in first
    assert "iteration        2/      12 | consumed samples:            4 |" in first
    assert "iteration       12/      12" not in first
    assert "iteration       12/      12 | consumed samples:           24 |" in second
    assert "iteration        2/      12" not in second
    assert (cluster.run_dir / "checkpoints/latest_checkpointed_iteration.txt").read_text() == "12"
    assert (cluster.run_dir / "tensorboard/metrics.jsonl").exists()
