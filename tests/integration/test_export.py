"""Exported runs in plain transformers: the same pixels, tokens and greedy answers."""

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.harness.slices import slow_but
from tests.integration.asked import write_folder
from tests.unit_tests.docs.blocks import ROOT, blocks

pytest.importorskip("torchvision", reason="transformers' image processor needs it")

PAGE = ROOT / "docs/how-to/export.md"
COUNT = 12
# Width and height in pixels, none of whole patches of 8; one is wider than its bounds allow.
SIZES = [(33, 27), (50, 20), (5, 90), (400, 301), (32, 48)]
TINY = [
    *("--model-provider", "nemotron-moe-vlm-tiny", "--init", "topology-invariant", "--seed", "5"),
    *("--train-iters", "4", "--lr", "1e-3", "--global-batch-size", "4", "--seq-length", "80"),
]
# Ranks, and flags of the layout.
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "two ranks": (2, []),
    "stages": (4, ["--encoder-dp", "2", "--llm-pp", "2"]),
    "experts": (4, ["--encoder-tp", "2", "--llm-dp", "2", "--llm-ep", "2"]),
}
BEFORE = [
    {
        "role": "user",
        "content": [
            {"type": "image"},
            {"type": "text", "text": "Größe?"},
            {"type": "image"},
        ],
    },
    {"role": "assistant", "content": "Red."},
    {"role": "user", "content": [{"type": "text", "text": "And now?"}]},
]


def pictures(sizes: list[tuple[int, int]]) -> list[Any]:
    """Images of noise, uint8 [H, W, 3], whose resizing goes beyond 0 and 255."""
    import numpy as np

    random = np.random.default_rng(3)
    return [random.integers(0, 256, (h, w, 3), dtype=np.uint8) for w, h in sizes]


def trained(flags: list[str], folder: str) -> None:
    """Train and save on this world's ranks."""
    import torch.distributed as dist

    from megatron_mimo.config.flags import CommandLine, parse
    from megatron_mimo.config.resolve import resolve
    from megatron_mimo.runtime import Device, RuntimeContext
    from megatron_mimo.training.leaving import LeaveRequest
    from megatron_mimo.training.loop import train
    from megatron_mimo.training.setup import build_trainer

    rank, size = dist.get_rank(), dist.get_world_size()
    line = parse([*flags, "--save", folder], CommandLine, prog="train")
    context = RuntimeContext(rank=rank, local_rank=rank, world_size=size, device=Device("cpu"))
    trainer = build_trainer(resolve(line.train, size), context)
    train(
        trainer.runner,
        trainer.loader,
        trainer.eval_loader,
        trainer.loop,
        None,
        trainer.checkpoints,
        LeaveRequest(None),
    )
    trainer.loader.close()
    assert trainer.checkpoints is not None
    trainer.checkpoints.close()


def convert(source: str, target: str, *more: str) -> tuple[int, str]:
    """Exit code and errors."""
    from megatron_mimo.cli import main

    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = main(["checkpoint", "convert", "--from", source, "--to", target, *more])
    return code, errors.getvalue()


def of_transformers(folder: str, adapted: tuple[str, str] | None = None) -> dict[str, Any]:
    """What plain transformers makes of images and a conversation, and what it answers.

    Args:
        folder: Folder of the model, of its processor, and of how it answers.
        adapted: Folder of a model to take in its place, and of adapters that peft loads onto it;
            None for neither.
    """
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor: Any = AutoProcessor.from_pretrained(folder)
    model, loaded = AutoModelForImageTextToText.from_pretrained(
        adapted[0] if adapted else folder, output_loading_info=True
    )
    assert not any(loaded.values()), loaded
    if adapted is not None:
        import peft
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(folder)
        model = peft.PeftModel.from_pretrained(model, adapted[1])
    images = [Image.fromarray(image) for image in pictures(SIZES)]
    text = processor.apply_chat_template(BEFORE, tokenize=False, add_generation_prompt=True)
    inputs = processor(images=images[:2], text=text, return_tensors="pt")
    with torch.inference_mode():
        told = model.generate(**inputs, max_new_tokens=COUNT)[0, inputs.input_ids.shape[1] :]
        logits = model(**inputs).logits[0, -1]
    return {
        "logits": logits,
        "pixels": [processor.image_processor(image)["pixel_values"] for image in images],
        "grids": processor.image_processor(images)["image_grid_hw"].tolist(),
        "tokens": inputs.input_ids[0].tolist(),
        "answer": told.tolist(),
    }


def of_ours(path: str) -> dict[str, Any]:
    """The same of a run, or of a folder, as `megatron-mimo generate` sees it."""
    import torch

    import megatron_mimo
    from megatron_mimo.data import Turn
    from megatron_mimo.data.samples.question import Source, encode_question

    model = megatron_mimo.load(path, device="cpu")
    data, images = model.run.data, pictures(SIZES)
    turns = [
        Turn("user", "<image>Größe?<image>"),
        Turn("assistant", "Red."),
        Turn("user", "And now?"),
    ]
    sources = {"encoder": [Source(str(n), image) for n, image in enumerate(images[:2])]}
    asked = encode_question(turns, sources, data, model.run.tokenizer)
    kind = data.inputs["encoder"]
    encoded = [kind.encode(i, kind.examine(i), with_content=True)[0] for i in images]
    answer = model.generate(turns, images[:2], max_new_tokens=COUNT)
    tokens = torch.from_numpy(asked.tokens)[None]
    with torch.inference_mode():
        logits = model.decoding(tokens.shape[1]).read(tokens, *model.rows(asked))
    ended = sorted(model.ends) if answer.stopped == "end" else []
    return {
        "logits": logits,
        "pixels": [kind.pack([one], [0]).patches for one in encoded],
        "grids": [list(one.grids[0]) for one in encoded],
        "tokens": asked.tokens.tolist(),
        "answer": [*answer.tokens, *ended],
    }


def as_on_the_page(run: str, folder: str) -> tuple[str, str]:
    """What the Python of the page prints of a folder, and what we answer of the run."""
    from PIL import Image

    import megatron_mimo

    (code,) = (block.text for block in blocks(PAGE) if block.language == "python")
    image = f"{folder}/example.png"
    Image.fromarray(pictures(SIZES)[0]).save(image)
    for ours, path in (("runs/demo-hf", folder), ("runs/demo/example.png", image)):
        assert ours in code
        code = code.replace(ours, path)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    answer = megatron_mimo.load(run, device="cpu").generate("Which digit is this?", [image])
    return printed.getvalue().removesuffix("\n"), answer.text


def exported(run: str, folder: str, *more: str) -> tuple[Any, Any, Any]:
    """Convert a run; what transformers makes of the folder, and what we make of both."""
    assert convert(run, folder, *more) == (0, "")
    return of_transformers(folder), of_ours(run), of_ours(folder)


def require_equal(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """The same grids, tokens and answers, and pixels up to the rounding of one sum in float32."""
    assert theirs["grids"] == ours["grids"]
    for there, here in zip(theirs["pixels"], ours["pixels"], strict=True):
        assert there.shape == here.shape and (there - here).abs().max() < 2e-6
    assert theirs["tokens"] == ours["tokens"]
    # Weights of norms that are all ones would hardly move an answer.
    assert (theirs["logits"] - ours["logits"]).abs().max() < 1e-4
    assert theirs["answer"] == ours["answer"]
    assert len(set(ours["answer"])) > 2


@pytest.mark.parametrize("name", slow_but(LAYOUTS, "two ranks"))
def test_a_run_of_a_preset(name: str, run_ranks: Callable[..., list], tmp_path: Path) -> None:
    ranks, layout = LAYOUTS[name]
    run, folder = str(tmp_path / "run"), str(tmp_path / "out")
    run_ranks(ranks, trained, [*TINY, *layout], run, timeout=120)
    ((theirs, ours, again),) = run_ranks(1, exported, run, folder, timeout=120)
    require_equal(theirs, ours)
    require_equal(theirs, again)
    images = json.loads((tmp_path / "out/processor_config.json").read_text())["image_processor"]
    assert (images["patch_size"], images["min_num_patches"], images["max_num_patches"]) == (
        8,
        4,
        256,
    )
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == ([257], 256)
    assert generation["suppress_tokens"] == list(range(259, 384))
    ((printed, answer),) = run_ranks(1, as_on_the_page, run, folder)
    assert printed == answer
    # It is where a run can begin, and nothing is lost.
    begun = [*TINY, "--model-provider", "hf", "--load-hf", folder, "--tokenizer-model", folder]
    run_ranks(1, trained, [*begun, "--lr", "0", "--weight-decay", "0"], str(tmp_path / "more"))
    assert run_ranks(1, weights_of, str(tmp_path / "more"), str(tmp_path / "back"), folder) == [[]]


def weights_of(run: str, target: str, folder: str) -> list[str]:
    """Names of weights that differ after a run without learning."""
    from safetensors.torch import load_file

    assert convert(run, target) == (0, "")
    before, after = (load_file(f"{path}/model.safetensors") for path in (folder, target))
    assert before.keys() == after.keys()
    return [
        name
        for name, tensor in before.items()
        # Balancing moves it without a learning rate.
        if not tensor.equal(after[name]) and "e_score_correction_bias" not in name
    ]


FLAGS = [
    *("--dynamic-resolution-min-patches", "16", "--dynamic-resolution-max-patches", "60"),
    *(
        "--override",
        "vision.pixel_mean=0.4,0.5,0.6",
        "--override",
        "language.layernorm_epsilon=0.01",
    ),
]


@pytest.mark.parametrize(
    "more",
    [
        FLAGS,
        pytest.param([*FLAGS[:2], "--dynamic-resolution-max-patches", "0"], marks=pytest.mark.slow),
    ],
    ids=["other sizes", "uncapped"],
)
def test_a_run_that_began_from_a_folder_has_its_own_sizes(
    more: list[str], run_ranks: Callable[..., list], tmp_path: Path
) -> None:
    source, run, folder = (str(tmp_path / name) for name in ("in", "run", "out"))
    run_ranks(1, written, tmp_path / "in")
    flags = ["--model-provider", "hf", "--load-hf", source, "--tokenizer-model", source]
    # The folder's processor writes tags around images; the run does not.
    flags += ["--train-iters", "3", "--lr", "1e-3", "--seq-length", "96", *more]
    run_ranks(1, trained, flags, run, timeout=120)
    (tmp_path / "in").rename(tmp_path / "moved")
    moved = ["--hf", str(tmp_path / "moved"), "--tokenizer-model", str(tmp_path / "moved")]
    assert run_ranks(1, convert, run, folder)[0][0] == 2
    assert run_ranks(1, convert, run, folder, *moved) == [(0, "")]
    (tmp_path / "moved").rename(tmp_path / "in")
    (theirs,) = run_ranks(1, of_transformers, folder, timeout=120)
    require_equal(theirs, run_ranks(1, of_ours, run)[0])
    require_equal(theirs, run_ranks(1, of_ours, folder)[0])
    config = json.loads((tmp_path / "out/config.json").read_text())
    if more is FLAGS:
        assert config["text_config"]["layer_norm_epsilon"] == 0.01
    else:
        assert max(h * w for h, w in theirs["grids"]) > 5000


def written(folder: Path) -> None:
    """A folder with a tokenizer, of which transformers loads the model alone."""
    write_folder(folder)


def text_answers(run: str, folder: str) -> tuple[list[int], list[int], bool]:
    """Greedy answers of transformers and of ours, and whether the exported text is the run's."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import megatron_mimo

    assert convert(run, folder) == (0, "")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    messages = [{"role": "user", "content": "Which colour?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, return_tensors="pt")
    with torch.inference_mode():
        told = model.generate(**inputs, max_new_tokens=COUNT)[0, inputs.input_ids.shape[1] :]
    ours = megatron_mimo.load(run, device="cpu")
    answer = ours.generate("Which colour?", max_new_tokens=COUNT)
    ended = sorted(ours.ends) if answer.stopped == "end" else []
    return told.tolist(), [*answer.tokens, *ended], type(model).__name__ == "NemotronHForCausalLM"


@pytest.mark.slow
def test_a_run_of_text_alone(run_ranks: Callable[..., list], tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    run_ranks(1, trained, [*TINY, "--llm-only"], run, timeout=120)
    ((theirs, ours, is_text),) = run_ranks(1, text_answers, run, str(tmp_path / "out"))
    assert theirs == ours and len(set(ours)) > 1 and is_text


def refused(folder: str) -> list[tuple[list[str], int, str, bool]]:
    """What is said of runs that transformers has no model for."""
    from tests.integration.asked import save

    fixed = ["--no-dynamic-resolution", "--img-h", "32", "--img-w", "32"]
    found = []
    for number, flags in enumerate(
        (
            ["--model-provider", "mock"],
            [*TINY[:2], "--override", "projector.normalization=LayerNorm"],
            [*TINY[:2], *fixed],
            [*TINY[:2], *fixed, "--use-tiling", "--max-num-tiles", "2"],
            [*TINY[:2], "--dynamic-resolution-rule", "nearest"],
        )
    ):
        run, target = f"{folder}/run{number}", f"{folder}/out{number}"
        save([*flags, "--seq-length", "96"], run)
        found.append((flags, *convert(run, target), Path(target).exists()))
    hf = convert(run, f"{folder}/out", "--hf", folder)
    return [*found, ([], *hf, False)]


def test_what_stands_in_the_way_is_one_line(run_ranks: Callable[..., list], tmp_path: Path) -> None:
    (found,) = run_ranks(1, refused, str(tmp_path), timeout=120)
    messages = (
        "llm of the model is a GptConfig: transformers' NemotronH_Omni_Reasoning_V3 would need a "
        "dense decoder",
        "projector.normalization is 'LayerNorm': transformers' NemotronH_Omni_Reasoning_V3 has "
        "'RMSNorm' only; it would need a field for the projector's norm",
        "images.dynamic_resolution (--dynamic-resolution) is False: ",
        "images.dynamic_resolution (--dynamic-resolution) is False: ",
        "images.grid_rule (--dynamic-resolution-rule) is 'nearest': ",
        f"--hf {tmp_path}: the run of ",
    )
    for (flags, code, error, left), message in zip(found, messages, strict=True):
        assert code == 2 and not left, flags
        assert error.startswith(f"error: {message}") and len(error.splitlines()) == 1
