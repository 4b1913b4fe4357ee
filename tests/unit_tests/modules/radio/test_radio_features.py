"""Features, rows and gradients of RADIO against transformers' `RadioModel`."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.unit_tests.modules.radio.peer import GRIDS, PATCH, difference, random_images, write_radio

if TYPE_CHECKING:
    from torch import Tensor

CONFIGS: dict[str, dict[str, Any]] = {
    "base": {},
    "tanh": {"hidden_act": "gelu_pytorch_tanh", "mlp_ratio": 4.0},
    "heads of 80": {"hidden_size": 160, "num_attention_heads": 2, "num_hidden_layers": 1},
    "no registers": {"num_cls_tokens": 2, "num_registers": 0, "max_img_size": 64},
    "odd table": {
        "max_img_size": 4 * 13,
        "norm_mean": [0.1, 0.2, 0.3],
        "norm_std": [1.0, 2.0, 3.0],
    },
}


def features(folder: Path, fields: dict[str, Any]) -> tuple[float, float]:
    """Largest relative differences to single images and to packed ones."""
    import torch

    from megatron_mimo.modules.radio import RadioEncoder

    model = write_radio(folder, **fields)
    encoder = RadioEncoder.from_pretrained(folder, device="cpu")
    images = random_images(GRIDS)
    with torch.no_grad():
        ours = encoder.features(images)
        singly = [model(image[None]).features[0] for image in images]
        packed = model(*packed_inputs(images)).features
    assert [len(found) for found in ours] == [height * width for height, width in GRIDS]
    return (
        max(difference(found, wanted) for found, wanted in zip(ours, singly, strict=True)),
        difference(torch.cat(ours), packed),
    )


def packed_inputs(images: "list[Tensor]") -> "tuple[Tensor, Tensor]":
    """`pixel_values` and `image_grid_hw` of transformers."""
    import torch

    patches = [
        image.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).permute(1, 2, 0, 3, 4).flatten(2)
        for image in images
    ]
    return torch.cat([part.flatten(0, 1) for part in patches]), torch.tensor(
        [part.shape[:2] for part in patches]
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_features(run_ranks: Callable[..., list], tmp_path: Path, name: str) -> None:
    ((singly, packed),) = run_ranks(1, features, tmp_path, CONFIGS[name])
    assert singly < 1e-5
    assert packed < 1e-5


def gradients(folder: Path) -> dict[str, float]:
    """Relative difference of each parameter's gradient, and of those of the images."""
    import torch

    from megatron_mimo.modules.radio import RadioEncoder
    from megatron_mimo.modules.radio.weights import MODULES, name_table
    from megatron_mimo.weights.names import table_name

    model = write_radio(folder)
    encoder = RadioEncoder.from_pretrained(folder, device="cpu").train()
    theirs, ours = random_images(GRIDS), random_images(GRIDS)
    for image in theirs + ours:
        image.requires_grad_()
    wanted = model(*packed_inputs(theirs)).features
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(3))
    (wanted * weights).sum().backward()
    (torch.cat(encoder.features(ours)) * weights).sum().backward()
    found = {
        f"image {number}": difference(mine.grad, other.grad)
        for number, (mine, other) in enumerate(zip(ours, theirs, strict=True))
    }
    table = {entry.ours: entry for entry in name_table(encoder.config, MODULES)}
    parameters = dict(model.named_parameters())
    for name, parameter in encoder.vit.named_parameters():
        entry = table[table_name(encoder.vit, name)]
        whole = entry.join([parameters[part].grad for part in entry.theirs])
        found[name] = difference(parameter.grad, whole)
    return found


def test_gradients(run_ranks: Callable[..., list], tmp_path: Path) -> None:
    (found,) = run_ranks(1, gradients, tmp_path)
    assert len(found) == len(GRIDS) + 3 + 3 * 12
    assert max(found.values()) < 1e-4, found


def company(folder: Path) -> tuple[float, float, list[list[int]]]:
    """Differences of packed images to one by one, and to another order; shapes of rows."""
    import torch

    from megatron_mimo.modules.radio import RadioEncoder

    write_radio(folder)
    encoder = RadioEncoder.from_pretrained(folder, device="cpu")
    grids = [(2 * height, 2 * width) for height, width in GRIDS if height < 20]
    images = random_images(grids)
    with torch.no_grad():
        rows = encoder.rows(images)
        alone = [encoder.rows([image])[0] for image in images]
        turned = encoder.rows(images[::-1])[::-1]
        patches = encoder.features(images)
    # A row is the four patches of a square, row by row.
    height, width = grids[1]
    squares = patches[1].view(height // 2, 2, width // 2, 2, -1).transpose(1, 2)
    assert rows[1].equal(squares.flatten(2).flatten(0, 1))
    assert encoder.features([]) == encoder.rows([]) == []
    return (
        max(difference(*pair) for pair in zip(rows, alone, strict=True)),
        max(difference(*pair) for pair in zip(rows, turned, strict=True)),
        [list(found.shape) for found in rows],
    )


def test_company_and_order_do_not_matter(run_ranks: Callable[..., list], tmp_path: Path) -> None:
    ((alone, turned, shapes),) = run_ranks(1, company, tmp_path)
    assert alone < 1e-6
    assert turned < 1e-6
    assert shapes == [[height * width, 256] for height, width in GRIDS if height < 20]


def refused(folder: Path) -> list[str]:
    """Messages of images that cannot be encoded."""
    import torch

    from megatron_mimo.modules.radio import RadioEncoder

    write_radio(folder)
    encoder = RadioEncoder.from_pretrained(folder, device="cpu")
    good, messages = torch.rand(3, 8, 8), []
    for encode, image in (
        (encoder.features, torch.rand(3, 3, 8)),
        (encoder.features, torch.rand(3, 8, 10)),
        (encoder.rows, torch.rand(3, 8, 12)),
        (encoder.features, torch.rand(1, 8, 8)),
        (encoder.features, torch.zeros(3, 8, 8, dtype=torch.uint8)),
    ):
        with pytest.raises(ValueError) as caught:
            encode([good, image])
        messages.append(str(caught.value))
    return messages


def test_images_that_do_not_fit_are_named(run_ranks: Callable[..., list], tmp_path: Path) -> None:
    (messages,) = run_ranks(1, refused, tmp_path)
    assert messages == [
        "image 1 is 8 x 3 pixels: expected sides that are multiples of 4; resize it first",
        "image 1 is 10 x 8 pixels: expected sides that are multiples of 4; resize it first",
        "image 1 is 12 x 8 pixels: expected sides that are multiples of 8; resize it first",
        "image 1 is torch.float32 [1, 8, 8]: expected a float [3, H, W] with values in [0, 1]",
        "image 1 is torch.uint8 [3, 8, 8]: expected a float [3, H, W] with values in [0, 1]",
    ]


def frozen(folder: Path, bf16: bool) -> dict[str, Any]:
    """What a frozen encoder does, and the dtypes that its modules put out."""
    import torch

    from megatron_mimo.modules.radio import RadioEncoder

    write_radio(folder)
    dtype = torch.bfloat16 if bf16 else None
    encoder = RadioEncoder.from_pretrained(folder, device="cpu", dtype=dtype).freeze()
    encoder.train()
    dtypes = set()

    def watch(_module: Any, _inputs: Any, output: Any) -> None:
        parts = output if isinstance(output, tuple) else (output,)
        dtypes.update(str(part.dtype) for part in parts if isinstance(part, torch.Tensor))

    for module in encoder.vit.modules():
        module.register_forward_hook(watch)
    image = torch.rand(3, 8, 16, requires_grad=True)
    (output,) = encoder.rows([image])
    return {
        "training": any(module.training for module in encoder.vit.modules()),
        "graph": output.requires_grad or output.grad_fn is not None,
        "trains": any(parameter.requires_grad for parameter in encoder.parameters()),
        "dtypes": dtypes,
        "saved": dtypes | {str(output.dtype)},
    }


@pytest.mark.parametrize("bf16", [False, True])
def test_frozen_means_frozen(run_ranks: Callable[..., list], tmp_path: Path, bf16: bool) -> None:
    (found,) = run_ranks(1, frozen, tmp_path, bf16)
    assert not found["training"]
    assert not found["graph"]
    assert not found["trains"]
    assert found["dtypes"] == found["saved"] == {"torch.bfloat16" if bf16 else "torch.float32"}


def half_precision(folder: Path) -> float:
    """Difference of a bf16 tower to transformers' in bf16."""
    import torch

    from megatron_mimo.modules.radio import RadioEncoder

    model = write_radio(folder).to(torch.bfloat16)
    encoder = RadioEncoder.from_pretrained(folder, device="cpu", dtype=torch.bfloat16)
    images = random_images(GRIDS[1:2])
    with torch.no_grad():
        theirs = model(images[0][None].to(torch.bfloat16)).features[0]
        return difference(encoder.features(images)[0].float(), theirs.float())


def test_half_precision_stays_near(run_ranks: Callable[..., list], tmp_path: Path) -> None:
    # Three layers of bf16, which has 8 bits.
    assert run_ranks(1, half_precision, tmp_path)[0] < 0.05


SCRIPT = """
import sys, torch
from megatron_mimo.modules.radio import RadioEncoder
torch.manual_seed(7)
state = torch.get_rng_state()
encoder = RadioEncoder.from_pretrained(sys.argv[1], device="cpu")
assert torch.get_rng_state().equal(state), "the random stream moved"
assert not torch.distributed.is_initialized()
(features,) = encoder.features([torch.rand(3, 8, 8)])
features.sum().backward()
encoder.save_pretrained(sys.argv[2])
print(list(features.shape), encoder.vit.embedding.position.grad is not None)
"""


def test_without_a_launcher(tmp_path: Path) -> None:
    write_radio(tmp_path / "in")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path / "in", tmp_path / "out"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[4, 64] True"
    assert (tmp_path / "out" / "model.safetensors").exists()
