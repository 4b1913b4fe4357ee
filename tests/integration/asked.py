"""Models to ask: folders of transformers with a tokenizer, and checkpoints of several layouts."""

from pathlib import Path
from typing import Any

PATCH = 4
IMAGES = [(16, 24), (8, 8)]
"""Width and height of images, in pixels, that no processor resizes."""


def pictures() -> list[Any]:
    """The images, uint8 [H, W, 3]."""
    import numpy as np

    random = np.random.default_rng(3)
    return [random.integers(0, 256, (h, w, 3), dtype=np.uint8) for w, h in IMAGES]


def write_folder(folder: Path, pattern: str = "ME*-M") -> Any:
    """A random omni folder with a tokenizer, its chat template and image processing.

    Returns:
        transformers' model.
    """
    import json

    from transformers import AutoTokenizer

    from tests.unit_tests.data.text.chats import OPENS, save_tokenizer, template
    from tests.unit_tests.model.omni.peer import write_omni

    folder.mkdir(parents=True)
    save_tokenizer("byte-level", str(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<img>", "</img>"], special_tokens=True)
    tokenizer.chat_template = template("chatml", marked=False) + OPENS
    model = write_omni(
        folder, pattern, audio=False, vision={"num_hidden_layers": 2}, text={"vocab_size": 448}
    )
    image = tokenizer.convert_tokens_to_ids("<image>")
    model.config.image_token_id = model.image_token_id = image
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processing = {"patch_size": PATCH, "min_num_patches": 1, "max_num_patches": 256}
    mean, std = model.config.vision_config.norm_mean, model.config.vision_config.norm_std
    processing |= {"image_mean": list(mean), "image_std": list(std)}
    (folder / "preprocessor_config.json").write_text(json.dumps(processing))
    return model


def save(flags: list[str], folder: str) -> None:
    """Save the initial weights of a run on this world's ranks, as training does."""
    import torch.distributed as dist

    from megatron_mimo.checkpoint.progress import Progress
    from megatron_mimo.config.flags import CommandLine, parse
    from megatron_mimo.config.resolve import resolve
    from megatron_mimo.runtime import Device, RuntimeContext
    from megatron_mimo.training.setup import build_trainer

    rank, world_size = dist.get_rank(), dist.get_world_size()
    line = parse([*flags, "--save", folder, "--no-save-rng"], CommandLine, prog="train")
    context = RuntimeContext(
        rank=rank, local_rank=rank, world_size=world_size, device=Device("cpu")
    )
    trainer = build_trainer(resolve(line.train, world_size), context)
    assert trainer.checkpoints is not None
    trainer.checkpoints.save(Progress(3, 12), trainer.loader.state())
    trainer.checkpoints.close()
    trainer.loader.close()


def recomputed(model: Any, encoded: Any, count: int) -> list[int]:
    """The likeliest tokens, with the whole text computed again for each."""
    import torch

    rows, positions = model.rows(encoded)
    tokens = encoded.tokens.tolist()
    language = list(model._modules.values())[-1]
    limit, found = model.run.tokenizer.num_tokens, []
    with torch.inference_mode():
        for _ in range(count):
            ids = torch.tensor([tokens])
            places = torch.arange(len(tokens))[None]
            logits = language(ids, places, None, rows, positions)
            found.append(int(logits[0, -1, :limit].argmax()))
            tokens.append(found[-1])
    return found
