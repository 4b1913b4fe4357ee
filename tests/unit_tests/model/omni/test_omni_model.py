"""Whole models in one process against transformers' `NemotronH_Omni_Reasoning_V3`."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit_tests.model.omni.peer import random_samples, theirs_of, write_omni
from tests.unit_tests.modules.radio.peer import difference


def gradients(model: Any, folder: Path) -> dict[str, Any]:
    """Gradients of transformers' model by the names that a folder has; its weights are lost."""
    import torch
    from safetensors.torch import load_file

    for parameter in model.parameters():
        grad = parameter.grad
        parameter.data = torch.zeros_like(parameter) if grad is None else grad
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def wanted_gradients(model: Any, theirs: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Each of our parameters, and its gradient by transformers."""
    from megatron_mimo.model.omni.parts import projector_table
    from megatron_mimo.modules.hybrid import weights as language
    from megatron_mimo.modules.radio import weights as radio
    from megatron_mimo.weights.names import table_name

    config = model.config.model
    modules = {
        "vision_model.": (
            model.vision.vit,
            radio.name_table(config.part("vision"), radio.PUBLISHED),
            lambda name: table_name(model.vision.vit, name),
        ),
        "mlp1.": (model.projector, projector_table(), str),
        "language_model.": (
            model.language,
            language.name_table(config.part("language")),
            lambda name: table_name(model.language, name),
        ),
    }
    found = {}
    for prefix, (module, table, name_of) in modules.items():
        entries = {entry.ours: entry for entry in table}
        for name, parameter in module.named_parameters():
            entry = entries[name_of(name)]
            whole = entry.join([theirs[prefix + part] for part in entry.theirs])
            found[prefix + name] = (parameter, whole)
    return found


def compare(folder: Path, pattern: str, chosen: list[int]) -> dict[str, float]:
    """Relative differences of loss, logits and every gradient, over some of the samples."""
    import torch

    import megatron_mimo
    from tests.unit_tests.model.omni.peer import SAMPLES

    theirs = write_omni(folder / "in", pattern)
    ours = megatron_mimo.load_pretrained(folder / "in", device="cpu")
    ids, labels, images = random_samples()
    per_sample = iter(images)
    by_sample = [[next(per_sample) for _ in grids] for grids in SAMPLES]
    batch = ids[chosen], labels[chosen], [image for k in chosen for image in by_sample[k]]
    wanted, loss = theirs_of(theirs, *batch), ours.loss(*batch)
    assert loss.shape == () and loss.dtype == torch.float32
    differences = {
        "loss": float((loss - wanted.loss).abs() / wanted.loss),
        "logits": difference(ours.logits(batch[0], batch[2]), wanted.logits),
    }
    loss.backward()
    wanted.loss.backward()
    for name, (parameter, whole) in wanted_gradients(
        ours, gradients(theirs, folder / "gradients")
    ).items():
        mine = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if whole.abs().max() or mine.abs().max():
            differences[name] = difference(mine, whole)
    return differences


@pytest.mark.parametrize(
    ("pattern", "chosen"), [("ME*-M", [0, 1, 2]), ("MEM*E-", [2, 0]), ("ME*-", [1])]
)
def test_loss_and_gradients(
    run_ranks: Callable[..., list], tmp_path: Path, pattern: str, chosen: list[int]
) -> None:
    (found,) = run_ranks(1, compare, tmp_path, pattern, chosen)
    vision = [name for name in found if name.startswith("vision_model.")]
    # Without images nothing reaches the encoder.
    assert bool(vision) == (chosen != [1])
    assert found["loss"] < 1e-5
    assert max(found.values()) < 1e-4, found


def order_counts(folder: Path) -> bool:
    """Whether swapping the images of two samples changes the loss."""
    import megatron_mimo

    write_omni(folder, "M*")
    model = megatron_mimo.load_pretrained(folder, device="cpu")
    ids, labels, images = random_samples()
    # The first image of a sample has as many rows as its last two have together.
    swapped = [images[1], images[0], *images[2:]]
    return bool(model.loss(ids, labels, images) != model.loss(ids, labels, swapped))


def test_the_order_of_images_counts(run_ranks: Callable[..., list], tmp_path: Path) -> None:
    assert run_ranks(1, order_counts, tmp_path) == [True]


def trained(folder: Path) -> tuple[float, float, float]:
    """A step's change of the loss, its value in transformers relative to ours, and what differs."""
    import torch
    from transformers import NemotronH_Omni_Reasoning_V3

    import megatron_mimo

    write_omni(folder / "in", "ME*-", vision={"layerscale_value": 0.5})
    model = megatron_mimo.load_pretrained(folder / "in", device="cpu").train()
    batch = random_samples()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    before = model.loss(*batch)
    before.backward()
    optimizer.step()
    after = model.loss(*batch).detach()
    model.save_pretrained(folder / "out")
    theirs, info = NemotronH_Omni_Reasoning_V3.from_pretrained(
        folder / "out", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    with torch.no_grad():
        wanted = theirs_of(theirs.eval(), *batch).loss
        again = megatron_mimo.load_pretrained(folder / "out", device="cpu").loss(*batch)
    return (
        float(abs(after - before)),
        float(abs(after - wanted) / wanted),
        float(abs(again - after)),
    )


def test_what_was_trained_is_what_transformers_loads(
    run_ranks: Callable[..., list], tmp_path: Path
) -> None:
    ((change, relative, again),) = run_ranks(1, trained, tmp_path)
    assert change > 1e-3
    assert relative < 1e-5
    assert again == 0


def refused(folder: Path) -> list[str]:
    """Messages of samples that are wrong."""
    import torch

    import megatron_mimo

    write_omni(folder, "*", audio=False)
    model = megatron_mimo.load_pretrained(folder, device="cpu")
    ids, labels, images = random_samples()
    messages = []
    for given in (
        (ids[0], labels[0], images),
        (ids.masked_fill(ids == 10, 64), labels, images),
        (ids, labels[:, 1:], images),
        (ids, labels.float(), images),
        (ids, torch.full_like(labels, -100), images),
        (ids, labels.clamp(min=64), images),
        (ids, labels, images[:-1]),
        (ids, labels, []),
        (ids, labels, [*images[:3], images[3][:, :, :-4]]),
        (ids, labels, [*images[:3], images[3].byte()]),
    ):
        with pytest.raises(ValueError) as caught:
            model.loss(*given)
        messages.append(str(caught.value))
    return messages


def test_wrong_samples_are_refused(run_ranks: Callable[..., list], tmp_path: Path) -> None:
    found = run_ranks(1, refused, tmp_path)[0]
    wanted = [
        "input_ids is torch.int64 [40]: expected int64 [B, S]",
        "input_ids holds 64: expected tokens from 0 to 63",
        "labels is torch.int64 [3, 39]: expected int64 [3, 40], as input_ids",
        "labels is torch.float32 [3, 40]: expected int64 [3, 40], as input_ids",
        "labels holds no target: expected a token other than -100 after the first",
        "labels holds 64: expected tokens from 0 to 63",
        "3 images make 6 rows, but input_ids holds 14 image tokens (7): expected as many",
        "0 images make 0 rows, but input_ids holds 14 image tokens (7): expected as many",
        "image 3 is 28 x 16 pixels: expected sides that are multiples of 8; resize it first",
        "image 3 is torch.uint8 [3, 16, 32]: expected a float [3, H, W] with values in [0, 1]",
    ]
    assert found == wanted


SCRIPT = """
import sys
import megatron_mimo
assert "torch" not in sys.modules
assert "load_pretrained" in dir(megatron_mimo)
import torch
torch.manual_seed(7)
state = torch.get_rng_state()
model = megatron_mimo.load_pretrained(sys.argv[1], device="cpu")
assert torch.get_rng_state().equal(state), "the random stream moved"
assert not torch.distributed.is_initialized()
from tests.unit_tests.model.omni.peer import random_samples
loss = model.loss(*random_samples())
loss.backward()
model.save_pretrained(sys.argv[2])
print(list(model.carried), all(p.grad is not None for p in model.parameters()))
"""


def test_one_process_without_a_launcher(tmp_path: Path) -> None:
    # As many experts as each token takes: every parameter has a gradient.
    write_omni(tmp_path / "in", "ME*-", text={"n_routed_experts": 3})
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path / "in", tmp_path / "out"],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[4])},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['audio', 'video'] True"
    assert (tmp_path / "out" / "model.safetensors").exists()
