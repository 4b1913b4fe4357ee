"""Answers to a question about an image: ours against transformers' `generate` on the same folder.

Both sides encode the image, read the question and write the same tokens, greedily, in float32, and
keep keys, values and states between tokens. Milliseconds per token of the answer, the time to its
first one included; the target is 1.25 of transformers' time, 0.8 of its tokens per second.

    python benchmarks/bench_generate.py [--smoke | --quick] [--json FILE]
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchlib.ranks import own_memory, turns
from benchlib.report import Row, Size, run_benchmark

# Sizes of the language model, tokens of a short and of a long answer, and repetitions.
CASES: dict[Size, tuple[tuple[str, ...], tuple[int, int], int]] = {
    "smoke": (("tiny",), (2, 4), 1),
    "quick": (("tiny", "wide"), (8, 40), 3),
    "full": (("tiny", "wide"), (16, 144), 9),
}
WIDE = {
    "pattern": "MEM*EM-E",
    "hidden_size": 768,
    "num_attention_heads": 12,
    "num_query_groups": 4,
    "kv_channels": 64,
    "ffn_hidden_size": 2048,
    "mamba_num_heads": 24,
    "mamba_head_dim": 64,
    "mamba_num_groups": 4,
    "mamba_state_dim": 64,
    "num_moe_experts": 16,
    "moe_router_topk": 4,
    "moe_ffn_hidden_size": 768,
    "moe_shared_expert_intermediate_size": 1536,
}
VISION = {
    "model_type": "radio",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "mlp_ratio": 2.0,
    "patch_size": 16,
    "max_img_size": 128,
    "num_cls_tokens": 3,
    "num_registers": 2,
    "video_temporal_patch_size": 2,
}
PATCH = 16
VOCABULARY = 1024
TARGET = 1.25
QUESTION = "What colours are there, and which of them is the brightest?"


def write_model(folder: Path, size: str) -> Any:
    """A random model of transformers with a tokenizer of bytes, written to a folder."""
    from transformers import (
        NemotronH_Omni_Reasoning_V3,
        NemotronH_Omni_Reasoning_V3_Config,
        PreTrainedTokenizerFast,
    )

    from megatron_mimo.config.presets import model_config
    from megatron_mimo.modules.hybrid.weights import write_config

    language = model_config("nemotron-moe-vlm-tiny").part("language")
    if size == "wide":
        language = replace(language, **WIDE)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(),
        eos_token="</s>",
        additional_special_tokens=["<image>", "<img>", "</img>"],
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    model = NemotronH_Omni_Reasoning_V3(
        NemotronH_Omni_Reasoning_V3_Config(
            vision_config=VISION,
            text_config=write_config(language, VOCABULARY),
            audio_config=None,
            projector_hidden_size=128,
            vision_hidden_size=VISION["hidden_size"],
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            video_token_id=VOCABULARY - 1,
            audio_token_id=VOCABULARY - 2,
        )
    ).eval()
    model.save_pretrained(folder)
    processing = {"patch_size": PATCH, "min_num_patches": 1, "max_num_patches": 256}
    (folder / "preprocessor_config.json").write_text(json.dumps(processing))
    return model


def byte_tokenizer() -> Any:
    """Bytes and special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["</s>", "<image>", "<img>", "</img>", *alphabet]
    pieces += [f"<unused{n}>" for n in range(VOCABULARY - len(pieces))]
    tokenizer = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def inputs_of(model: Any, picture: Any, tokens: Any) -> dict[str, torch.Tensor]:
    """What transformers' processor makes of the question, without torchvision.

    Args:
        model: Model of transformers.
        picture: Pixels, uint8 [H, W, 3], at their final size.
        tokens: Tokens of the prompt, int64 [n].
    """
    vision = model.config.vision_config
    mean, std = (torch.tensor(of).view(3, 1, 1) for of in (vision.norm_mean, vision.norm_std))
    pixels = (torch.from_numpy(picture).permute(2, 0, 1) / 255 - mean) / std
    ids = torch.from_numpy(tokens)[None]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.nn.functional.unfold(pixels[None], PATCH, stride=PATCH)[0].T,
        "image_grid_hw": torch.tensor([[pixels.shape[1] // PATCH, pixels.shape[2] // PATCH]]),
    }


def measure(size: Size) -> Iterator[Row]:
    """The rows of every case."""
    names, lengths, repetitions = CASES[size]
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            yield from compare(Path(folder), name, lengths, repetitions)


def compare(folder: Path, name: str, lengths: tuple[int, int], repetitions: int) -> Iterator[Row]:
    """The rows of one size."""
    import megatron_mimo
    from megatron_mimo.data import Turn
    from megatron_mimo.data.samples.question import Source, encode_question

    peer = write_model(folder / "model", name)
    model = megatron_mimo.load(folder / "model", device="cpu")
    picture = np.random.default_rng(1).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    encoded = encode_question(
        [Turn("user", f"<image>{QUESTION}")],
        {"encoder": [Source("picture", picture)]},
        model.run.data,
        model.run.tokenizer,
    )
    inputs = inputs_of(peer, picture, encoded.tokens)

    def ours(count: int) -> list[int]:
        return list(model.generate(QUESTION, [picture], max_new_tokens=count).tokens)

    def theirs(count: int) -> list[int]:
        written = peer.generate(
            **inputs, max_new_tokens=count, do_sample=False, eos_token_id=sorted(model.ends)
        )
        found: list[int] = written[0, len(encoded.tokens) :].tolist()
        return found

    sides = {"ours": ours, "peer": theirs}
    if (found := ours(lengths[1])) != theirs(lengths[1]) or len(found) != lengths[1]:
        raise AssertionError(f"{name}: other tokens than transformers, or an early end: {found}")
    for count in lengths:
        taken: dict[str, list[float]] = {"ours": [], "peer": []}
        for repetition in range(repetitions):
            for side in turns(tuple(sides), repetition):
                own_memory(side)
                taken[side].append(1e3 * seconds(sides[side], count) / count)
        yield Row(
            table="Answers",
            line=f"{name}, {count} tokens",
            column="by transformers' generate",
            ours=tuple(taken["ours"]),
            peer=tuple(taken["peer"]),
            target=TARGET if count == lengths[-1] else None,
            unit="ms per token",
        )


def seconds(write: Callable[[int], Any], count: int) -> float:
    """Seconds of one answer of `count` tokens."""
    start = time.perf_counter()
    write(count)
    return time.perf_counter() - start


if __name__ == "__main__":
    run_benchmark(__doc__, measure, threads=1)
