"""Logits and gradients of the hybrid model against transformers' NemotronH."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit_tests.modules.hybrid.peer import random_tokens, write_nemotron
from tests.unit_tests.modules.radio.peer import difference

PATTERNS: dict[str, dict[str, Any]] = {
    "M": {},
    "*": {},
    "-": {},
    "E": {},
    "ME*-": {},
    "MEM*EM-E*": {"tie_word_embeddings": True},
    "M*M-": {"n_groups": 1, "num_key_value_heads": 4, "layer_norm_epsilon": 1e-3},
    "MM": {"time_step_min": 0.05},
    "EE": {"num_experts_per_tok": 1, "norm_topk_prob": False},
}


def compare(folder: Path, pattern: str, fields: dict[str, Any], length: int) -> dict[str, float]:
    """Relative differences of logits and of every gradient."""
    import torch

    from megatron_mimo.modules.hybrid import HybridLM
    from megatron_mimo.modules.hybrid.weights import name_table
    from megatron_mimo.weights.names import table_name

    theirs = write_nemotron(folder, pattern, **fields)
    ours = HybridLM.from_pretrained(folder, device="cpu")
    tokens = random_tokens(2, length)
    wanted, found = theirs(tokens, use_cache=False).logits, ours.logits(tokens)
    differences = {"logits": difference(found, wanted)}
    pull = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(3))
    (wanted * pull).sum().backward()
    (found * pull).sum().backward()
    gradients = published_gradients(theirs)
    entries = {entry.ours: entry for entry in name_table(ours.config)}
    for name, parameter in ours.model.named_parameters():
        entry = entries[table_name(ours.model, name, first_expert=0)]
        whole = entry.join([gradients[part] for part in entry.theirs])
        mine = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if whole.abs().max() or mine.abs().max():
            differences[name] = difference(mine, whole)
    return differences


def published_gradients(model: Any) -> dict[str, Any]:
    """Gradients by the names that a folder has, experts apart."""
    gradients = {}
    for name, parameter in model.named_parameters():
        name = name.replace("model.", "backbone.", 1)
        if ".experts." not in name:
            gradients[name] = parameter.grad
            continue
        start, _, kind = name.rpartition(".")
        for expert, gradient in enumerate(parameter.grad):
            gradients[f"{start}.{expert}.{kind}.weight"] = gradient
    return gradients


@pytest.mark.parametrize("length", [1, 37, 150])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_logits_and_gradients(
    run_ranks: Callable[..., list], tmp_path: Path, pattern: str, length: int
) -> None:
    (found,) = run_ranks(1, compare, tmp_path, pattern, PATTERNS[pattern], length)
    assert found["logits"] < 1e-5
    assert max(found.values()) < 1e-4, found


SCRIPT = """
import sys, torch
from megatron_mimo.modules.hybrid import HybridLM
torch.manual_seed(7)
state = torch.get_rng_state()
model = HybridLM.from_pretrained(sys.argv[1], device="cpu")
assert torch.get_rng_state().equal(state), "the random stream moved"
assert not torch.distributed.is_initialized()
logits = model.train().logits(torch.arange(12).view(2, 6))
logits.sum().backward()
model.save_pretrained(sys.argv[2])
print(list(logits.shape), all(p.grad is not None for p in model.parameters()))
"""


def test_without_a_launcher(tmp_path: Path) -> None:
    # As many experts as each token takes: every parameter has a gradient.
    write_nemotron(tmp_path / "in", "ME*-", n_routed_experts=3)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path / "in", tmp_path / "out"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[2, 6, 64] True"
    assert (tmp_path / "out" / "model.safetensors").exists()


def refused(folder: Path) -> list[str]:
    """Messages of inputs that are no tokens."""
    import torch

    from megatron_mimo.modules.hybrid import HybridLM

    write_nemotron(folder, "*")
    model, messages = HybridLM.from_pretrained(folder, device="cpu"), []
    for given in (
        torch.zeros(4, dtype=torch.int64),
        torch.zeros(1, 4),
        torch.zeros(1, 0, dtype=torch.int64),
        torch.tensor([[3, 64]]),
        torch.tensor([[-100, 3]]),
    ):
        with pytest.raises(ValueError) as caught:
            model.logits(given)
        messages.append(str(caught.value))
    return messages


def test_what_are_no_tokens_is_refused(run_ranks: Callable[..., list], tmp_path: Path) -> None:
    assert run_ranks(1, refused, tmp_path)[0] == [
        "input_ids is torch.int64 [4]: expected int64 [B, S]",
        "input_ids is torch.float32 [1, 4]: expected int64 [B, S]",
        "input_ids is torch.int64 [1, 0]: expected int64 [B, S]",
        "input_ids holds 64: expected tokens from 0 to 63",
        "input_ids holds -100: expected tokens from 0 to 63",
    ]


def packed(folder: Path, lengths: list[int]) -> dict[str, float]:
    """Differences of logits and gradients between documents packed and one by one."""
    import torch

    from megatron_mimo.kernels.packed import packed_documents, packed_segments
    from megatron_mimo.modules.hybrid import HybridLM

    write_nemotron(folder, "ME*-M*")
    together, apart = (HybridLM.from_pretrained(folder, device="cpu") for _ in range(2))
    tokens = random_tokens(1, sum(lengths))
    boundaries = torch.tensor([0, *lengths]).cumsum(0).int()
    documents = packed_documents(boundaries, tuple(lengths))
    found = together.model(tokens, None, attention_mask=None, packed_seq_params=documents)
    wanted = torch.cat([apart.logits(part) for part in tokens.split(lengths, dim=1)], dim=1)
    differences = {"logits": difference(found, wanted)}
    pull = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(3))
    (found * pull).sum().backward()
    (wanted * pull).sum().backward()
    theirs = dict(apart.model.named_parameters())
    for name, parameter in together.model.named_parameters():
        if parameter.grad is not None:
            differences[name] = difference(parameter.grad, theirs[name].grad)
    with pytest.raises(ValueError, match="state would leak between documents"):
        together.model(
            tokens,
            None,
            attention_mask=None,
            packed_seq_params=packed_segments(boundaries, tuple(lengths)),
        )
    # The documents matter: as one, they give something else.
    assert difference(together.logits(tokens), wanted) > 1e-2
    return differences


@pytest.mark.parametrize("lengths", [[5, 1, 30, 64, 2, 70], [7, 7]])
def test_documents_do_not_see_each_other(
    run_ranks: Callable[..., list], tmp_path: Path, lengths: list[int]
) -> None:
    (found,) = run_ranks(1, packed, tmp_path, lengths)
    assert found["logits"] < 1e-5
    assert max(found.values()) < 1e-4, found
