"""Greedy answers of a language model that counts: after token t it writes t + 1."""

from collections.abc import Callable

import pytest

SEQ_LENGTH = 16
EOS, PAD, VOCAB = 20, 0, 24


def count_up(prompts: list[tuple[int, int]], max_new_tokens: int) -> list[tuple[int, ...]]:
    """Answers to prompts given as (their last token, its position)."""
    from types import SimpleNamespace

    import torch
    import torch.distributed as dist

    from megatron_mimo.data.loader.batch import Microbatch, TextBatch
    from megatron_mimo.model.generate import GreedyStep
    from megatron_mimo.model.inputs import InputReader
    from megatron_mimo.modules.gpt.config import GptConfig
    from megatron_mimo.topology import ModuleGridSpec, SequenceSharding

    spec = ModuleGridSpec(name="llm")

    class Counter:
        config = GptConfig()
        groups = SimpleNamespace(
            pg_collection=SimpleNamespace(tp=dist.group.WORLD),
            spec=spec,
            place=spec.coordinates(0),
            is_first_stage=True,
            is_last_stage=True,
        )

        def __call__(self, tokens, position_ids, hidden, rows, positions):
            assert hidden is None
            assert tokens.shape == (len(prompts), SEQ_LENGTH)
            return torch.nn.functional.one_hot((tokens + 1).clamp(max=VOCAB - 1), VOCAB).float()

    # The right answer stands in the input, as in training; it must be blanked out.
    input_ids = torch.full((len(prompts), SEQ_LENGTH), 5)
    mask = torch.zeros(len(prompts), SEQ_LENGTH)
    for i, (token, position) in enumerate(prompts):
        input_ids[i, position] = token
        mask[i, position:] = 1
    text = TextBatch(
        sample_keys=tuple(str(i) for i in range(len(prompts))),
        input_ids=input_ids,
        labels=input_ids,
        loss_mask=mask,
        position_ids=torch.arange(SEQ_LENGTH).expand(len(prompts), -1),
        padding=torch.zeros_like(mask, dtype=torch.bool),
    )
    model = SimpleNamespace(
        target=Counter(),
        target_name="llm",
        modules={},
        device=torch.device("cpu"),
        sharding=SequenceSharding(seq_length=SEQ_LENGTH),
    )
    step = GreedyStep(
        model,
        [Microbatch(index=0, manifest=(), keys={}, text=text, inputs={})],
        InputReader(model, {"encoder": VOCAB - 1}),
        pad_id=PAD,
        eos_id=EOS,
        max_new_tokens=max_new_tokens,
    )
    step.forward("llm", 0, {})
    return [answer.generated for answer in step.answers]


def test_a_long_prompt_does_not_cut_its_neighbours_short(run_ranks: Callable[..., list]) -> None:
    (found,) = run_ranks(1, count_up, [(18, SEQ_LENGTH - 2), (10, 1)], 12)
    assert found == [(19, EOS), tuple(range(11, EOS + 1))]


def test_the_last_position_predicts_one_more_token(run_ranks: Callable[..., list]) -> None:
    (found,) = run_ranks(1, count_up, [(EOS - 1, SEQ_LENGTH - 1)], 4)
    assert found == [(EOS,)]


def test_the_limit_holds_without_an_end(run_ranks: Callable[..., list]) -> None:
    (found,) = run_ranks(1, count_up, [(1, 0), (10, SEQ_LENGTH - 1)], 3)
    assert found == [(2, 3, 4), (11,)]


def refusal(axis: str) -> str:
    """What asking for answers on a layout says."""
    from megatron_mimo.model.generate import _require_whole_sequences
    from megatron_mimo.topology import ModuleGridSpec

    try:
        _require_whole_sequences(ModuleGridSpec(name="llm", **{axis: 2}))
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("axis", ["pp", "cp"])
def test_layouts_that_cannot_write_are_refused(axis: str, run_ranks: Callable[..., list]) -> None:
    (said,) = run_ranks(1, refusal, axis)
    assert said.startswith(f"--llm-{axis} 2: answers are written with --llm-{axis} 1 only")
