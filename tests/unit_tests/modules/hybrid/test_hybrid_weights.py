"""Import and export of NemotronH folders, and patterns over pipeline stages."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_mimo.modules.hybrid import HybridConfig
from tests.unit_tests.modules.hybrid.peer import random_tokens, write_nemotron
from tests.unit_tests.modules.radio.peer import difference


def round_trip(folder: Path, pattern: str, fields: dict[str, Any]) -> list[str]:
    """Tensors that a load and a save change, as transformers reads both."""
    from transformers import NemotronHForCausalLM

    from megatron_mimo.modules.hybrid import HybridLM

    before = write_nemotron(folder / "in", pattern, **fields)
    HybridLM.from_pretrained(folder / "in", device="cpu").save_pretrained(folder / "out")
    after, info = NemotronHForCausalLM.from_pretrained(folder / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    for field, value in before.config.to_dict().items():
        if field not in ("_name_or_path", "dtype", "transformers_version"):
            assert getattr(after.config, field) == value, field
    theirs = after.state_dict()
    return [name for name, tensor in before.state_dict().items() if not tensor.equal(theirs[name])]


def test_round_trip_is_exact(run_ranks: Callable[..., list], tmp_path: Path) -> None:
    assert run_ranks(1, round_trip, tmp_path, "ME*-M", {}) == [[]]


def tied(folder: Path) -> tuple[bool, bool, bool]:
    """Whether a model is tied whose folder has two tables, one twice, and one once."""
    from safetensors.torch import load_file, save_file

    from megatron_mimo.modules.hybrid import HybridLM

    write_nemotron(folder, "M*", tie_word_embeddings=True)
    two = HybridLM.from_pretrained(folder, device="cpu")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["backbone.embeddings.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    twice = HybridLM.from_pretrained(folder, device="cpu")
    tokens = random_tokens(1, 5)
    twice.save_pretrained(folder / "again")
    assert "lm_head.weight" in load_file(folder / "again" / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    once = HybridLM.from_pretrained(folder, device="cpu")
    assert once.logits(tokens).equal(twice.logits(tokens))
    names = [dict(model.model.named_parameters()) for model in (two, twice, once)]
    first, second, third = ("output_layer.weight" not in held for held in names)
    return first, second, third


def test_weights_say_whether_embeddings_are_tied(
    run_ranks: Callable[..., list], tmp_path: Path
) -> None:
    # transformers keeps two tables even if its config says that they are one.
    assert run_ranks(1, tied, tmp_path) == [(False, True, True)]


def load_error(folder: Path) -> str:
    """The message of a load that must fail."""
    from megatron_mimo.modules.hybrid import HybridLM

    with pytest.raises(ValueError) as caught:
        HybridLM.from_pretrained(folder, device="cpu")
    return str(caught.value)


def test_missing_and_unexpected_weights_are_listed(
    run_ranks: Callable[..., list], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    write_nemotron(tmp_path, "ME")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    expert = "backbone.layers.1.mixer.experts"
    tensors[f"{expert}.8.up_proj.weight"] = tensors.pop(f"{expert}.7.up_proj.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    (message,) = run_ranks(1, load_error, tmp_path)
    assert f"1 missing: {expert}.7.up_proj.weight; " in message
    assert f"1 unexpected: {expert}.8.up_proj.weight" in message


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model_type", "llama", "a model of type 'llama': expected 'nemotron_h'"),
        ("mlp_bias", True, "mlp_bias is True, only False is supported"),
        ("moe_latent_size", 16, "moe_latent_size is 16, only None is supported"),
        ("num_nextn_predict_layers", 1, "num_nextn_predict_layers is 1, only 0 is supported"),
        (
            "num_experts_per_tok",
            1,
            "norm_topk_prob is True with num_experts_per_tok 1, only False is supported",
        ),
        ("layers_block_type", ["moe", "rnn"], "layers_block_type has rnn: expected linear_att"),
    ],
)
def test_other_architectures_are_refused(
    run_ranks: Callable[..., list], tmp_path: Path, field: str, value: object, message: str
) -> None:
    write_nemotron(tmp_path, "ME")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    assert message in run_ranks(1, load_error, tmp_path)[0]


def older_names(folder: Path) -> float:
    """Difference of logits when config.json has the pattern as letters."""
    import torch

    from megatron_mimo.modules.hybrid import HybridLM

    write_nemotron(folder, "M*")
    tokens = random_tokens(1, 9)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    with torch.no_grad():
        wanted = HybridLM.from_pretrained(folder, device="cpu").logits(tokens)
        del config["layers_block_type"]
        file.write_text(json.dumps(config | {"hybrid_override_pattern": "M*"}))
        return difference(HybridLM.from_pretrained(folder, device="cpu").logits(tokens), wanted)


def test_older_folders_have_a_pattern(run_ranks: Callable[..., list], tmp_path: Path) -> None:
    assert run_ranks(1, older_names, tmp_path) == [0.0]


def sharded_logits(folder: Path, sizes: dict[str, int]) -> Any:
    """Logits [B, S, V] of the last stage, from weights that each rank read its shard of."""
    import torch
    import torch.distributed as dist

    from megatron_mimo.modules.hybrid.model import build_hybrid
    from megatron_mimo.modules.hybrid.weights import load_weights, read_config
    from megatron_mimo.runtime import seed_everything
    from megatron_mimo.topology import Layout, ModuleGridSpec
    from megatron_mimo.topology.groups import build_topology
    from megatron_mimo.weights.folder import WeightFolder

    spec = ModuleGridSpec(name="llm", **sizes)
    groups = build_topology(Layout.of(spec, world_size=spec.size)).target
    assert groups is not None
    place, collection = groups.place, groups.pg_collection
    seed_everything(1, tp_rank=place.tp, pp_rank=place.pp, dp_rank=place.dp)
    with WeightFolder(folder) as weights:
        config, vocab_size = read_config(weights)
        model = build_hybrid(
            config,
            vocab_size=vocab_size,
            seq_length=64,
            pg_collection=collection,
            params_dtype=torch.float32,
            sequence_parallel=spec.tp > 1,
        )
        each = config.num_moe_experts // spec.ep
        load_weights(
            model,
            config,
            weights,
            tp=(place.tp, spec.tp),
            expt_tp=(place.expt_tp, spec.expt_tp),
            first_expert=place.ep * each,
        )
    tokens = random_tokens(2, 12)
    model.eval()
    with torch.no_grad():
        if place.pp:
            hidden = torch.empty(12 // spec.tp, 2, config.hidden_size)
            dist.recv(hidden, spec.rank(tp=place.tp, dp=place.dp, pp=place.pp - 1))
            model.set_input_tensor(hidden)
        output = model(tokens, torch.arange(12).expand(2, -1), attention_mask=None)
        if place.pp < spec.pp - 1:
            dist.send(output, spec.rank(tp=place.tp, dp=place.dp, pp=place.pp + 1))
            return None
    parts = [torch.empty_like(output) for _ in range(spec.tp)]
    dist.all_gather(parts, output.contiguous(), group=collection.tp)
    return torch.cat(parts, dim=-1)


@pytest.mark.parametrize(
    "sizes",
    [
        {"tp": 2},
        {"pp": 2},
        {"dp": 2, "ep": 2},
        {"tp": 2, "dp": 2, "ep": 2},
        {"tp": 2, "ep": 2},
        {"dp": 2, "pp": 2, "ep": 2},
    ],
    ids=str,
)
def test_each_rank_loads_its_shard(
    run_ranks: Callable[..., list], tmp_path: Path, sizes: dict[str, int]
) -> None:
    write_nemotron(tmp_path, "ME*-ME")
    (wanted,) = run_ranks(1, sharded_logits, tmp_path, {})
    world = sizes.get("tp", 1) * sizes.get("dp", 1) * sizes.get("pp", 1)
    ranks = run_ranks(world, sharded_logits, tmp_path, sizes)
    found = [logits for logits in ranks if logits is not None]
    assert len(found) == world // sizes.get("pp", 1)
    for logits in found:
        assert difference(logits, wanted) < 1e-5


def test_patterns_are_cut_into_stages() -> None:
    assert HybridConfig(pattern="ME*-").stages(2) == ("ME", "*-")
    assert HybridConfig(pattern="ME*|-").stages(2) == ("ME*", "-")
    assert HybridConfig(pattern="ME*|-").num_layers == 4
    with pytest.raises(ValueError, match="--llm-pp 3 does not divide the 4 layers"):
        HybridConfig(pattern="ME*-").stages(3)
    with pytest.raises(ValueError, match=r"'ME\*\|-' has 2 stages between its bars, --llm-pp is 4"):
        HybridConfig(pattern="ME*|-").stages(4)


@pytest.mark.parametrize("pattern", ["", "|", "MX", "M E"])
def test_unknown_letters_are_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="expected letters M, E"):
        HybridConfig(pattern=pattern)
