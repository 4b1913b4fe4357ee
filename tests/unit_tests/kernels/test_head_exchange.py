"""Mamba layers over context-parallel ranks, against one rank."""

from typing import Any
from unittest import mock

import pytest
import torch

from megatron_mimo.kernels.cut import DocumentCut, Piece, cut_documents
from tests.harness import RunRanks
from tests.unit_tests.kernels.cuts import positions_of
from tests.unit_tests.kernels.small_gpt import llm_layout

HIDDEN, HEADS, WIDTH, STATE = 16, 8, 4, 8

RTOL, ATOL = 1e-10, 1e-12

# Documents of one token and of none, borders everywhere, pieces in no particular pattern.
UNEVEN = DocumentCut(
    (11, 1, 0, 7, 5),
    (
        (Piece(0, 3, 6), Piece(0, 9, 11), Piece(1, 0, 1), Piece(3, 1, 3), Piece(4, 1, 5)),
        (Piece(0, 0, 3), Piece(0, 6, 9), Piece(3, 0, 1), Piece(3, 3, 7), Piece(4, 0, 1)),
    ),
)


def build(groups: int, **sizes: int) -> Any:
    """A mixer on a grid, in float64, with weights drawn by name and cut for the tp rank."""
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_mimo.kernels.hybrid import hybrid_stack_spec
    from megatron_mimo.runtime import seed_everything
    from megatron_mimo.topology.groups import build_topology

    module = build_topology(llm_layout(**sizes)).modules["llm"]
    tp = module.pg_collection.tp
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        mamba_num_heads=HEADS,
        mamba_head_dim=WIDTH,
        mamba_num_groups=groups,
        mamba_state_dim=STATE,
        tensor_model_parallel_size=tp.size(),
        context_parallel_size=module.pg_collection.cp.size(),
        use_cpu_initialization=True,
        params_dtype=torch.float64,
        gradient_accumulation_fusion=False,
    )
    seed_everything(1, tp_rank=module.place.tp, pp_rank=0, dp_rank=0)
    spec = hybrid_stack_spec(config, step_floor=0.5).submodules.mamba_layer.submodules.mixer
    mixer = build_module(
        spec, config, d_model=HIDDEN, layer_number=1, pg_collection=module.pg_collection
    ).double()
    with torch.no_grad():
        for name, weight in mixer.named_parameters():
            weight.copy_(shard(name, drawn(name, groups), groups, tp.rank(), tp.size()))
    return mixer, module.pg_collection


def drawn(name: str, groups: int) -> torch.Tensor:
    """A weight of the whole mixer."""
    inner, state = HEADS * WIDTH, groups * STATE
    shape = {
        "in_proj.weight": (2 * inner + 2 * state + HEADS, HIDDEN),
        "conv1d_weight": (inner + 2 * state, 1, 4),
        "conv1d_bias": (inner + 2 * state,),
        "norm.weight": (inner,),
        "out_proj.weight": (HIDDEN, inner),
    }.get(name, (HEADS,))
    random = torch.Generator().manual_seed(len(name))
    return 0.5 * torch.randn(shape, generator=random, dtype=torch.float64)


def shard(name: str, whole: torch.Tensor, groups: int, rank: int, size: int) -> torch.Tensor:
    """What a tp rank has of a weight, or of its gradient."""
    inner, state = HEADS * WIDTH, groups * STATE
    parts = {
        "in_proj.weight": [inner, inner, state, state, HEADS],
        "conv1d_weight": [inner, state, state],
        "conv1d_bias": [inner, state, state],
    }.get(name, [len(whole)])
    if name == "out_proj.weight":
        return whole.chunk(size, dim=1)[rank]
    return torch.cat([part.chunk(size)[rank] for part in whole.split(parts)])


def learn(cut: DocumentCut | None, groups: int, batch: int, sizes: dict[str, int]) -> Any:
    """Output and gradients of this rank's tokens; gradients of weights over all cp ranks."""
    import torch.distributed as dist

    from megatron_mimo.kernels import head_exchange
    from megatron_mimo.kernels.packed import packed_documents

    mixer, collection = build(groups, **sizes)
    size, rank = collection.cp.size(), collection.cp.rank()
    random = torch.Generator().manual_seed(3)
    length = 24 if cut is None else sum(cut.lengths)
    whole = torch.randn(length, batch, HIDDEN, generator=random, dtype=torch.float64)
    weights = torch.randn(length, batch, HIDDEN, generator=random, dtype=torch.float64)
    packed, mine = None, list(range(length))
    if cut is not None:
        bounds = torch.tensor([0, *cut.lengths]).cumsum(0).to(torch.int32)
        packed = packed_documents(bounds, cut.lengths, cut, rank)
    if size > 1:
        mine = positions_of(cut or head_exchange._zigzag(length, size), rank)
    hidden = whole[mine].requires_grad_()
    # megatron-core takes rates of decay in float32, whose exponentials differ in the last bit with
    # the number of heads on a rank.
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        output, _ = mixer(hidden, packed_seq_params=packed)
    (output * weights[mine]).sum().backward()
    gradients = {}
    for name, weight in mixer.named_parameters():
        dist.all_reduce(weight.grad, group=collection.cp)
        gradients[name] = weight.grad
    return collection.tp.rank(), mine, output.detach(), hidden.grad, gradients


@pytest.mark.parametrize(
    ("cut", "groups", "batch", "sizes"),
    [
        pytest.param(UNEVEN, 4, 1, {"cp": 2}, id="cp 2"),
        pytest.param(UNEVEN, 2, 1, {"tp": 2, "cp": 2}, id="cp 2, tp 2, shared groups"),
        pytest.param(cut_documents((20, 3, 9, 8), 4), 2, 1, {"cp": 4}, id="cp 4, shared groups"),
        pytest.param(cut_documents((20, 3, 9, 8), 4), 4, 1, {"cp": 4}, id="cp 4"),
        pytest.param(None, 2, 2, {"cp": 2}, id="not packed"),
        pytest.param(
            None, 4, 2, {"tp": 2, "cp": 4}, id="not packed, tp 2, cp 4", marks=pytest.mark.slow
        ),
    ],
)
def test_outputs_and_gradients_are_those_of_one_rank(
    run_ranks: RunRanks, cut: DocumentCut | None, groups: int, batch: int, sizes: dict[str, int]
) -> None:
    alone = None if cut is None else DocumentCut(cut.lengths, ())
    ((_, _, output, grad, gradients),) = run_ranks(1, learn, alone, groups, batch, {})
    ranks = sizes.get("tp", 1) * sizes["cp"]
    for tp_rank, mine, part, part_grad, parts in run_ranks(ranks, learn, cut, groups, batch, sizes):
        torch.testing.assert_close(part, output[mine], rtol=RTOL, atol=ATOL)
        torch.testing.assert_close(part_grad, grad[mine], rtol=RTOL, atol=ATOL)
        assert parts.keys() == gradients.keys()
        for name, whole in gradients.items():
            wanted = shard(name, whole, groups, tp_rank, sizes.get("tp", 1))
            torch.testing.assert_close(
                parts[name], wanted, rtol=RTOL, atol=ATOL, msg=lambda text, name=name: name + text
            )


def messages() -> tuple[list[str], list[str]]:
    """Names of the collectives of a forward, and of a backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from megatron_mimo.kernels.packed import packed_documents

    class Seen(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None):
            if func.namespace == "c10d":
                self.names.append(func._schema.name)
            return func(*args, **kwargs or {})

    mixer, collection = build(4, cp=2)
    bounds = torch.tensor([0, *UNEVEN.lengths]).cumsum(0).to(torch.int32)
    packed = packed_documents(bounds, UNEVEN.lengths, UNEVEN, collection.cp.rank())
    hidden = torch.randn(12, 1, HIDDEN, dtype=torch.float64, requires_grad=True)
    with Seen() as forward:
        output, _ = mixer(hidden, packed_seq_params=packed)
    with Seen() as backward:
        output.sum().backward()
    return forward.names, backward.names


def test_one_exchange_before_the_scan_and_one_after(run_ranks: RunRanks) -> None:
    for forward, backward in run_ranks(2, messages):
        assert forward == backward == ["c10d::alltoall_base_"] * 2


def refusal(case: str) -> str:
    from dataclasses import replace

    from megatron_mimo.kernels.packed import packed_documents

    mixer, _ = build(4, cp=2)
    bounds = torch.tensor([0, 4, 8], dtype=torch.int32)
    packed = packed_documents(bounds, (4, 4))
    if case == "uneven":
        pieces = ((Piece(0, 0, 3),), (Piece(0, 3, 4), Piece(1, 0, 4)))
        packed = replace(packed, cut=DocumentCut((4, 4), pieces))
    try:
        mixer(torch.zeros(4, 1, HIDDEN, dtype=torch.float64), packed_seq_params=packed)
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no cut", "without its cut"),
        ("uneven", "has 4 tokens of a packed sequence whose cut gives"),
    ],
)
def test_refusals_say_what_was_wrong(run_ranks: RunRanks, case: str, message: str) -> None:
    for found in run_ranks(2, refusal, case):
        assert message in found
