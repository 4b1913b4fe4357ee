"""Commands of the pages: every one is understood, and what is cheap is run as it is written."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import megatron_mimo.cli
from docs.reference.write_pages import COMMANDS
from megatron_mimo.cli import TrainCommandLine, main
from megatron_mimo.config.arguments import known_flags
from megatron_mimo.config.flags import parse
from megatron_mimo.config.resolve import resolve
from megatron_mimo.tools.plan.dry_run import command as dry_run
from tests.harness.slices import slow_but
from tests.unit_tests.docs.blocks import PAGES, ROOT, Command, blocks, commands

# Of `train`: what needs files or code that only the reader has.
_OF_THE_READER = {"--load-hf", "--custom-import"}
# Flags of other programs that the pages name.
_FOREIGN = {
    *("gpus", "ipc", "rm", "shm-size", "ulimit"),  # docker
    *("standalone", "master-port", "nproc-per-node"),  # torchrun
    *("container-image", "exclude", "kill-on-bad-exit", "nodes", "requeue", "signal"),  # Slurm
    *("label", "ntasks-per-node"),  # srun
    "model",  # lmms-eval
    *("local-dir", "repo-type"),  # hf
    "backend-store-uri",  # MLflow
    *("apply-layernorm-1p", "no-build-isolation", "pid"),  # Megatron-LM, pip, py-spy
}
_ONE_RANK = "examples/mimo/train_hetero.py"
_PROGRAMS = {"megatron-mimo", "torchrun"}
_QUICK = ("data", "own-model", "schedule")


def ids(page: Path) -> str:
    return str(page.relative_to(ROOT))


class UnderstoodError(Exception):
    """Raised where a command has read its flags, and would begin."""


def stop_after(module: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reading = getattr(module, name)

    def read(*args: object, **named: object) -> None:
        reading(*args, **named)
        raise UnderstoodError

    monkeypatch.setattr(module, name, read)


def check_training(words: tuple[str, ...]) -> None:
    """Read the flags of a run, and resolve those that need nothing of the reader's."""
    line = parse(words, TrainCommandLine, prog="megatron-mimo train")
    given = {word for word in words if word.startswith("--")}
    file = line.train.model.model_config
    if not given & _OF_THE_READER and (file is None or Path(file).exists()):
        resolve(line.train, line.nproc or 1)


def check(command: Command) -> None:
    words = command.words
    if "megatron-mimo" in words:
        words = words[words.index("megatron-mimo") :]  # srun starts it
    program, *rest = words
    for word in command.words:
        if word.startswith(("scripts/", "examples/")):
            assert (ROOT / word).exists(), word
    if _ONE_RANK in rest:
        parse(rest[rest.index(_ONE_RANK) + 1 :], TrainCommandLine, prog="train")
    elif program == "megatron-mimo" and rest[0] == "train":
        check_training(tuple(rest[1:]))
    elif program == "megatron-mimo":
        with pytest.raises(UnderstoodError):
            # A wrong flag would print a line and return.
            raise AssertionError(f"{command.words}: exit code {main(rest)}")
    elif program == "make":
        targets = {word for word in rest if word.islower()}
        assert targets <= set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_command_is_understood(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for name in ("parse", "parse_arguments"):
        stop_after(megatron_mimo.cli, name, monkeypatch)
    stop_after(dry_run, "parse", monkeypatch)
    for command in commands(page):
        try:
            check(command)
        except ValueError as error:
            raise AssertionError(f"{ids(page)}:{command.line}: {error}") from error


def test_no_command_hides_in_another_kind_of_block() -> None:
    """Else nobody would try it."""
    for page in PAGES:
        for block in blocks(page):
            if block.language != "bash":
                assert not re.search(r"^ *(megatron-mimo|torchrun) ", block.text, re.M), block


def test_flags_that_pages_name_exist() -> None:
    known = {"from", "help", "version", "traceback", *_FOREIGN}
    for into in COMMANDS.values():
        for name, flag in known_flags(into).items():
            known |= {name, f"no-{name}"} if flag.has_negative else {name}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if page.name == "megatron-flags.md":
            # The first column is another program's.
            text = "\n".join(line.split("|")[2] for line in text.splitlines() if line[:1] == "|")
        text = re.sub(r"^```bash\n.*?^```$", "", text, flags=re.M | re.S)
        for name, more in re.findall(r"(?<![\w-])--([a-z][a-z0-9-]*)(…|\.\.\.)?", text):
            exists = any(one.startswith(name) for one in known) if more else name in known
            assert exists, f"{ids(page)} names --{name}"


def test_what_pages_write_into_a_checkout_is_not_for_git() -> None:
    """And what is for git is not hidden by it."""
    written = ["data/talk/.nv-meta", "inspect.html", "talk.html", "runs/a/metrics.jsonl"]
    kept = ["megatron_mimo/data/config.py", "tests/unit_tests/data/x.py", "docs/images/x.png"]
    ignored = subprocess.run(
        ["git", "check-ignore", "--no-index", *written, *kept],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ignored.stdout.split() == written


# -- run as written --------------------------------------------------------------------------------


def write_files(page: Path) -> None:
    """Write the files that a page shows, into the current folder."""
    for block in blocks(page):
        if block.file is not None:
            Path(block.file).parent.mkdir(parents=True, exist_ok=True)
            Path(block.file).write_text(block.text)


def run_python(page: Path) -> None:
    """Run the blocks of Python on a page, which make the data of its examples."""
    for block in blocks(page):
        if block.language == "python":
            exec(compile(block.text, ids(page), "exec"), {"__name__": "__main__"})


def is_cheap(command: Command) -> bool:
    """Whether it takes less than a second and needs no run before it."""
    program, *rest = command.words
    return program == "megatron-mimo" and (
        (rest[0] == "plan" and "--dry-run" not in rest)
        or rest[:2] == ["data", "prepare"]
        or "--print-config" in rest
    )


# Counting the parameters of the large presets takes some seconds.
@pytest.mark.parametrize(
    "name", slow_but(["data", "language", "own-model", "schedule", "troubleshooting"], *_QUICK)
)
def test_cheap_commands_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = ROOT / f"docs/how-to/{name}.md"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    write_files(page)
    run_python(ROOT / "docs/how-to/data.md")
    # Of own-model.md, which shuffles the images of talk.jsonl; LLaVA's file is the reader's.
    Path("shuffled.jsonl").write_bytes(Path("talk.jsonl").read_bytes())
    cheap = [one for one in commands(page) if is_cheap(one) and "llava.json" not in one.words]
    assert cheap
    for command in cheap:
        assert main(command.words[1:]) == 0, (command, capsys.readouterr().err)


def script(page: Path, until: str) -> str:
    """The page up to a heading, as one script of bash."""
    last = page.read_text(encoding="utf-8").split(until)[0].count("\n") if until else 10**6
    parts = []
    for block in blocks(page):
        if block.line > last:
            break
        programs = re.findall(r"^(?:PYTHONPATH=\S+ )?([a-z][\w./-]*)", block.text, re.M)
        if block.file is not None:
            parts.append(f"cat > {block.file} <<'END'\n{block.text}END")
        elif block.language == "python":
            parts.append(f"python - <<'END'\n{block.text}END")
        elif block.language == "bash" and set(programs) <= _PROGRAMS:
            parts.append(block.text)
    return "\n".join(parts)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "until", "before"),
    [
        # In place of `make demo`, whose model README asks.
        ("README.md", "", "megatron-mimo demo --train-iters 20"),
        ("docs/how-to/data.md", "", ":"),
        ("docs/how-to/resume.md", "## With other data", ":"),
        (
            "docs/how-to/export.md",
            "## What is in the folder",
            "megatron-mimo demo --train-iters 20",
        ),
    ],
    ids=["README", "data", "resume", "export"],
)
def test_pages_run_from_top_to_bottom(name: str, until: str, before: str, tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    bin_folder = Path(sys.executable).parent
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f"{before}\n{script(ROOT / name, until)}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"PATH": f"{bin_folder}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
