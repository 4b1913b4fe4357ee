"""`megatron-mimo plan --dry-run` against the same layout on real ranks, and what it refuses."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from megatron_mimo.cli import main
from megatron_mimo.config.flags import CommandLine, parse
from megatron_mimo.config.resolve import Resolved, resolve
from megatron_mimo.tools.plan.dry_run.command import step_roles
from megatron_mimo.tools.plan.dry_run.roles import distinct_roles
from tests.harness.pool import RunRanks
from tests.unit_tests.scripts.recipes import BATCH, LOCAL, read_recipe

if TYPE_CHECKING:
    from megatron_mimo.tools.plan.dry_run.result import Exchange, ModuleSize

# Two modules on grids of their own, stages, shards, packed sequences, 16-bit weights; no experts,
# whose loads the data of a real run decides.
WORLD = 5
ROWS, WIDTH, MICROBATCHES = 192, 128, 2
FLAGS = """
    --model-provider nemotron-moe-vlm-tiny --override language.pattern=M*|M* --bf16
    --llm-pp 2 --llm-tp 2 --seq-length 256 --global-batch-size 2 --training-stage stage3
    --dataset-provider energon --data-path /nowhere --packing-buffer-size 4
    --overlap-grad-reduce --ddp-num-buckets 3 --device cpu
""".split()


def resolved() -> Resolved:
    return resolve(parse(FLAGS, CommandLine, prog="test").train, WORLD)


def step_for_real() -> "tuple[tuple[ModuleSize, ...], tuple[Exchange, ...]]":
    """The step of a dry run, over gloo and with content."""
    import torch.distributed as dist
    from torch.utils._python_dispatch import TorchDispatchMode

    from megatron_mimo.runtime import Device
    from megatron_mimo.runtime.paper.traffic import Traffic
    from megatron_mimo.tools.plan.dry_run.rank import build, exchanges, read_tokenizer, sizes
    from megatron_mimo.tools.plan.dry_run.samples import full_step
    from megatron_mimo.training.step import train_step

    class Recorder(TorchDispatchMode):
        traffic = Traffic()

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func.namespace == "c10d":
                self.traffic.record(func._opname, args)
            return func(*args, **kwargs or {})

    run = resolved()
    tokenizer, data = read_tokenizer(run, None)
    loader = full_step(data, run.layout, dist.get_rank(), tokenizer)
    runner = build(run, tokenizer, tokenizer.vocab_size, Device("cpu"))
    recorder = Recorder()
    with recorder:
        train_step(runner, loader, 1, run.global_batch_size)
    return sizes(runner), exchanges(recorder.traffic)


def test_a_step_on_paper_holds_and_sends_what_a_real_one_does(run_ranks: RunRanks) -> None:
    roles = distinct_roles(resolved().layout)
    assert [role.name for role in roles] == ["encoder", "llm stage 0 of 2", "llm stage 1 of 2"]
    real = run_ranks(WORLD, step_for_real)
    received = {}
    for role, outcome in step_roles(roles, FLAGS, world_size=WORLD, vocab_size=None):
        assert outcome.fault is None, outcome.fault
        held, sent = real[role.rank]
        assert outcome.modules == held
        assert set(outcome.exchanges) == set(sent)
        assert len(outcome.exchanges) == len(sent)
        assert outcome.activations > 0 and outcome.microbatches == MICROBATCHES
        assert f"with {ROWS} rows" in outcome.samples
        for module in outcome.modules:
            # Two bytes of a weight, four of its gradient; padding is a small part of a bucket.
            assert 2 * module.parameters <= module.weights < 2.1 * module.parameters
            assert 4 * module.parameters <= module.gradients < 4.2 * module.parameters
            # One replica: two moments, and a copy in float32 of what is not float32 already.
            assert 11 * module.parameters < module.optimizer <= 12 * module.parameters
        received |= {
            (role.name, exchange.group): exchange.bytes
            for exchange in outcome.exchanges
            if exchange.operation == "receive"
        }
    # Rows cross once to each of both tensor-parallel ranks, that hold a half of the sequence each.
    first = received["llm stage 0 of 2", "bridge of encoder forward"]
    assert 0 < first < MICROBATCHES * ROWS * WIDTH * 2
    assert received["encoder", "bridge of encoder backward"] == MICROBATCHES * ROWS * WIDTH * 2
    # Hidden states of the shard of a stage.
    shard = 256 // 2 * WIDTH * 2
    assert received["llm stage 1 of 2", "llm stages 0 forward"] == MICROBATCHES * shard


# A family whose rows are wider than the language model by one.
BROKEN = """
from dataclasses import dataclass, replace

from examples.mimo import readings
from megatron_mimo.config.presets import register_provider
from megatron_mimo.modules.families import register


@dataclass(frozen=True, kw_only=True, slots=True)
class BrokenConfig(readings.ReadingsConfig):
    pass


class BrokenAdapter(readings.ReadingsAdapter):
    config_type = BrokenConfig

    def build(self, config, context):
        return super().build(config, replace(context, row_width=context.row_width + 1))


def broken():
    base = readings.mock_readings()
    return replace(base, modules=base.modules | {"readings": BrokenConfig()})


register(BrokenAdapter())
register_provider("wrong-width", broken)
"""


def test_a_wrong_shape_ends_with_the_name_of_its_role(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wrong_width.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path.cwd()}")
    flags = "--dry-run --nproc 2 --custom-import wrong_width --model-provider wrong-width"
    sizes = "--seq-length 96 --grid readings.offset=0 --llm-offset 1"
    assert main(["plan", *flags.split(), *sizes.split()]) == 1
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert line.startswith("error: encoder and readings (rank 0): readings send output 0: ")
    assert "rows of the readings: expected float32 [2, 128] by the manifest" in line
    assert line.endswith("but the module gave float32 [2, 129]")
    # The other role goes on.
    assert "llm (rank 1)" in out and "llm dp_cp" not in out and "activations at peak" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--dry-run", "--dry-run needs --nproc N: the number of ranks of the run"),
        ("--dry-run --nproc 0", "--nproc is 0: expected"),
        ("--dry-run --nproc 2 --vocab-size 0", "--vocab-size is 0: expected"),
        ("--dry-run --nproc 3 --llm-offset 2", "encoder grid [0, 1) and llm grid [2, 3) leave"),
        ("--dry-run --nproc 2 --show-schedule", "unknown flag --show-schedule"),
    ],
)
def test_wrong_usage_starts_no_process(
    argv: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *argv.split()]) == 2
    out, err = capsys.readouterr()
    assert message in err and len(err.splitlines()) == 1 and out == ""


@pytest.mark.slow
@pytest.mark.timeout(900)  # Millions of operations, beside whatever else the machine does.
@pytest.mark.parametrize("path", [*BATCH, *LOCAL], ids=lambda path: path.stem)
def test_every_script_passes(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = read_recipe(path, tmp_path)
    vocabulary = [] if path.stem == "local_cpu" else ["--vocab-size", "131072"]
    flags = [*recipe.flags, "--save", str(tmp_path / "run"), *vocabulary]
    code = main(["plan", "--dry-run", "--nproc", str(recipe.ranks), *flags])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    assert out.count("activations at peak") == 2
