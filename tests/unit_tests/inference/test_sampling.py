"""Choice of a token against transformers' processors of logits, and bounds of the settings."""

import pytest
import torch

from megatron_mimo.inference.sampling import Sampling, choose


def drawn(logits: torch.Tensor, sampling: Sampling, times: int = 400) -> list[int]:
    random = torch.Generator().manual_seed(5)
    return [choose(logits, sampling, random) for _ in range(times)]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(0.7, None, 1.0), (1.0, 3, 1.0), (1.0, None, 0.6), (1.5, 5, 0.5), (0.3, 40, 0.01)],
)
def test_draws_are_those_of_transformers(
    temperature: float, top_k: int | None, top_p: float
) -> None:
    from transformers import (
        LogitsProcessorList,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = torch.randn(12, generator=torch.Generator().manual_seed(1)) * 2
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k is not None:
        warpers.append(TopKLogitsWarper(min(top_k, 12)))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    probabilities = warpers(torch.zeros(1, 1, dtype=torch.int64), logits[None])[0].softmax(-1)
    random = torch.Generator().manual_seed(5)
    wanted = [int(torch.multinomial(probabilities, 1, generator=random)) for _ in range(400)]
    found = drawn(logits, Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
    assert found == wanted


def test_temperature_zero_takes_the_likeliest_and_draws_nothing() -> None:
    logits = torch.tensor([0.1, 3.0, 2.9])
    random = torch.Generator().manual_seed(1)
    before = random.get_state()
    assert choose(logits, Sampling(temperature=0), random) == 1
    assert random.get_state().equal(before)


def test_bfloat16_logits_are_drawn_from_as_well() -> None:
    logits = torch.tensor([0.0, 20.0, 0.0]).bfloat16()
    assert set(drawn(logits, Sampling(temperature=1.0), 20)) == {1}


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -1), ("top_p", 0), ("top_p", 1.5), ("top_k", 0), ("max_new_tokens", 0)],
)
def test_what_is_out_of_bounds_is_refused(field: str, value: float) -> None:
    with pytest.raises(
        ValueError, match=field.replace("_", "."), check=lambda e: str(value) in str(e)
    ):
        Sampling(**{field: value})
