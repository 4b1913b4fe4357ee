"""Attention over context-parallel ranks that share a packed sequence, against one rank's."""

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_mimo.kernels.cut import DocumentCut, Piece, cut_documents
from megatron_mimo.kernels.cut_plan import Part, plan_cut
from tests.fused.packages import VERSIONS
from tests.harness import RunRanks
from tests.unit_tests.kernels.cuts import any_cut, positions_of

HEADS, WIDTH = 4, 8
HOST = torch.device("cpu")


def keys_by_query(part: Part, num_tokens: int, num_keys: int) -> dict[int, list[list[int]]]:
    """Keys of each query of a part, for every segment that it is in."""
    queries = list(range(num_tokens)) if part.queries is None else part.queries.tolist()
    keys = list(range(num_keys)) if part.keys is None else part.keys.tolist()
    found: dict[int, list[list[int]]] = {}
    query = key = 0
    for group in part.groups:
        for _ in range(group.count):
            for token in queries[query : query + group.q_length]:
                found.setdefault(token, []).append(keys[key : key + group.kv_length])
            query, key = query + group.q_length, key + group.kv_length
    assert (query, key) == (len(queries), len(keys))
    return found


@given(any_cut(), st.booleans())
def test_every_token_meets_the_keys_of_its_document_once(cut: DocumentCut, causal: bool) -> None:
    plans = [plan_cut(cut, rank, causal, HOST) for rank in range(len(cut.pieces))]
    held = [positions_of(cut, rank) for rank in range(len(cut.pieces))]
    gathered: list[int | None] = []
    for plan, tokens in zip(plans, held, strict=True):
        sent = [tokens[index] for index in plan.sent.tolist()]
        gathered += [*sent, *[None] * (plan.slots - len(sent))]
    bounds = torch.tensor([0, *cut.lengths]).cumsum(0).tolist()
    for plan, tokens in zip(plans, held, strict=True):
        assert plan.num_tokens == len(tokens)
        own = keys_by_query(plan.own, len(tokens), len(tokens))
        others = keys_by_query(plan.gathered, len(tokens), len(gathered))
        for token, position in enumerate(tokens):
            document = max(i for i, start in enumerate(bounds[:-1]) if start <= position)
            wanted = list(range(bounds[document], bounds[document + 1]))
            seen = [gathered[key] for keys in others.get(token, []) for key in keys]
            for keys in own.get(token, []):
                places = [tokens[key] for key in keys]
                seen += [place for place in places if place <= position] if causal else places
            if causal:
                wanted = [place for place in wanted if place <= position]
            assert sorted(seen, key=repr) == sorted(wanted, key=repr)


def test_nothing_is_gathered_where_no_document_is_split() -> None:
    cut = DocumentCut((3, 5), ((Piece(0, 0, 3),), (Piece(1, 0, 2), Piece(1, 2, 5))))
    for rank in (0, 1):
        plan = plan_cut(cut, rank, True, HOST)
        assert plan.slots == 0 and not plan.gathered.groups and not len(plan.sent)
        assert [group.q_length for group in plan.own.groups] == [cut.lengths[rank]]


def one_rank(lengths: tuple[int, ...], groups: int, mask: str, dtype: str) -> Any:
    """Output and gradients of attention over the whole sequence, without context parallelism."""
    from megatron_mimo.kernels.packed import packed_segments
    from tests.unit_tests.kernels.test_attention import build

    leaves = drawn(sum(lengths), groups, dtype)
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    output = build(mask)(*leaves, None, packed_seq_params=packed_segments(bounds, lengths))
    (output * weights(output)).sum().backward()
    return output.detach(), [leaf.grad for leaf in leaves]


def cut_up(cut: DocumentCut, groups: int, mask: str, dtype: str, kernel: str) -> Any:
    """Output and gradients of this rank's tokens; bytes kept for backward; messages sent."""
    import torch.distributed as dist

    from megatron_mimo.kernels import cut_attention, part_attention
    from tests.unit_tests.kernels.test_attention import build

    packed, mine = packed_for(cut, dist.get_rank())
    whole = drawn(sum(cut.lengths), groups, dtype)
    leaves = [leaf.detach()[mine].requires_grad_() for leaf in whole]
    size = len(cut.pieces)
    attention = build(mask, ranks_of(dist.group.WORLD), context_parallel_size=size)
    chosen = cut_attention.part_attention
    if kernel == "plain":
        plain = part_attention._Batched(part_attention._PLAIN)
        cut_attention.part_attention = lambda _query: plain
    if kernel == "varlen":
        register_varlen()
        cut_attention.part_attention = lambda _query: part_attention._Varlen()
    kept = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    try:
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            output = attention(*leaves, None, packed_seq_params=packed)
        wanted = weights(torch.empty(len(whole[0]), output.size(1), dtype=output.dtype))
        (output * wanted[mine]).sum().backward()
    finally:
        cut_attention.part_attention = chosen
    return output.detach(), [leaf.grad for leaf in leaves], kept


@cache
def register_varlen() -> None:
    """Give torch's fused attention for segments a kernel for hosts, which it has none of."""
    from torch.nn.attention import varlen  # noqa: F401 (it defines the operators)

    from megatron_mimo.kernels.part_attention import _PLAIN

    def segments(q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int) -> Any:
        assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q.shape == cu_k.shape
        assert (int(cu_q[-1]), int(cu_k[-1])) == (len(q), len(k)) and len(k) == len(v)
        assert (int(cu_q.diff().max()), int(cu_k.diff().max())) == (max_q, max_k)
        for index in range(len(cu_q) - 1):
            yield slice(*cu_q[index : index + 2].tolist()), slice(*cu_k[index : index + 2].tolist())

    def batch(x: Any, heads: int) -> Any:
        return x.repeat_interleave(heads // x.size(1), dim=1).transpose(0, 1)[None]

    def forward(
        query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int,
        is_causal: bool = False, scale: float | None = None, window_size: Any = None,
        enable_gqa: bool = False, seqused_k: Any = None, block_table: Any = None,
        num_splits: int | None = None,
    ) -> Any:  # fmt: skip
        heads = query.size(1)
        assert list(window_size) == [-1, 0 if is_causal else -1]
        assert enable_gqa == (heads != key.size(1)) and scale is not None
        out = torch.empty_like(query)
        lse = query.new_empty(heads, len(query))
        for q, k in segments(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k):
            parts = (batch(x, heads) for x in (query[q], key[k], value[k]))
            output, logs = _PLAIN.forward(*parts, is_causal, scale)
            out[q], lse[:, q] = output[0].transpose(0, 1), logs[0]
        return out, lse, torch.zeros(2, dtype=torch.uint64)

    def backward(
        grad_out: Any, query: Any, key: Any, value: Any, out: Any, lse: Any, cu_seq_q: Any,
        cu_seq_k: Any, max_q: int, max_k: int, is_causal: bool, rng_state: Any,
        scale: float | None = None, window_size: Any = None,
    ) -> Any:  # fmt: skip
        heads = query.size(1)
        assert list(window_size) == [-1, 0 if is_causal else -1]
        assert scale is not None and lse.is_contiguous() and grad_out.is_contiguous()
        dq, dk, dv = (torch.empty_like(x) for x in (query, key, value))
        for q, k in segments(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k):
            parts = [batch(x, heads) for x in (grad_out[q], query[q], key[k], value[k], out[q])]
            found = _PLAIN.backward(*parts, lse[:, q][None], is_causal, scale)
            for whole, part, where in zip((dq, dk, dv), found, (q, k, k), strict=True):
                each = part[0].transpose(0, 1).unflatten(1, (whole.size(1), -1))
                whole[where] = each.sum(2)
        return dq, dk, dv

    torch.library.register_kernel("torch_attn::_varlen_attn", "cpu", forward)
    torch.library.register_kernel("torch_attn::_varlen_attn_backward", "cpu", backward)


def packed_for(cut: DocumentCut, rank: int) -> Any:
    """Boundaries of a packed sequence, and the positions of a rank in it."""
    from dataclasses import replace

    from megatron_mimo.kernels.packed import packed_segments

    bounds = torch.tensor([0, *cut.lengths]).cumsum(0).to(torch.int32)
    return replace(packed_segments(bounds, cut.lengths), cut=cut), positions_of(cut, rank)


def ranks_of(group: Any) -> Any:
    """Groups of a module whose ranks share a sequence."""
    from types import SimpleNamespace

    return SimpleNamespace(cp=group, tp=None)


def drawn(num_tokens: int, groups: int, dtype: str) -> list[torch.Tensor]:
    """Leaves [T, A, D] and twice [T, G, D]."""
    random = torch.Generator().manual_seed(num_tokens)
    return [
        torch.randn(num_tokens, heads, WIDTH, generator=random, dtype=torch.float64)
        .to(getattr(torch, dtype))
        .requires_grad_()
        for heads in (HEADS, groups, groups)
    ]


def weights(output: torch.Tensor) -> torch.Tensor:
    return torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output)


# A document over all ranks in a zig-zag, one over two ranks in parts of any size, whole ones of
# equal and other lengths, an empty one, a rank with several pieces in a row, padding.
UNEVEN = DocumentCut(
    (13, 3, 3, 0, 9, 2),
    (
        (Piece(0, 0, 2), Piece(0, 9, 13), Piece(1, 0, 3), Piece(4, 4, 6)),
        (
            Piece(0, 2, 5),
            Piece(0, 5, 9),
            Piece(2, 0, 3),
            Piece(4, 0, 4),
            Piece(4, 6, 9),
            Piece(5, 0, 2),
        ),
    ),
)
FOUR = DocumentCut(
    (16, 5, 5, 1),
    (
        (Piece(0, 0, 2), Piece(0, 14, 16), Piece(1, 0, 1)),
        (Piece(0, 2, 4), Piece(0, 12, 14), Piece(1, 1, 5), Piece(2, 4, 5)),
        (),
        (Piece(0, 4, 12), Piece(2, 0, 4), Piece(3, 0, 1)),
    ),
)
WHOLE = DocumentCut((4, 6), ((Piece(0, 0, 4),), (Piece(1, 0, 6),)))


@pytest.mark.parametrize("mask", ["causal", "no_mask"])
@pytest.mark.parametrize(
    ("cut", "groups", "kernel"),
    [
        pytest.param(UNEVEN, 2, "fused", id="uneven"),
        pytest.param(UNEVEN, 2, "plain", id="plain kernel"),
        pytest.param(UNEVEN, 2, "varlen", id="kernel of a GPU"),
        pytest.param(FOUR, 4, "varlen", id="kernel of a GPU, a rank without tokens"),
        pytest.param(UNEVEN, 4, "fused", id="no groups"),
        pytest.param(FOUR, 1, "fused", id="a rank without tokens"),
        pytest.param(WHOLE, 2, "fused", id="whole documents"),
        pytest.param(cut_documents((70, 9, 9, 40), 4), 2, "fused", id="planned"),
    ],
)
def test_outputs_and_gradients_are_those_of_one_rank(
    run_ranks: RunRanks, cut: DocumentCut, groups: int, kernel: str, mask: str
) -> None:
    ((output, gradients),) = run_ranks(1, one_rank, cut.lengths, groups, mask, "float64")
    size = len(cut.pieces)
    found = run_ranks(size, cut_up, cut, groups, mask, "float64", kernel)
    for rank, (part, parts, _) in enumerate(found):
        mine = positions_of(cut, rank)
        torch.testing.assert_close(part, output[mine], rtol=1e-12, atol=1e-12)
        for gradient, wanted in zip(parts, gradients, strict=True):
            torch.testing.assert_close(gradient, wanted[mine], rtol=1e-12, atol=1e-12)


def fused() -> tuple[bool, bool, bool]:
    """Whether attention beside Transformer Engine has outputs and gradients of a host's."""
    import torch.distributed as dist
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_mimo.kernels.specs import spec_provider
    from tests.unit_tests.kernels.test_attention import build

    packed, mine = packed_for(UNEVEN, dist.get_rank())
    groups = ranks_of(dist.group.WORLD)
    found = []
    for kind in (None, spec_provider().core_attention()):
        leaves = [leaf.detach()[mine].requires_grad_() for leaf in drawn(30, 2, "float32")]
        attention = build("causal", groups, kind=kind, context_parallel_size=2)
        output = attention(*leaves, None, AttnMaskType.causal, packed_seq_params=packed)
        (output * weights(output)).sum().backward()
        found.append((output, [leaf.grad for leaf in leaves]))
    (ours, gradients), (other, other_gradients) = found
    same = all(a.equal(b) for a, b in zip(gradients, other_gradients, strict=True))
    return ours.equal(other), same, kind.__name__ == "FusedCoreAttention"


@pytest.mark.parametrize("version", VERSIONS)
def test_beside_transformer_engine_it_is_the_same(run_fused: Any, version: str) -> None:
    assert run_fused(version, 2, fused) == [(True, True, True)] * 2


def test_bfloat16_is_as_close_as_on_one_rank(run_ranks: RunRanks) -> None:
    cut = UNEVEN
    ((exact, exact_gradients),) = run_ranks(1, one_rank, cut.lengths, 2, "causal", "float64")
    ((single, single_gradients),) = run_ranks(1, one_rank, cut.lengths, 2, "causal", "bfloat16")
    found = run_ranks(2, cut_up, cut, 2, "causal", "bfloat16", "fused")
    order = positions_of(cut, 0) + positions_of(cut, 1)
    together = [torch.cat([found[0][0], found[1][0]])]
    together += [torch.cat(parts) for parts in zip(found[0][1], found[1][1], strict=True)]
    for ours, theirs, true in zip(
        together, [single, *single_gradients], [exact, *exact_gradients], strict=True
    ):
        error = (ours.double() - true[order]).norm()
        assert error <= 1.5 * (theirs.double() - true).norm()


def test_what_is_kept_for_backward_falls_with_the_number_of_ranks(run_ranks: RunRanks) -> None:
    lengths = (256, 256)
    one, two, four = (
        max(
            kept
            for _, _, kept in run_ranks(
                size, cut_up, cut_documents(lengths, size), 2, "causal", "float32", "fused"
            )
        )
        for size in (1, 2, 4)
    )
    assert two == one / 2 and four == one / 4


def refusal(case: str) -> str:
    from dataclasses import replace
    from types import SimpleNamespace

    import torch.distributed as dist

    from megatron_mimo.kernels.packed import packed_segments
    from megatron_mimo.runtime import seed_everything
    from tests.unit_tests.kernels.test_attention import build

    seed_everything(5, tp_rank=0, pp_rank=0, dp_rank=0)
    packed = packed_segments(torch.tensor([0, 6], dtype=torch.int32), (6,))
    if case != "no cut":
        packed = replace(packed, cut=cut_documents((6,), 3 if case == "ranks" else 2))
    config = {"attention_dropout": 0.1} if case == "dropout" else {}
    tokens = 4 if case == "tokens" else 3
    attention = build(
        "causal", SimpleNamespace(cp=dist.group.WORLD), context_parallel_size=2, **config
    )
    try:
        attention(*drawn(tokens, 4, "float32"), None, packed_seq_params=packed)
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no cut", "without its cut"),
        ("ranks", "cut for 3 ranks, in a context-parallel group of 2"),
        ("tokens", "whose cut gives it 3"),
        ("dropout", "attention dropout 0.1 with packed sequences"),
    ],
)
def test_refusals_say_what_to_do(run_ranks: RunRanks, case: str, message: str) -> None:
    for found in run_ranks(2, refusal, case):
        assert message in found
