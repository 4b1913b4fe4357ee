"""Runs with adapters: stopped and continued, asked, and exported merged or for peft."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.integration import test_export as export
from tests.integration import test_resume as resume
from tests.integration.asked import write_folder
from tests.integration.test_lora_layouts import HYBRID

LORA: dict[str, Any] = {
    "rank": 3,
    "alpha": 5.0,
    "targets": {"language": HYBRID, "vision": frozenset({"linear_qkv", "linear_fc2"})},
}
LAYOUTS = ("llm ep 2 tp 2", "encoder pp 2, llm cp 2", "colocated", "llm pp 2 ep 2")
ELSEWHERE = ("one rank", "llm pp 2 ep 2")


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_training_goes_on_bit_for_bit_and_elsewhere_along_the_same_curve(
    name: str, run_ranks: Callable[..., list], tmp_path: Path
) -> None:
    chosen, root, engine = resume.LAYOUTS[name], str(tmp_path), {"lora": LORA}
    run = partial(run_ranks, timeout=120)
    before = run(chosen.world_size, resume.straight, chosen, {}, engine, root, {})
    after = run(chosen.world_size, resume.resumed, chosen, {}, engine, root, {})
    resume.assert_exact(before, after)
    for other in ELSEWHERE:
        there = resume.LAYOUTS[other]
        found = run(there.world_size, resume.resumed, there, {}, engine, root, {})
        resume.assert_same_curve(before, found)
    one, message = resume.ONE_RANK, "refused"
    for changed, message in (
        ({"lora": LORA | {"alpha": 6.0}}, "adapters with alpha 5.0, this run with 6.0"),
        ({"lora": LORA | {"rank": 4}}, "adapters with rank 3, this run with 4"),
        ({"lora": None}, "is a checkpoint of adapters: give --lora-rank 3"),
        # Other weights beside the adapters.
        (engine | {"init": "megatron"}, "has adapters of other weights"),
    ):
        assert message in run(1, refused, one, changed, root)[0]


def refused(chosen: Any, engine: dict[str, Any], root: str) -> str:
    """Why a checkpoint is not loaded."""
    try:
        resume.resumed(chosen, {}, engine, root, {})
    except ValueError as error:
        assert "\n" not in str(error)
        return str(error)
    return "loaded"


def test_a_checkpoint_without_adapters_is_what_they_are_beside(
    run_ranks: Callable[..., list], tmp_path: Path
) -> None:
    base, run, folder = (str(tmp_path / name) for name in ("base", "run", "hf"))
    tiny = [*export.TINY, "--override", "language.pattern=M*-"]
    run_ranks(1, export.trained, tiny, base)
    adapted = [*tiny, "--init", "megatron", "--load-base", base, "--lora-rank", "4"]
    adapted += ["--lora-alpha", "64", "--freeze-projection", "--freeze-vit"]
    run_ranks(2, export.trained, adapted, run)
    ((theirs, ours, again),) = run_ranks(1, export.exported, run, folder, timeout=120)
    export.require_equal(theirs, ours)
    export.require_equal(theirs, again)
    # In place of its base it is refused, and the other way round.
    wrong = [*tiny, "--init", "megatron", "--load-base", run, "--lora-rank", "4"]
    (message,) = run_ranks(1, refused_start, wrong, str(tmp_path / "a"))
    assert "is a checkpoint of adapters" in message
    wrong = [*adapted, "--load", base]
    (message,) = run_ranks(1, refused_start, wrong, str(tmp_path / "b"))
    assert "is a checkpoint of a run without adapters: name it with --load-base" in message


def refused_start(flags: list[str], folder: str) -> str:
    """Why a run does not begin."""
    try:
        export.trained(flags, folder)
    except ValueError as error:
        assert "\n" not in str(error)
        return str(error)
    return "trained"


@pytest.mark.slow
def test_peft_answers_from_a_run_of_a_folder_as_the_run_does(
    run_ranks: Callable[..., list], tmp_path: Path
) -> None:
    base, run, out = (tmp_path / name for name in ("base", "run", "out"))
    run_ranks(1, write_folder, base, "M*-E")
    flags = [*export.TINY, "--model-provider", "hf", "--load-hf", str(base)]
    flags += ["--tokenizer-model", str(base), "--lora-rank", "4", "--lora-alpha", "64"]
    flags.append("--freeze-video")  # A folder of adapters has no part that trains whole.
    for part in ("vision", "projector", "language"):
        flags += ["--lora-targets", part]
    run_ranks(2, export.trained, flags, str(run), timeout=120)
    ((theirs, ours),) = run_ranks(1, as_peft, str(run), str(base), str(out), timeout=120)
    export.require_equal(theirs, ours)
    # It is where another run can begin: without learning it stays where it was.
    more = [*flags, "--load-lora", str(out), "--lr", "0", "--weight-decay", "0"]
    run_ranks(2, export.trained, more, str(tmp_path / "more"), timeout=120)
    assert run_ranks(1, same_adapters, str(tmp_path / "more"), str(out), str(tmp_path / "again"))[0]
    fewer = [*flags[:-2], "--load-lora", str(out)]
    (message,) = run_ranks(1, refused_start, fewer, str(tmp_path / "c"))
    assert "has an adapter of language_model.model.layers.0.mixer.in_proj" in message


def as_peft(run: str, base: str, out: str) -> tuple[Any, Any]:
    """What peft makes of the adapters of a run, and what we make of the run."""
    merged = f"{out}-merged"
    assert export.convert(run, out, "--peft") == (0, "")
    assert export.convert(run, merged) == (0, "")
    # The exported folder has a processor; its weights are not read.
    return export.of_transformers(merged, (base, out)), export.of_ours(run)


def same_adapters(run: str, wanted: str, out: str) -> bool:
    """Whether a run has the adapters of a folder, bit for bit."""
    from safetensors.torch import load_file

    assert export.convert(run, out, "--peft") == (0, "")
    found, expected = (load_file(f"{path}/adapter_model.safetensors") for path in (out, wanted))
    assert found.keys() == expected.keys()
    return all(tensor.equal(expected[name]) for name, tensor in found.items())
