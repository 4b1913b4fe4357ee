"""Weights of folders: whatever form they are stored in, ranks hold what transformers loads."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.harness.slices import slow_but
from tests.hf.stored import FORMS

EVERYDAY = (
    "gemma4 moe, by transformers",
    "mistral3, old names",
    "qwen3_5 moe, by expert",
    "qwen3_vl moe, transposed",
)


def compared(form: str, folder: str) -> None:
    """Read the shards of every rank, and put together what they hold."""
    import torch
    import transformers

    from megatron_mimo.modules.hf.config import family_from
    from megatron_mimo.modules.hf.weights import stage_tensors
    from megatron_mimo.weights.shards import is_expert, sharded_axis, take_shard
    from tests.hf.stored import filled, write

    path = Path(folder)
    write(form, path)
    family = family_from((path / "config.json").read_text())
    kind = getattr(transformers, family.model_class)
    model, report = kind.from_pretrained(path, output_loading_info=True)
    assert not any(report.values()), report
    wanted = model.state_dict()
    seen = set()
    experts = "moe" in form
    for module in ("encoder", "llm"):
        for rank in range(2):
            # Towers of other families are not divided.
            size = 2 if module == "llm" or form.startswith("gemma4") else 1
            tp = (rank % size, size)
            places = {"tp": tp, "expt_tp": tp}
            if module == "llm" and experts:
                places["ep"] = (1 - rank, 2)
            stage = filled(path, module, places)
            for name, tensor in stage_tensors(stage.model):
                seen.add(name)
                whole = wanted[name]
                if isinstance(tensor, torch.nn.Parameter) and is_expert(tensor):
                    whole = whole.chunk(2)[places["ep"][0]]
                shard = take_shard(whole, tensor, tp_rank=tp[0], tp_size=size)
                assert tensor.shape == shard.shape, name
                assert tensor.equal(shard), name
                if ".experts." in name:
                    assert sharded_axis(tensor) is not None
    rest = set(wanted) - set(model.get_expanded_tied_weights_keys(all_submodels=True)) - seen
    # No module has an encoder of sound.
    assert seen <= set(wanted)
    assert all(name.startswith(("model.audio_tower.", "model.embed_audio.")) for name in rest)
    assert bool(rest) == ("sound" in form)


@pytest.mark.parametrize("form", slow_but(FORMS, *EVERYDAY))
def test_shards_are_those_of_what_transformers_loads(
    form: str, run_ranks: Callable[..., list], tmp_path: Path
) -> None:
    run_ranks(1, compared, form, str(tmp_path), timeout=120)


def written_back(form: str, folder: str, target: str) -> None:
    """Change one weight of each module, and write the folder again."""
    import torch
    import transformers
    from safetensors import safe_open

    from megatron_mimo.model.hf.weights import save_hf
    from megatron_mimo.modules.hf.config import family_from
    from megatron_mimo.weights.folder import WeightFolder
    from tests.hf.stored import filled, write

    source, path = Path(folder), Path(target)
    write(form, source, dtype="bfloat16")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "generation_config.json").write_text('{"do_sample": false}\n')
    stages = [filled(source, module, {}) for module in ("encoder", "llm")]
    changed = [
        max((p for p in stage.model.parameters() if p.dim() == 3), key=torch.numel, default=None)
        for stage in stages
    ]
    with torch.no_grad():
        for weight in changed:
            if weight is not None:
                weight[1] += 0.25
        stages[1].model.get_parameter("model.language_model.embed_tokens.weight")[3] += 0.25
    with WeightFolder(source) as weights:
        save_hf(path, weights, stages)
    assert {one.name for one in source.iterdir() if one.suffix in (".json", ".jinja")} <= {
        *(one.name for one in path.iterdir()),
        # The files may be fewer here.
        "model.safetensors.index.json",
    }
    before, after = {}, {}
    for where, found in ((source, before), (path, after)):
        for file in where.glob("*.safetensors"):
            with safe_open(file, framework="pt") as opened:
                found |= {name: opened.get_tensor(name) for name in opened.keys()}
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype for name in before)
    others = {name for name in before if not before[name].equal(after[name])}
    assert 0 < len(others) <= 3, others
    kind = getattr(transformers, family_from((path / "config.json").read_text()).model_class)
    model, report = kind.from_pretrained(path, output_loading_info=True)
    assert not any(report.values()), report
    loaded = model.state_dict()
    for stage in stages:
        for name, tensor in stage.model.state_dict().items():
            assert tensor.to(torch.bfloat16).equal(loaded[name].to(torch.bfloat16)), name


@pytest.mark.parametrize("form", slow_but(FORMS, "qwen3_5 moe, by expert"))
def test_a_folder_is_written_in_the_form_that_it_was_read(
    form: str, run_ranks: Callable[..., list], tmp_path: Path
) -> None:
    run_ranks(1, written_back, form, str(tmp_path / "a"), str(tmp_path / "b"), timeout=120)


def refused(folder: str, changes: dict[str, Any]) -> list[str]:
    """What is said of folders with changes in their weights."""
    import torch

    from megatron_mimo.weights.folder import WeightFolder, write_folder
    from tests.hf.stored import filled, write

    root = Path(folder)
    said = []
    for number, (form, change) in enumerate(changes.items()):
        path = root / str(number)
        write(form, path)
        with WeightFolder(path) as source:
            weights = {name: source.tensor(name).clone() for name in source.names}
            config = source.config
        name, what = change
        assert name in weights
        if what == "missing":
            del weights[name]
        elif what == "another":
            weights[f"{name}_more"] = weights[name].clone()
        elif isinstance(what, str):
            weights[what] = weights[name].clone()
        else:
            weights[name] = torch.zeros(what)
        write_folder(path, config, weights)
        try:
            filled(path, "llm", {})
        except ValueError as error:
            said.append(str(error))
        else:
            said.append("")
    return said


def test_what_does_not_fit_is_refused_in_one_line(
    run_ranks: Callable[..., list], tmp_path: Path
) -> None:
    norm = "model.language_model.norm.weight"
    expert = "model.language_model.layers.0.mlp.experts.1.up_proj.weight"
    changes = {
        "mistral3, new names": (norm, "missing"),
        "mistral3, old names": ("language_model.model.norm.weight", norm),
        "qwen3_vl, with a tied head": (norm, "another"),
        "qwen3_5 moe, by expert": (expert, "missing"),
        "qwen3_5 moe, new names": ("lm_head.weight", [3, 5]),
        "qwen3_vl moe, transposed": (
            "model.language_model.layers.0.mlp.experts.down_proj",
            [4, 32, 63],
        ),
    }
    (said,) = run_ranks(1, refused, str(tmp_path), changes, timeout=120)
    missing, twice, unexpected, few, shape, transposed = said
    assert f"1 missing: {norm}" in missing
    assert f"language_model.model.norm.weight and {norm} are the same weight" in twice
    assert f"1 unexpected: {norm}_more" in unexpected
    assert "mlp.experts.gate_up_proj is stored as 4 and 3 tensors" in few
    assert "lm_head.weight has the shape [3, 5], but its config.json gives" in shape
    assert "[4, 32, 63]" in transposed and "gives model.language_model.layers.0" in transposed
    assert all(line and "\n" not in line for line in said)


# -- memory ----------------------------------------------------------------------------------------

WIDTH, LAYERS = 1024, 6


def large(folder: str) -> None:
    """A folder of some 200 MB in files of 20 MB."""
    import torch
    import transformers

    from tests.hf.models import CONFIGS

    config = CONFIGS["mistral3"](
        layers=LAYERS, hidden_size=WIDTH, intermediate_size=2 * WIDTH, vocab_size=4096
    )
    model = transformers.Mistral3ForConditionalGeneration(config).to(torch.float32)
    model.save_pretrained(folder, max_shard_size="20MB")


def read_within(folder: str, part: float) -> tuple[int, int] | None:
    """Read a rank's shards with no more than a part of their size of further memory.

    The first rank writes the folder: it has memory left from that, which another has not.

    Returns:
        Bytes of the shards, and of what was read for them, on the second rank.
    """
    import resource

    import torch.distributed as dist

    from megatron_mimo.modules.hf.config import describe
    from megatron_mimo.modules.hf.weights import fill, stage_tensors
    from megatron_mimo.weights.folder import WeightFolder
    from tests.hf.stored import stage_of

    class Counted(WeightFolder):
        read = 0

        def tensor(self, name: str) -> Any:
            return self._counted(super().tensor(name))

        def box(self, name: str, slices: Any) -> Any:
            return self._counted(super().box(name, slices))

        def _counted(self, tensor: Any) -> Any:
            self.read += tensor.numel() * tensor.element_size()
            return tensor

    if dist.get_rank() == 0:
        large(folder)
    dist.barrier()
    if dist.get_rank() == 0:
        return None
    stage = stage_of(Path(folder), "llm", {"tp": (1, 2)})
    share = sum(t.numel() * t.element_size() for _, t in stage_tensors(stage.model))
    with Counted(folder) as weights:
        # Files are mapped as they are opened, which is no memory of the process.
        assert weights.names
        status = Path("/proc/self/status").read_text()
        private = 1024 * int(status.partition("VmData:")[2].split()[0])
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (private + int(part * share), hard))
        try:
            fill(stage.model, weights, describe(weights.config), tp=(1, 2), ep=(0, 1))
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    return share, weights.read


def test_a_rank_needs_hardly_more_memory_than_its_shards(
    run_ranks: Callable[..., list], tmp_path: Path
) -> None:
    _, (share, read) = run_ranks(2, read_within, str(tmp_path), 0.1, timeout=120)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] > 190e6
    assert share > 80e6
    assert read <= share
