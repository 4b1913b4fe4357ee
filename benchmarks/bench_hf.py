"""A training step of a Hugging Face model: ours against transformers' own model with torch's AdamW.

The same random model with the same weights, samples and update on both sides, in float32: forward,
backward, the norm of all gradients, clipping and the update. The figures are seconds of processor
time of all ranks, since they share the cores of this machine.

"One process" sets our packed step, where the samples follow each other in one sequence, and our
padded one, against the peer's, which pads the samples of a batch to the longest as its collators
do. "Tensor parallel" divides the language model over two ranks, the peer by transformers'
`tp_plan="auto"` with DTensors; the encoder divides the images over the ranks on our side, and is
computed on both on the other.

    python benchmarks/bench_hf.py [--smoke | --quick] [--json FILE]
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from benchlib.ranks import own_memory, run_ranks, turns
from benchlib.report import Row, Size, run_benchmark
from torch.distributed.tensor import DTensor

# Samples of a step, width of the language model, its layers, and repetitions.
CASES: dict[Size, tuple[int, int, int, int]] = {
    "smoke": (2, 64, 2, 1),
    "quick": (8, 256, 4, 3),
    "full": (8, 256, 4, 9),
}
FAMILIES = ("mistral3", "qwen3_vl")
TARGET = 1.0
VOCABULARY, IMAGE, PATCH, SIDE = 4096, 4090, 8, 16
ROWS = (SIDE // 2) ** 2
LR, DECAY, CLIP = 1e-4, 0.1, 1.0


def config_of(family: str, width: int, layers: int) -> Any:
    """A narrow model of a family."""
    from transformers import Mistral3Config, Qwen3VLConfig

    text: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": width // 8,
    }
    vision = {"hidden_size": width, "intermediate_size": 2 * width, "patch_size": PATCH}
    if family == "mistral3":
        sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "image_size": PATCH * SIDE}
        return Mistral3Config(
            text_config=text | {"model_type": "mistral"},
            vision_config=vision | sizes | {"model_type": "pixtral", "head_dim": width // 4},
            image_token_id=IMAGE,
            tie_word_embeddings=False,
        )
    sizes = {"depth": 2, "num_heads": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
    return Qwen3VLConfig(
        text_config=text,
        vision_config=vision
        | sizes
        | {"out_hidden_size": width, "num_position_embeddings": 256}
        | {"deepstack_visual_indexes": [0]},
        image_token_id=IMAGE,
        video_token_id=IMAGE + 1,
        vision_start_token_id=IMAGE + 2,
        vision_end_token_id=IMAGE + 3,
        tie_word_embeddings=False,
    )


@dataclass(frozen=True)
class Sample:
    """Tokens int64 [n] with one image, of which the text after it is learnt."""

    tokens: Any
    image: dict[str, torch.Tensor]


def samples_of(family: str, count: int) -> list[Sample]:
    """Random samples of several lengths."""
    found = []
    for index in range(count):
        random = np.random.default_rng(index)
        text = random.integers(1, IMAGE, 40 + 160 * index // max(count - 1, 1))
        tokens = np.concatenate([[1], np.full(ROWS, IMAGE), text])
        drawn = torch.Generator().manual_seed(index)
        if family == "mistral3":
            image = {
                "pixel_values": torch.rand(1, 3, PATCH * SIDE, PATCH * SIDE, generator=drawn),
                "image_sizes": torch.tensor([[PATCH * SIDE, PATCH * SIDE]]),
            }
        else:
            image = {
                "pixel_values": torch.rand(SIDE * SIDE, 6 * PATCH * PATCH, generator=drawn),
                "image_grid_thw": torch.tensor([[1, SIDE, SIDE]]),
            }
        found.append(Sample(tokens, image))
    return found


class Peer:
    """transformers' model with torch's AdamW."""

    def __init__(self, model: Any, family: str, samples: list[Sample]) -> None:
        self._model = model.train()
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        # torch takes DTensors and plain tensors in one call of no function.
        groups = [
            [weight for weight in weights if isinstance(weight, DTensor) == divided]
            for divided in (True, False)
        ]
        self._groups = [group for group in groups if group]
        self._optimizer = torch.optim.AdamW(
            [{"params": group} for group in self._groups], lr=LR, weight_decay=DECAY
        )
        longest = max(len(sample.tokens) for sample in samples)
        ids = np.zeros((len(samples), longest), dtype=np.int64)
        labels = np.full_like(ids, -100)
        for line, sample in enumerate(samples):
            ids[line, : len(sample.tokens)] = sample.tokens
            labels[line, ROWS + 1 : len(sample.tokens)] = sample.tokens[ROWS + 1 :]
        images = [sample.image for sample in samples]
        self._batch = {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "attention_mask": torch.from_numpy((ids > 0).astype(np.int64)),
            **{name: torch.cat([image[name] for image in images]) for name in images[0]},
        }
        if family == "qwen3_vl":
            self._batch["mm_token_type_ids"] = (self._batch["input_ids"] == IMAGE).long()

    def step(self) -> float:
        """One step; its loss."""
        loss = self._model(**self._batch, use_cache=False).loss
        loss.backward()
        norm = torch.stack([self._norm(group) for group in self._groups]).norm()
        for group in self._groups:
            torch.nn.utils.clip_grads_with_norm_(group, CLIP, norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(loss.item())

    @staticmethod
    def _norm(weights: list[Any]) -> torch.Tensor:
        """Norm [] of all gradients of a group."""
        norm = torch.nn.utils.get_total_norm([weight.grad for weight in weights])
        return norm.full_tensor() if isinstance(norm, DTensor) else norm


class Ours:
    """Our runner over the folder that the peer was written to."""

    def __init__(self, folder: str, chosen: Any, samples: list[Sample], *, packed: bool) -> None:
        from megatron_mimo.config.model_file import read_folder
        from megatron_mimo.model.config import Frozen
        from megatron_mimo.model.mimo import BuildConfig
        from megatron_mimo.optim.config import AdamConfig, ScheduleConfig
        from megatron_mimo.runtime import Device
        from megatron_mimo.training.foreign import load_folder
        from megatron_mimo.training.runner import StepConfig, build_runner

        lengths = [len(sample.tokens) - 1 for sample in samples]
        self._length = sum(lengths) if packed else max(lengths)
        self._samples, self._packed = samples, packed
        found = read_folder("hf", folder)
        assert found is not None
        self._runner = build_runner(
            chosen,
            found.model,
            Frozen(),
            BuildConfig(
                params_dtype=torch.float32,
                seed=1,
                init="megatron",
                vocab_size=VOCABULARY,
                seq_length=self._length,
                sequence_parallel=False,
            ),
            AdamConfig(lr=LR, min_lr=LR, weight_decay=DECAY, clip_grad=CLIP),
            ScheduleConfig(style="constant", warmup_samples=0, decay_samples=1000),
            StepConfig(placeholder_ids={"encoder": IMAGE}),
            device=Device("cpu"),
        )
        load_folder(self._runner, folder)
        self._data = self._step_data()
        self._iteration = 0

    def next_step(self) -> Any:
        """The only step's data, as a loader gives it."""
        return self._data

    def step(self) -> float:
        """One step; its loss."""
        from megatron_mimo.training.step import train_step

        self._iteration += 1
        metrics = train_step(self._runner, self, self._iteration, len(self._samples))
        return metrics.agreed_loss

    def _step_data(self) -> Any:
        from megatron_mimo.bridge.manifest import ManifestEntry
        from megatron_mimo.data.loader.batch import Microbatch, StepData
        from megatron_mimo.data.loader.collate import collate_packed, collate_text
        from megatron_mimo.data.samples.sample import EncodedSample
        from megatron_mimo.media.processors import ProcessedImages

        encoded = []
        for index, sample in enumerate(self._samples):
            targets = np.arange(len(sample.tokens)) > ROWS
            encoded.append(
                EncodedSample(key=str(index), tokens=sample.tokens, targets=targets, items={})
            )
        if self._packed:
            text = collate_packed(tuple(encoded), self._length, 0)
        else:
            text = collate_text(encoded, self._length, 0)
        encoder = self._runner.topology.layout.modules["encoder"]
        here = self._runner.topology.modules["encoder"].place.dp
        entries, mine, start = [], [], 0
        for index, sample in enumerate(self._samples):
            rank = index * encoder.dp // len(self._samples)
            entries.append(
                ManifestEntry(
                    module="encoder",
                    source_rank=rank,
                    lane=0,
                    rows=ROWS,
                    sequence=0 if self._packed else index,
                    start=start + 1,
                )
            )
            start += len(sample.tokens) - 1 if self._packed else 0
            if rank == here:
                mine.append(sample.image)
        grids = [sample.image.get("image_grid_thw") for sample in self._samples]
        if grids[0] is not None:
            grid = torch.cat([one for one in grids if one is not None])
            text = replace(text, facts={"image_grid_thw": grid})
        images = ProcessedImages(
            names=tuple(mine[0]),
            tensors=tuple(torch.cat([image[name] for image in mine]) for name in mine[0]),
            lengths=(SIDE * SIDE,) * len(mine),
            rows=(ROWS,) * len(mine),
            places=tuple(range(len(mine))),
        )
        keys = tuple(str(index) for index in range(len(self._samples)))
        microbatch = Microbatch(
            index=0, manifest=tuple(entries), keys={0: keys}, text=text, inputs={"encoder": images}
        )
        return StepData(
            microbatches=(microbatch,),
            lane_digest={0: 1},
            lane_target_tokens={0: sum(sample.target_tokens for sample in encoded)},
        )


def layout_of(size: int) -> Any:
    """The language model over all ranks by tensor parallelism, the encoder by data parallelism."""
    from megatron_mimo.topology import Layout, ModuleGridSpec

    return Layout.of(
        ModuleGridSpec(name="encoder", dp=size),
        ModuleGridSpec(name="llm", tp=size),
        world_size=size,
    )


def in_turns(sides: dict[str, Callable[[], float]], repetitions: int) -> dict[str, list[float]]:
    """Seconds of processor time of all ranks; the first call of each side is not counted.

    Raises:
        AssertionError: The losses differ.
    """
    times: dict[str, list[float]] = {side: [] for side in sides}
    for repetition in range(repetitions + 1):
        losses = {}
        for side in turns(tuple(sides), repetition):
            own_memory("peer" if side == "peer" else "ours")
            dist.barrier()
            start = time.process_time()
            losses[side] = sides[side]()
            taken = torch.tensor([time.process_time() - start], dtype=torch.float64)
            dist.all_reduce(taken)
            if repetition:
                times[side].append(float(taken))
        for side, loss in losses.items():
            assert abs(loss - losses["peer"]) < 1e-3 * losses["peer"], (side, losses)
    return times


def one_process(task: dict[str, Any]) -> dict[str, list[float]]:
    """Times of our packed and padded step, and of the peer's."""
    from transformers import AutoModelForImageTextToText

    samples = samples_of(task["family"], task["count"])
    peer = Peer(
        AutoModelForImageTextToText.from_pretrained(task["folder"]), task["family"], samples
    )
    ours = {
        name: Ours(task["folder"], layout_of(1), samples, packed=name == "packed")
        for name in ("packed", "padded")
    }
    sides = {name: side.step for name, side in ours.items()} | {"peer": peer.step}
    return in_turns(sides, task["repetitions"])


def two_ranks(task: dict[str, Any]) -> dict[str, list[float]]:
    """Times of our step and of the peer's with the language model over two ranks."""
    from transformers import AutoModelForImageTextToText

    samples = samples_of(task["family"], task["count"])
    model = AutoModelForImageTextToText.from_pretrained(task["folder"], tp_plan="auto")
    peer = Peer(model, task["family"], samples)
    ours = Ours(task["folder"], layout_of(2), samples, packed=False)
    return in_turns({"padded": ours.step, "peer": peer.step}, task["repetitions"])


def measure(size: Size) -> Iterator[Row]:
    """The rows of every family."""
    import transformers

    from megatron_mimo.modules.hf.family import family_of

    count, width, layers, repetitions = CASES[size]
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as made:
            folder = str(Path(made) / "model")
            torch.manual_seed(0)
            kind = getattr(transformers, family_of(family).model_class)
            kind(config_of(family, width, layers)).save_pretrained(folder)
            task = {
                "family": family,
                "folder": folder,
                "count": count,
                "repetitions": repetitions,
            }
            times = run_ranks(one_process, 1, task)
            for name in ("packed", "padded"):
                yield row("One process", family, f"{name}, by transformers", times, name)
            # transformers has no plan for the decoder of qwen3_vl, and copies it to both ranks.
            if family == "mistral3":
                times = run_ranks(two_ranks, 2, task)
                yield row("Tensor parallel, 2 ranks", family, "by transformers", times, "padded")


def row(table: str, line: str, column: str, times: dict[str, list[float]], side: str) -> Row:
    """A row of one of our sides."""
    return Row(
        table=table,
        line=line,
        column=column,
        ours=tuple(times[side]),
        peer=tuple(times["peer"]),
        target=TARGET,
        unit="s of processor time",
    )


if __name__ == "__main__":
    run_benchmark(__doc__, measure, threads=1)
