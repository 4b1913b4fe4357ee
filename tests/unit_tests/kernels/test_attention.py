"""Core attention against a plain float64 softmax."""

import math
from typing import TYPE_CHECKING, Any

import pytest

from tests.harness import RunRanks

if TYPE_CHECKING:
    from torch import Tensor

HEADS, WIDTH = 4, 8


def build(mask: str, pg_collection: Any = None, kind: type | None = None, **config: Any) -> Any:
    """An attention with HEADS heads, of a class other than ours where it is given."""
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_mimo.kernels.attention import SdpaCoreAttention

    return (kind or SdpaCoreAttention)(
        config=TransformerConfig(
            num_layers=1,
            hidden_size=HEADS * WIDTH,
            num_attention_heads=HEADS,
            **{"attention_dropout": 0.0, "use_cpu_initialization": True} | config,
        ),
        layer_number=1,
        attn_mask_type=AttnMaskType[mask],
        attention_type="self",
        pg_collection=pg_collection,
    )


def reference(query: "Tensor", key: "Tensor", value: "Tensor", visible: "Tensor") -> "Tensor":
    """Softmax attention over [T, A, D] with [T, G, D] keys; rows that see nothing are zeros."""
    import torch

    repeats = query.size(1) // key.size(1)
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    scores = torch.einsum("qad,kad->aqk", query, key) / math.sqrt(query.size(-1))
    weights = scores.masked_fill(~visible, -math.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("aqk,kad->qad", weights, value).flatten(1)


def random_qkv(num_tokens: int, groups: int) -> "tuple[Tensor, Tensor, Tensor]":
    """Float32 leaves [T, A, D] and twice [T, G, D]."""
    import torch

    generator = torch.Generator().manual_seed(num_tokens)

    def leaf(heads: int) -> "Tensor":
        drawn = torch.randn(num_tokens, heads, WIDTH, generator=generator)
        return drawn.requires_grad_()

    return leaf(HEADS), leaf(groups), leaf(groups)


def assert_equal_with_gradients(
    leaves: "tuple[Tensor, ...]", output: "Tensor", doubles: "tuple[Tensor, ...]", wanted: "Tensor"
) -> None:
    """Compare outputs [T, A*D] and the gradients of a weighted sum of them."""
    import torch

    weights = torch.linspace(-1, 1, wanted.numel(), dtype=torch.float64).view_as(wanted)
    (output.double() * weights).sum().backward()
    (wanted * weights).sum().backward()
    torch.testing.assert_close(output.double(), wanted, rtol=1e-5, atol=1e-6)
    for leaf, double in zip(leaves, doubles, strict=True):
        torch.testing.assert_close(leaf.grad.double(), double.grad, rtol=1e-4, atol=1e-6)


def check_packed(
    lengths: list[int], slots: list[int] | None, tail: int, groups: int, mask: str
) -> None:
    """Packed attention equals one masked softmax over all tokens."""
    import torch
    from megatron.core.packed_seq_params import PackedSeqParams

    lines = slots or lengths
    total = sum(lines) + tail
    leaves = random_qkv(total, groups)
    doubles = tuple(leaf.detach().double().requires_grad_() for leaf in leaves)
    segment = torch.full((total,), -1)
    start = 0
    for index, (length, slot) in enumerate(zip(lengths, lines, strict=True)):
        segment[start : start + length] = index
        start += slot
    visible = (segment[:, None] == segment) & (segment >= 0)
    if "causal" in mask:
        visible = visible.tril()

    def cumulated(sizes: list[int] | None) -> "Tensor | None":
        if sizes is None:
            return None
        return torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)

    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cumulated(lengths),
        cu_seqlens_kv=cumulated(lengths),
        cu_seqlens_q_padded=cumulated(slots),
        cu_seqlens_kv_padded=cumulated(slots),
    )
    output = build(mask)(*leaves, None, packed_seq_params=packed)
    assert_equal_with_gradients(leaves, output, doubles, reference(*doubles, visible))


def check_batched(groups: int, mask: str, hide: str) -> None:
    """Batched attention equals the masked softmax of each sequence."""
    import torch

    length, batch = 7, 3
    flat = random_qkv(length * batch, groups)
    leaves = tuple(x.detach().view(length, batch, -1, WIDTH).requires_grad_() for x in flat)
    doubles = tuple(leaf.detach().double().requires_grad_() for leaf in leaves)
    hidden = None
    visible = torch.ones(batch, length, length, dtype=torch.bool)
    if hide == "keys":  # the last keys of each sequence are padding
        ends = torch.tensor([7, 5, 2])
        hidden = (torch.arange(length) >= ends[:, None])[:, None, None, :]
        visible = ~hidden[:, 0].expand(-1, length, -1)
    if hide == "some":
        hidden = torch.rand(batch, 1, length, length) < 0.4
        visible = ~hidden[:, 0]
    if "causal" in mask:
        visible = visible.tril()
    output = build(mask)(*leaves, hidden)
    wanted = torch.stack(
        [reference(*(x[:, i] for x in doubles), visible[i]) for i in range(batch)], dim=1
    )
    assert output.shape == (length, batch, HEADS * WIDTH)
    assert_equal_with_gradients(leaves, output, doubles, wanted)


@pytest.mark.parametrize("mask", ["causal", "no_mask", "padding", "padding_causal"])
@pytest.mark.parametrize(
    ("lengths", "slots", "tail"),
    [
        pytest.param([5, 5, 5], None, 0, id="equal"),
        pytest.param([3, 6, 3, 1, 6], None, 0, id="mixed"),
        pytest.param([4, 2], None, 3, id="tail"),
        pytest.param([0, 4, 0, 2, 0], None, 0, id="empty segments"),
        pytest.param([3, 4, 3], [4, 4, 6], 0, id="padded"),
        pytest.param([], None, 4, id="no segments"),
    ],
)
def test_packed(
    run_ranks: RunRanks, lengths: list[int], slots: list[int] | None, tail: int, mask: str
) -> None:
    run_ranks(1, check_packed, lengths, slots, tail, 2, mask)


@pytest.mark.parametrize("groups", [1, 4])
def test_packed_query_groups(run_ranks: RunRanks, groups: int) -> None:
    run_ranks(1, check_packed, [3, 6, 3], None, 0, groups, "causal")


@pytest.mark.parametrize(
    ("mask", "hide"),
    [
        ("causal", ""),
        ("no_mask", ""),
        ("padding", "keys"),
        ("padding_causal", "keys"),
        ("arbitrary", "some"),
        ("padding_causal", ""),
    ],
)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_batched(run_ranks: RunRanks, groups: int, mask: str, hide: str) -> None:
    run_ranks(1, check_batched, groups, mask, hide)


def packed_rows_without_neighbours() -> "list[float]":
    """Largest differences between a packed run and a run of each segment alone."""
    import torch
    from megatron.core.packed_seq_params import PackedSeqParams

    lengths = [6, 2, 6, 3]
    query, key, value = (x.detach() for x in random_qkv(sum(lengths), 2))
    attention = build("causal")

    def run(*tokens: "Tensor", sizes: list[int]) -> "Tensor":
        bounds = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)
        packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
        return attention(*tokens, None, packed_seq_params=packed)

    together = run(query, key, value, sizes=lengths).split(lengths)
    parts = zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
    alone = [run(*part, sizes=[part[0].size(0)]) for part in parts]
    return [float((a - b).abs().max()) for a, b in zip(together, alone, strict=True)]


def test_packing_changes_nothing(run_ranks: RunRanks) -> None:
    assert max(run_ranks(1, packed_rows_without_neighbours)[0]) <= 1e-7


def message_of(config: dict[str, Any], mask: str, bounds: list[int] | None) -> str:
    """What the ValueError of building and calling says."""
    import torch
    from megatron.core.packed_seq_params import PackedSeqParams

    try:
        leaves = random_qkv(6, 4)
        cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
        packed = PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens
        )
        build(mask, **config)(*leaves, None, packed_seq_params=packed)
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("config", "mask", "bounds", "message"),
    [
        ({"window_size": (4, 0)}, "causal", [0, 6], "window_size=(4, 0)"),
        ({"softmax_type": "off-by-one"}, "causal", [0, 6], "softmax_type='off-by-one'"),
        ({"context_parallel_size": 2}, "causal", [0, 6], "needs pg_collection"),
        ({}, "arbitrary", [0, 6], "mask type `arbitrary` with a packed sequence"),
        ({}, "causal", [0, 7], "cu_seqlens_q spans [0, 7)"),
        ({}, "causal", None, "packed_seq_params without cu_seqlens_q"),
    ],
)
def test_unsupported_is_refused(
    run_ranks: RunRanks, config: dict[str, Any], mask: str, bounds: list[int] | None, message: str
) -> None:
    assert message in run_ranks(1, message_of, config, mask, bounds)[0]


def dropout_streams() -> tuple[bool, bool, bool]:
    """Whether dropout acts in training, not in evaluation, and leaves the default stream alone."""
    import torch

    from megatron_mimo.runtime import seed_everything

    seed_everything(5, tp_rank=0, pp_rank=0, dp_rank=0)
    leaves = tuple(x.detach().unsqueeze(1) for x in random_qkv(6, 4))
    attention = build("causal", attention_dropout=0.5)
    before = torch.get_rng_state()
    first, second = attention(*leaves, None), attention(*leaves, None)
    untouched = torch.equal(before, torch.get_rng_state())
    attention.eval()
    exact = torch.equal(attention(*leaves, None), build("causal")(*leaves, None))
    return not torch.equal(first, second), exact, untouched


def test_dropout(run_ranks: RunRanks) -> None:
    assert run_ranks(1, dropout_streams) == [(True, True, True)]


def check_context_parallel(groups: int, mask: str) -> None:
    """This cp rank's part of the outputs and gradients against attention over the whole."""
    from types import SimpleNamespace

    import torch
    import torch.distributed as dist

    from megatron_mimo.modules.language.merge import positions_in
    from megatron_mimo.topology import SequenceSharding

    size, rank = dist.get_world_size(), dist.get_rank()
    length = 4 * size
    sharding = SequenceSharding(seq_length=length, cp=size)
    mine = positions_in(sharding.of().cp_intervals(rank))
    whole = random_qkv(length, groups)
    doubles = tuple(x.detach().double().requires_grad_() for x in whole)
    visible = torch.ones(length, length, dtype=torch.bool)
    wanted = reference(*doubles, visible.tril() if mask == "causal" else visible)
    weights = torch.linspace(-1, 1, wanted.numel(), dtype=torch.float64).view_as(wanted)
    (wanted * weights).sum().backward()

    parts = tuple(x.detach()[mine].unsqueeze(1).requires_grad_() for x in whole)
    pg_collection = SimpleNamespace(cp=dist.group.WORLD)
    output = build(mask, pg_collection, context_parallel_size=size)(*parts, None).squeeze(1)
    (output.double() * weights[mine]).sum().backward()
    torch.testing.assert_close(output.double(), wanted[mine], rtol=1e-5, atol=1e-6)
    for part, double in zip(parts, doubles, strict=True):
        grad = part.grad.squeeze(1).double()
        torch.testing.assert_close(grad, double.grad[mine], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(("groups", "mask"), [(HEADS, "causal"), (2, "causal"), (2, "no_mask")])
def test_context_parallel_ranks_attend_to_the_whole(
    run_ranks: RunRanks, size: int, groups: int, mask: str
) -> None:
    run_ranks(size, check_context_parallel, groups, mask)


def check_one_query(groups: int, mask: str, batch: int) -> None:
    import torch

    attention = build(mask)
    query = torch.randn(1, batch, HEADS, WIDTH)
    key, value = torch.randn(2, 50, batch, groups, WIDTH)
    output = attention(query, key, value)
    assert output.shape == (1, batch, HEADS * WIDTH)
    everything = torch.ones(1, 50, dtype=torch.bool)
    for sample in range(batch):
        of_sample = (tensor[:, sample].double() for tensor in (query, key, value))
        wanted = reference(*of_sample, everything)
        torch.testing.assert_close(output[:, sample].double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 3])
def test_one_query_sees_every_key(run_ranks: RunRanks, groups: int, batch: int) -> None:
    run_ranks(1, check_one_query, groups, "no_mask", batch)
    run_ranks(1, check_one_query, groups, "causal_bottom_right", batch)
