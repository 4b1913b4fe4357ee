"""Runs from folders of transformers: answers, and folders that plain transformers loads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.harness.slices import slow_but
from tests.hf.whole import FAMILIES
from tests.integration.test_export import convert, trained

COUNT = 10
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "two ranks": (2, []),
    "llm pp 2": (3, ["--llm-pp", "2"]),
}
QUESTION = "what is the answer?"


def written(name: str, folder: str) -> None:
    from tests.hf.whole import write_whole

    write_whole(name, Path(folder))


def images() -> list[Any]:
    """Two images of noise."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(3)
    return [
        Image.fromarray(random.integers(0, 256, (h, w, 3), dtype=np.uint8))
        for w, h in ((33, 27), (50, 20))
    ]


def of_transformers(folder: str) -> tuple[list[int], Any, list[int]]:
    """Tokens of a question, logits after it, and the answer; in float32."""
    import torch
    import transformers

    from megatron_mimo.modules.hf.config import family_from

    found = Path(folder)
    family = family_from((found / "config.json").read_text())
    processor: Any = transformers.AutoProcessor.from_pretrained(folder)
    kind = getattr(transformers, family.model_class)
    model, report = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
    )
    inputs = processor(
        images=[images()], text=[text], return_tensors="pt", add_special_tokens=False
    )
    with torch.inference_mode():
        told = model.generate(**inputs, max_new_tokens=COUNT, do_sample=False)
        logits = model(**inputs).logits[0, -1]
    answer = told[0, inputs.input_ids.shape[1] :].tolist()
    ends = model.generation_config.eos_token_id
    return inputs.input_ids[0].tolist(), logits, [token for token in answer if token not in ends]


def of_ours(path: str) -> tuple[list[int], Any, list[int]]:
    """The same of a run or of a folder."""
    import torch

    import megatron_mimo
    from megatron_mimo.data import Turn
    from megatron_mimo.data.samples.question import encode_question
    from megatron_mimo.inference.sources import read_source

    model = megatron_mimo.load(path, device="cpu")
    sources = {"encoder": [read_source(image, "image") for image in images()]}
    turns = [Turn("user", f"<image><image>{QUESTION}")]
    encoded = encode_question(turns, sources, model.run.data, model.run.tokenizer)
    tokens = torch.from_numpy(encoded.tokens)[None]
    logits = model.decoding(tokens.shape[1], encoded).read(tokens, *model.rows(encoded))
    answer = model.generate(turns, images(), max_new_tokens=COUNT)
    return encoded.tokens.tolist(), logits, list(answer.tokens)


@pytest.mark.parametrize("layout", slow_but(LAYOUTS, "two ranks"))
@pytest.mark.parametrize("name", slow_but(FAMILIES, "qwen3_vl"))
def test_a_run_answers_as_its_folder_does_in_transformers(
    name: str, layout: str, run_ranks: Callable[..., list], tmp_path: Path
) -> None:
    import torch

    folder, run, exported = (str(tmp_path / part) for part in ("folder", "run", "exported"))
    run_ranks(1, written, name, folder)
    ranks, flags = LAYOUTS[layout]
    flags = [
        *("--model-provider", "hf", "--load-hf", folder, "--tokenizer-model", folder),
        *("--train-iters", "2", "--lr", "1e-2", "--global-batch-size", "2", "--seed", "5"),
        *("--seq-length", "192", *flags),
    ]
    run_ranks(ranks, trained, flags, run, timeout=180)
    (code,) = run_ranks(1, convert, run, exported, timeout=120)
    assert code == (0, "")
    before, wanted = (
        run_ranks(1, of_transformers, where, timeout=120)[0] for where in (folder, exported)
    )
    assert not torch.equal(before[1], wanted[1]), "training has changed nothing"
    for path in (run, exported):
        (found,) = run_ranks(1, of_ours, path, timeout=120)
        assert found[0] == wanted[0]
        assert (found[1] - wanted[1]).abs().max() < 1e-5 * wanted[1].abs().max()
        assert found[2] == wanted[2]
    assert_same_files(Path(folder), Path(exported))
    assert_moved(run_ranks, tmp_path)


def assert_same_files(folder: Path, exported: Path) -> None:
    """All but the weights is as it was."""
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            assert (exported / file.name).read_bytes() == file.read_bytes(), file.name


def assert_moved(run_ranks: Callable[..., list], root: Path) -> None:
    """A run whose folder has moved says so, and is exported with --hf."""
    run, moved = root / "run", root / "moved"
    (root / "folder").rename(moved)
    ((code, said),) = run_ranks(1, convert, str(run), str(root / "again"))
    assert code == 2
    assert f"{root / 'folder'}, which is not there: put the folder back" in said
    ((code, said),) = run_ranks(1, convert, str(run), str(root / "again"), "--hf", str(moved))
    assert (code, said) == (0, "")
    for file in (root / "exported").iterdir():
        assert (root / "again" / file.name).read_bytes() == file.read_bytes(), file.name
