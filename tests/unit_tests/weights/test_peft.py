"""Folders of adapters as peft writes them, and what is refused of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_mimo.weights.peft import PeftFolder, read_peft, write_peft


def written(folder: Path, **fields: Any) -> Path:
    """What peft saves of a small model."""
    import peft
    import torch

    model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(6, 8), "o_proj": torch.nn.Linear(8, 6)})
    config = peft.LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"]} | fields)
    peft.get_peft_model(model, config).save_pretrained(folder)
    return folder


def test_what_peft_writes_is_read_and_what_is_written_peft_reads(tmp_path: Path) -> None:
    import peft
    import torch

    first = read_peft(written(tmp_path / "theirs", init_lora_weights=False))
    assert (first.rank, first.alpha, first.rslora) == (2, 3.0, False)
    a, b = first.tensors["q_proj"]
    assert a.shape == (2, 6) and b.shape == (8, 2)
    write_peft(tmp_path / "ours", first, base=None, dropout=0.0)
    torch.manual_seed(3)
    model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(6, 8), "o_proj": torch.nn.Linear(8, 6)})
    plain = model["q_proj"].weight.clone()
    loaded: Any = peft.PeftModel.from_pretrained(model, str(tmp_path / "ours"))
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged["q_proj"].weight, plain + 1.5 * b @ a)
    assert list(read_peft(tmp_path / "ours").tensors) == ["q_proj"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "use_dora is True, which is not supported"),
        ({"modules_to_save": ["o_proj"]}, "modules_to_save is ['o_proj']"),
        ({"bias": "all"}, "bias is 'all', only 'none' is supported"),
        ({"rank_pattern": {"q_proj": 1}}, "rank_pattern is {'q_proj': 1}"),
        ({"lora_bias": True}, "lora_bias is True"),
    ],
)
def test_unsupported_adapters_are_refused(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError) as error:
        read_peft(written(tmp_path, **fields))
    assert message in str(error.value) and str(tmp_path) in str(error.value)


def test_adapters_that_change_the_weights_beside_them_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": "pissa"}))
    with pytest.raises(ValueError, match="init_lora_weights is 'pissa', which changes the weights"):
        read_peft(tmp_path)


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"adapter_config\.json is missing"):
        read_peft(tmp_path)
    folder = written(tmp_path / "a")
    weights = folder / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-7])
    with pytest.raises(ValueError, match="is damaged"):
        read_peft(folder)
    weights.unlink()
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is missing"):
        read_peft(folder)
    (folder / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(ValueError, match="peft_type is 'IA3', only 'LORA' is supported"):
        read_peft(folder)


def test_tensors_of_another_kind_or_rank_are_refused(tmp_path: Path) -> None:
    import torch

    half = PeftFolder(
        rank=2, alpha=1, rslora=False, tensors={"q": (torch.ones(3, 6), torch.ones(8, 3))}
    )
    write_peft(tmp_path, half, base=None, dropout=0.0)
    with pytest.raises(
        ValueError, match=r"q\.lora_A\.weight is \[3, 6\]: expected a matrix of rank 2"
    ):
        read_peft(tmp_path)
