"""`scripts/validate_gpu.sh`: which runs it makes, the table it writes, and itself on a host."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from megatron_mimo.cli import main
from megatron_mimo.config.flags import CommandLine, parse
from megatron_mimo.config.resolve import resolve
from tests.validation.page import BEGIN, END, Row, read_rows, table, update, with_rows, without_rows
from tests.validation.plan import REFERENCES, Check, checks
from tests.validation.run import describe_difference, flags_of, verdict_of

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs/gpu-validation.md"


def row(gpu: str, what: str, result: str = "PASS", difference: str = "loss 1.0e-06") -> Row:
    return Row(
        what=what,
        layout="2 ranks: encoder | llm",
        result=result,
        difference=difference,
        versions="torch 2.13.0",
        gpu=gpu,
    )


def validate(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "scripts/validate_gpu.sh"), *arguments],
        cwd="/",
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )


def test_rows_survive_the_page() -> None:
    rows = [row("8 x H100", "float32"), row("2 x A100", "bf16", "FAIL", "a | b\nand c")]
    page = with_rows(without_rows(PAGE.read_text()), rows)
    found = read_rows(page)
    assert found[0].layout == "2 ranks: encoder \\| llm"
    assert found[1].difference == "a \\| b and c"
    # Once more: what is written already is not changed.
    assert with_rows(page, found) == page
    before, _, rest = PAGE.read_text().partition(BEGIN)
    assert page.startswith(before) and page.endswith(rest.partition(END)[2])


def test_rows_of_the_same_gpus_are_replaced() -> None:
    page = without_rows(PAGE.read_text())
    assert read_rows(page) == []
    page = with_rows(page, [row("8 x H100", "float32"), row("8 x H100", "bf16")])
    page = with_rows(page, [row("2 x A100", "float32")])
    page = with_rows(page, [row("8 x H100", "float32", "FAIL")])
    assert [(one.gpu, one.what, one.result) for one in read_rows(page)] == [
        ("2 x A100", "float32", "PASS"),
        ("8 x H100", "float32", "FAIL"),
    ]


def test_a_page_without_a_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("# A page\n")
    with pytest.raises(ValueError, match="no lines '<!-- rows"):
        update(tmp_path / "page.md", [row("8 x H100", "float32")], PAGE)


def test_the_page_says_what_its_table_has() -> None:
    """No row is claimed that is not there, and an empty table is called empty."""
    text = PAGE.read_text()
    assert ("Nothing on this page has been measured on a GPU" in text) == (read_rows(text) == [])
    assert table([]) in text or read_rows(text)
    for check in [*checks("cuda", 8, 20)]:
        assert f"| {check.what} |" in text, check.what


@pytest.mark.parametrize(("norm", "verdict"), [(2.0, "PASS"), (2.5, "FAIL")])
def test_what_parity_finds_is_told(
    norm: float, verdict: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, last in (("a", 2.0), ("b", norm)):
        (tmp_path / name).mkdir()
        lines = [
            json.dumps({"iteration": step, "lm_loss": 4.0, "grad_norm": size})
            for step, size in ((1, 2.0), (2, last))
        ]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    found = tmp_path / "found.json"
    main(["parity", str(tmp_path / "a"), str(tmp_path / "b"), "--json", str(found)])
    capsys.readouterr()
    result = json.loads(found.read_text())
    size = abs(norm - 2.0) / 2.0
    assert verdict_of(result) == verdict
    assert describe_difference(result) == f"loss 0.0e+00, norm {size:.1e} over 2 steps"


@pytest.mark.parametrize(("gpus", "sizes"), [(1, {1}), (2, {1, 2}), (8, {1, 2, 8})])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_run_resolves_and_is_made_before_it_is_needed(
    gpus: int, sizes: set[int], device: str, tmp_path: Path
) -> None:
    made = set(REFERENCES)
    plan: list[Check] = list(checks(device, gpus, 20))  # type: ignore[arg-type]
    assert {check.run.ranks for check in plan} == sizes
    for run in REFERENCES.values():
        line = parse(flags_of(run, tmp_path, 20), CommandLine, prog="train")
        assert resolve(line.train, 1).layout.world_size == 1
    for check in plan:
        made.add(check.run.name)
        assert check.against in made and check.against != check.run.name
        assert (check.run.device == device) and check.tolerance.loss <= 0.05
        line = parse(flags_of(check.run, tmp_path, 20), CommandLine, prog="train")
        resolved = resolve(line.train, check.run.ranks)
        assert resolved.layout.world_size == check.run.ranks
    if gpus == 8:
        (largest,) = {check.run.flags for check in plan if check.run.name == "8-fp32"}
        assert all(f"--llm-{axis} 2" in largest for axis in ("tp", "pp", "dp"))


def test_on_a_host_a_resumed_run_must_be_the_same() -> None:
    bounds = {check.what: check.tolerance for check in checks("cpu", 2, 20)}
    assert bounds["resumed from its middle"].loss == bounds["resumed from its middle"].norm == 0
    assert (bounds["float32 against the host"].loss, bounds["float32 against the host"].norm) == (
        1e-5,
        1e-4,
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "torch sees no GPU on this machine"),
        (("--device", "cpu", "--gpus", "3"), "--gpus 3: expected one of 1, 2, 8"),
    ],
)
def test_what_cannot_be_validated_is_refused_with_a_line(
    arguments: tuple[str, ...], said: str
) -> None:
    import torch

    if not arguments and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = validate(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {said}")


def test_a_folder_of_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    done = validate("--device", "cpu", "--out", str(tmp_path))
    assert done.returncode == 2 and "holds other files" in done.stderr
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_checks_that_fail_are_rows(tmp_path: Path) -> None:
    """No command can end in a hundredth of a second: each is told of, and the table is written."""
    out, page = tmp_path / "out", tmp_path / "page.md"
    done = validate(
        *("--device", "cpu", "--gpus", "1", "--limit", "0.01", "--tests", "tests/nothing"),
        *("--out", str(out), "--page", str(page)),
    )
    assert done.returncode == 1, done.stderr
    rows = read_rows(page.read_text())
    assert {found.result for found in rows} == {"FAIL"}
    assert [found.what for found in rows][:2] == ["doctor", "tests of the host's part"]
    assert len(rows) == 2 + len(list(checks("cpu", 1, 20)))
    assert all("took longer than 0.01 s" in found.difference for found in rows[:2])
    assert "0 of 7 checks pass" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_script_on_a_host(tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = PAGE.read_text()
    done = validate(
        *("--device", "cpu", "--gpus", "1", "--iterations", "4", "--out", str(out)),
        *("--tests", "tests/unit_tests/runtime/test_gpus.py"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # A try on a host is no result.
    assert PAGE.read_text() == before
    rows = read_rows((out / "gpu-validation.md").read_text())
    assert {found.result for found in rows} == {"PASS"}
    assert {found.gpu for found in rows} == {"none (host)"}
    assert re.match(r"Python 3\.\d+\.\d+, torch \S+, megatron-core \S+", rows[0].versions)
    by_name = {(found.what, found.layout): found.difference for found in rows}
    apart = by_name["float32 against the host", "colocated on 1 rank"]
    assert re.fullmatch(r"loss [\d.]+e-\d\d, norm [\d.]+e-\d\d over 4 steps", apart)
    resumed = by_name["resumed from its middle", "colocated on 1 rank"]
    assert resumed == "loss 0.0e+00, norm 0.0e+00 over 2 steps"
