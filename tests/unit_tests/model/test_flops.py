"""Counts of operations against torch's counter, on the real modules."""

from collections.abc import Callable, Sequence

import pytest

from megatron_mimo.config.presets import model_config
from megatron_mimo.model.config import Frozen
from megatron_mimo.model.flops import ModelWork, model_flops, no_work
from megatron_mimo.modules.adapter import FlopsContext
from megatron_mimo.modules.families import adapter_of
from megatron_mimo.modules.flops import (
    Flops,
    LoraLayers,
    TextWork,
    all_pairs,
    causal_pairs,
    text_work,
)
from megatron_mimo.modules.hybrid.flops import hybrid_flops
from megatron_mimo.modules.radio.flops import ImageWork, image_work

VOCAB = 96
NARROW = ("language.hidden_size=64", "vision.hidden_size=64")
# Attention and experts of other widths than the model's, so that no two factors are alike.
HYBRID = (
    "language.kv_channels=24",
    "language.num_attention_heads=6",
    "language.num_query_groups=3",
    "language.ffn_hidden_size=88",
    "language.mamba_num_heads=6",
    "language.mamba_head_dim=20",
    "language.mamba_num_groups=2",
    "language.mamba_state_dim=12",
    "language.num_moe_experts=10",
    "language.moe_router_topk=3",
    "language.moe_ffn_hidden_size=40",
    "language.moe_shared_expert_intermediate_size=72",
)


def counted(compute: Callable, gradient_of: Callable) -> tuple[int, int]:
    """What torch's counter finds of a forward and of its backward."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # The other kernels of a host are not in the counter's table.
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            output = compute()
        loss = gradient_of(output)
        with FlopCounterMode(display=False) as backward:
            if isinstance(loss, torch.Tensor) and loss.requires_grad:
                loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


def count_language(
    provider: str,
    overrides: Sequence[str],
    length: int,
    documents: tuple[int, ...] | None,
    frozen: bool,
    encoder_trains: bool,
    batch: int,
) -> tuple[int, int]:
    import torch

    from megatron_mimo.kernels.packed import packed_documents
    from megatron_mimo.modules.adapter import BuildContext
    from megatron_mimo.runtime.solo import solo_groups, solo_world

    config = model_config(provider, overrides)
    with solo_world():
        context = BuildContext(
            pg_collection=solo_groups(),
            params_dtype=torch.float32,
            frozen=frozenset({"language"} if frozen else ()),
            row_width=config.row_width,
            vocab_size=VOCAB,
            seq_length=length,
        )
        module = adapter_of(config.target).build(config.target, context)
        tokens = torch.randint(0, VOCAB, (batch, length))
        rows = torch.randn(4, module.config.hidden_size, requires_grad=encoder_trains)
        packed = None
        if documents is not None:
            bounds = torch.tensor([0, *documents]).cumsum(0).int()
            packed = packed_documents(bounds, documents)
        places = torch.arange(4) * batch
        positions = torch.arange(length).expand(batch, -1).contiguous()
        return counted(
            # Without labels: logits, whose loss has no products.
            lambda: module(tokens, positions, None, rows, places, None, packed),
            lambda logits: logits.sum(),
        )


def count_adapted(name: str, layers: frozenset[str]) -> tuple[int, int]:
    """As `count_language`, of a model whose layers of these names have adapters of rank 8."""
    import torch

    from megatron_mimo.modules.adapter import BuildContext
    from megatron_mimo.modules.lora.apply import add_lora
    from megatron_mimo.modules.lora.config import Lora
    from megatron_mimo.runtime.solo import solo_groups, solo_world

    provider, overrides, length = LANGUAGE[name]
    config = model_config(provider, overrides)
    with solo_world():
        context = BuildContext(
            pg_collection=solo_groups(),
            params_dtype=torch.float32,
            row_width=config.row_width,
            vocab_size=VOCAB,
            seq_length=length,
        )
        module = adapter_of(config.target).build(config.target, context)
        targets = {"language": layers}
        lora = Lora(rank=8, alpha=8.0, targets=targets)
        add_lora(module, lora, targets, context.pg_collection.tp)
        tokens = torch.randint(0, VOCAB, (1, length))
        positions = torch.arange(length).expand(1, -1).contiguous()
        return counted(
            lambda: module(tokens, positions, None, None, None, None, None),
            lambda logits: logits.sum(),
        )


def count_encoder(
    overrides: Sequence[str], grids: list[tuple[int, int]], frozen: Frozen
) -> tuple[tuple[int, ...], int, int]:
    """Lengths of the pieces, and what the counter finds."""
    import torch

    from megatron_mimo.media.images.packing import pack_patches
    from megatron_mimo.modules.adapter import BuildContext
    from megatron_mimo.runtime.solo import solo_groups, solo_world

    config = model_config("mock", overrides)
    vision, encoder = config.part("vision"), config.modules["encoder"]
    size = sum(rows * columns for rows, columns in grids)
    patches = torch.randn(size, 3 * vision.patch_dim**2)
    images = pack_patches(patches, grids, vision.image_config())
    with solo_world():
        context = BuildContext(
            pg_collection=solo_groups(),
            params_dtype=torch.float32,
            frozen=frozen,
            row_width=config.row_width,
            vocab_size=VOCAB,
            seq_length=64,
        )
        module = adapter_of(encoder).build(encoder, context)
        found = counted(lambda: module(images), lambda rows: rows.sum())
    return images.lengths, *found


LANGUAGE = {
    "gpt": ("mock", NARROW, 48),
    "M": ("nemotron-moe-vlm-tiny", (*HYBRID, "language.pattern=M"), 192),
    "M, a chunk not full": ("nemotron-moe-vlm-tiny", (*HYBRID, "language.pattern=MM"), 150),
    "M, less than a chunk": ("nemotron-moe-vlm-tiny", (*HYBRID, "language.pattern=M"), 40),
    "*": ("nemotron-moe-vlm-tiny", (*HYBRID, "language.pattern=**"), 48),
    "-": ("nemotron-moe-vlm-tiny", (*HYBRID, "language.pattern=-"), 48),
    "E": ("nemotron-moe-vlm-tiny", (*HYBRID, "language.pattern=E"), 48),
    "all": ("nemotron-moe-vlm-tiny", (*HYBRID, "language.pattern=ME*-ME"), 96),
}


def language(
    name: str,
    work: TextWork,
    *,
    trains: bool = True,
    returns_gradients: bool = True,
    lora: LoraLayers | None = None,
) -> Flops:
    from megatron_mimo.kernels import ssd

    provider, overrides, length = LANGUAGE[name]
    config = model_config(provider, overrides)
    context = FlopsContext(
        frozen=frozenset(() if trains else {"language"}),
        row_width=config.row_width,
        vocab_size=VOCAB,
        seq_length=length,
        rows_train=returns_gradients,
        lora={} if lora is None else {"language": lora},
    )
    if provider == "mock":
        return adapter_of(config.target).flops(config.target, work, context)
    return hybrid_flops(config.part("language"), work, context, chunk=ssd._CHUNK)


@pytest.mark.parametrize("name", LANGUAGE)
def test_the_language_model(name: str, run_ranks: Callable[..., list]) -> None:
    length = LANGUAGE[name][2]
    (found,) = run_ranks(1, count_language, *LANGUAGE[name], None, False, True, 2)
    flops = language(name, text_work([length] * 2, sequences=2, masked=True))
    assert found == pytest.approx((flops.forward, flops.backward), rel=0.01)


@pytest.mark.parametrize(
    ("frozen", "encoder_trains"), [(True, True), (False, False), (True, False)]
)
def test_a_frozen_language_model(
    frozen: bool, encoder_trains: bool, run_ranks: Callable[..., list]
) -> None:
    length = LANGUAGE["all"][2]
    (found,) = run_ranks(1, count_language, *LANGUAGE["all"], None, frozen, encoder_trains, 1)
    work = text_work([length], masked=True)
    flops = language("all", work, trains=not frozen, returns_gradients=encoder_trains)
    assert found == pytest.approx((flops.forward, flops.backward), rel=0.01)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("all", {"in_proj", "out_proj", "linear_fc1", "shared_experts.linear_fc2", "linear_proj"}),
        ("gpt", {"linear_fc1", "linear_fc2", "linear_qkv"}),
    ],
)
def test_adapters(name: str, layers: set[str], run_ranks: Callable[..., list]) -> None:
    provider, overrides, length = LANGUAGE[name]
    (found,) = run_ranks(1, count_adapted, name, frozenset(layers))
    flops = language(
        name,
        text_work([length], masked=True),
        returns_gradients=False,
        lora=LoraLayers(rank=8, layers=frozenset(layers)),
    )
    wasted = 0
    if "linear_qkv" in layers:
        # Outputs of queries are multiplied with zeros for keys and values, and so on.
        config = model_config(provider, overrides).part("language")
        head = config.hidden_size // config.num_attention_heads
        outputs = head * (config.num_attention_heads + 2 * config.num_query_groups)
        wasted = 2 * (2 * length * 8 * outputs) * config.num_layers
    # What adapters add to a frozen model between inputs that have gradients.
    (plain,) = run_ranks(1, count_language, *LANGUAGE[name], None, True, True, 1)
    frozen = language(name, text_work([length], masked=True), trains=False)
    assert found[0] - plain[0] == flops.forward - frozen.forward + wasted > 0
    assert found[1] - plain[1] == flops.backward - frozen.backward + 2 * wasted > 0


@pytest.mark.parametrize("name", ["gpt", "all"])
def test_packed_documents(name: str, run_ranks: Callable[..., list]) -> None:
    length = LANGUAGE[name][2]
    documents = (5, 20, 11, length - 36)
    (found,) = run_ranks(1, count_language, *LANGUAGE[name], documents, False, True, 1)
    flops = language(name, text_work(documents, masked=True))
    assert found == pytest.approx((flops.forward, flops.backward), rel=0.01)
    # The quadratic term is of the documents.
    assert flops.forward < language(name, text_work([length], masked=True)).forward


@pytest.mark.parametrize("vision", [False, True])
@pytest.mark.parametrize("projector", [False, True])
@pytest.mark.parametrize(
    "overrides",
    [
        ("vision.ffn_hidden_size=200", "projector.ffn_hidden_size=104"),
        ("projector.kind=affine", "vision.pixel_shuffle=false", "vision.patch_bias=true"),
        ("projector.normalization=none", "vision.class_token_len=5"),
    ],
)
def test_the_encoder(
    overrides: Sequence[str], vision: bool, projector: bool, run_ranks: Callable[..., list]
) -> None:
    grids = [(2, 4), (6, 6), (4, 10)]
    frozen = Frozen(
        part for part, is_frozen in {"vision": vision, "projector": projector}.items() if is_frozen
    )
    (found,) = run_ranks(1, count_encoder, [*NARROW, *overrides], grids, frozen)
    lengths, *operations = found
    config = model_config("mock", [*NARROW, *overrides])
    flops = model_flops(
        config,
        frozen,
        ModelWork({"encoder": image_work(lengths, config.part("vision"))}),
        vocab_size=VOCAB,
        seq_length=64,
    ).modules
    assert flops["llm"] == Flops(0, 0)
    encoder = flops["encoder"]
    assert operations == pytest.approx([encoder.forward, encoder.backward], rel=0.01)


def test_pairs() -> None:
    assert all_pairs([1, 2, 5]) == 30
    assert causal_pairs([1, 2, 5]) == 1 + 3 + 15
    assert causal_pairs([1, 2, 5], masked=True) == 30


def test_a_causal_mask_halves_attention_alone() -> None:
    length = LANGUAGE["*"][2]
    seen, all_ = (language("*", text_work([length], masked=m)).forward for m in (False, True))
    # Two layers, two products, heads of 6 x 24.
    assert all_ - seen == 2 * 2 * 2 * (length * (length - 1) // 2) * 6 * 24


def test_work_adds_up() -> None:
    config = model_config("nemotron-moe-vlm-tiny")
    vision = config.part("vision")
    parts = [
        ModelWork({"llm": text_work([10, 54]), "encoder": image_work([18, 38], vision)}),
        ModelWork({"llm": text_work([64])}),
        ModelWork({"encoder": image_work([66], vision)}),
    ]
    together = sum(parts, no_work(config))
    assert together == ModelWork(
        {
            "encoder": ImageWork(
                patches=16 + 36 + 64,
                pieces=3,
                piece_pairs=18**2 + 38**2 + 66**2,
                rows=(16 + 36 + 64) // 4,
            ),
            "llm": TextWork(sequences=2, document_pairs=causal_pairs([10, 54, 64])),
        }
    )
    sizes = {"vocab_size": VOCAB, "seq_length": 64}
    whole = model_flops(config, Frozen(), together, **sizes)
    each = [model_flops(config, Frozen(), part, **sizes) for part in parts]
    assert whole.total == sum(one.total for one in each)


def test_work_travels_as_numbers() -> None:
    config = model_config("mock")
    none = no_work(config)
    work = none + ModelWork({"encoder": image_work([18, 38], config.part("vision"))})
    assert len(none.numbers()) == len(work.numbers())
    assert none.filled(float(count) for count in work.numbers()) == work != none


def test_a_large_model_costs_six_operations_for_each_active_weight_and_token() -> None:
    """Kaplan et al. 2020, beside attention's pairs and Mamba's states."""
    config = model_config("nemotron-moe-vlm-54l").part("language")
    length, heads = 8192, 32 * 128
    context = FlopsContext(row_width=config.hidden_size, vocab_size=131072, seq_length=length)
    flops = hybrid_flops(config, text_work([length]), context)
    attention = 8 * 12 * (length + 1) // 2 * heads
    states = 23 * 6 * (128 * (8 * 128 + 4096) + 2 * 4096 * 128)
    # As `megatron-mimo plan --params` counts, less the embeddings, which are looked up.
    active = 3_659_901_632 - 131072 * 2688
    assert config.layers.count("*") == 8
    assert config.layers.count("M") == 23
    assert flops.total / length - attention - states == pytest.approx(6 * active, rel=1e-3)
