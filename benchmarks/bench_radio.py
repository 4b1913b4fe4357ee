"""The vision encoder: ours against its peers, and against its matrix products alone.

Width 256, four layers, fp32, a position table for 2048 x 2048 pixels. Every contender has a process
of its own and they run in turns, so that noise hits all alike and nobody inherits another's memory.
Peers: transformers' `RadioModel` with all images packed, image by image, and padded to the longest;
megatron-core's `RADIOViTModel` with dynamic resolution, over the attention that we run on a host,
as its own refuses packed sequences. The floor does the matrix products and the attention of each
image, and nothing else: no bias, norm, activation, residual or position.

    python benchmarks/bench_radio.py [--smoke | --quick] [--json FILE]
"""

import multiprocessing as mp
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchlib.ranks import turns
from benchlib.report import Row, Size, run_benchmark

WIDTH, LAYERS, HEADS, PATCH, CLASS_TOKENS = 256, 4, 4, 16, 10
# The products of several threads, as on a rank that has its host to itself.
THREADS = 2
# Numbers of mixed images, and repetitions.
CASES: dict[Size, tuple[tuple[int, ...], int]] = {
    "smoke": ((), 1),
    "quick": ((8, 32), 5),
    "full": ((8, 32, 64, 128), 5),
}
# Of the largest sets, whose times are steadier.
FEW_REPETITIONS, MANY_PATCHES = 3, 20_000
# A batch as long as its longest image soon takes minutes.
LARGEST_PADDED = 10_000
Grids = list[tuple[int, int]]
Contender = Callable[[Path, Grids], tuple[Callable[[], Any], Callable[[], Any]]]
# Of the floor's time, and of transformers' packed one's.
FLOOR_TARGETS = {"Forward": 1.05, "Forward and backward": 1.15}
PACKED_TARGETS = {"32 small": 0.5, "64 mixed": 0.75}


def image_sets(numbers: Sequence[int]) -> dict[str, Grids]:
    """Patch grids of the images: sizes as on the web, about 400 patches in the mean; and icons."""
    import numpy as np

    random = np.random.default_rng(0)

    def mixed(number: int) -> Grids:
        area = np.exp(random.normal(5.7, 0.8, number))
        aspect = np.exp(random.normal(0, 0.35, number))
        return [
            (min(64, max(2, 2 * round(high / 2))), min(64, max(2, 2 * round(wide / 2))))
            for high, wide in zip(
                np.sqrt(area / aspect).tolist(), np.sqrt(area * aspect).tolist(), strict=True
            )
        ]

    # 4 to 64 patches.
    sides = (2 * random.integers(1, 5, (32, 2))).tolist()
    sets = {"32 small": [(high, wide) for high, wide in sides]}
    for number in numbers:
        sets[f"{number} mixed"] = mixed(number)
    return sets


def pixels(grids: Grids) -> Any:
    """Normalised patches [T, 3*P*P] of all images."""
    import torch

    random = torch.Generator().manual_seed(1)
    total = sum(high * wide for high, wide in grids)
    return torch.randn(total, 3 * PATCH**2, generator=random)


def timed(module: Any, forward: Callable[[], Any]) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The forward alone, and with a backward to every parameter."""
    import torch

    def alone() -> None:
        with torch.no_grad():
            forward()

    def both() -> None:
        module.zero_grad(set_to_none=True)
        output = forward()
        output.backward(torch.ones_like(output))

    return alone, both


def ours(folder: Path, grids: Grids) -> Any:
    """`RadioVit` on packed images; indices are the loader's work."""
    from megatron_mimo.media.images.packing import pack_patches
    from megatron_mimo.modules.radio import RadioEncoder

    encoder = RadioEncoder.from_pretrained(folder, device="cpu").train()
    packed = pack_patches(pixels(grids), grids, encoder.config.image_config())
    return timed(encoder, lambda: encoder.vit(packed))


def floor(_folder: Path, grids: Grids) -> Any:
    """Matrix products and attention alone, in memory that is kept as ours keeps it."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    from megatron_mimo.runtime.host.memory import keep_freed_memory

    keep_freed_memory()
    lengths = [high * wide + CLASS_TOKENS for high, wide in grids]
    shapes = ((3 * WIDTH, WIDTH), (WIDTH, WIDTH), (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH))
    random = torch.Generator().manual_seed(2)

    def matrix(rows: int, columns: int) -> Any:
        return nn.Parameter(torch.randn(rows, columns, generator=random) / columns**0.5)

    weights = nn.ParameterList([matrix(*shape) for _ in range(LAYERS) for shape in shapes])
    embedding = matrix(WIDTH, 3 * PATCH**2)
    weights.append(embedding)
    patches, extra = pixels(grids), torch.zeros(CLASS_TOKENS * len(grids), WIDTH)

    def forward() -> Any:
        x = torch.cat([F.linear(patches, embedding), extra])
        for layer in range(LAYERS):
            qkv, proj, fc1, fc2 = weights[4 * layer : 4 * layer + 4]
            heads = F.linear(x, qkv).view(len(x), HEADS, 3 * WIDTH // HEADS)
            parts = (part.split(lengths) for part in heads.chunk(3, dim=-1))
            attended = [
                F.scaled_dot_product_attention(*(part.transpose(0, 1)[None] for part in image))
                for image in zip(*parts, strict=True)
            ]
            x = torch.cat([image[0].transpose(0, 1).flatten(1) for image in attended])
            x = F.linear(F.linear(F.linear(x, proj), fc1), fc2)
        return x

    return timed(weights, forward)


def transformers_model(folder: Path) -> Any:
    """`RadioModel` that takes normalised pixels, as all contenders do."""
    from transformers import RadioModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = RadioModel.from_pretrained(folder)
    model.make_preprocessor_external()
    return model.train()


def transformers_packed(folder: Path, grids: Grids) -> Any:
    """`RadioModel` with all images in one sequence."""
    import torch

    model, patches, sizes = transformers_model(folder), pixels(grids), torch.tensor(grids)
    return timed(model, lambda: model(patches, image_grid_hw=sizes).features)


def image_by_image(folder: Path, grids: Grids) -> Any:
    """`RadioModel` called for each image."""
    import torch

    model = transformers_model(folder)
    parts = pixels(grids).split([high * wide for high, wide in grids])
    sizes = [torch.tensor([grid]) for grid in grids]

    def forward() -> Any:
        pairs = zip(parts, sizes, strict=True)
        return torch.cat([model(part, image_grid_hw=size).features for part, size in pairs])

    return timed(model, forward)


def padded(folder: Path, grids: Grids) -> Any:
    """`RadioModel`'s layers over a batch padded to the longest image, with a mask."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    model = transformers_model(folder)
    parts = pixels(grids).split([high * wide for high, wide in grids])
    sizes = [torch.tensor([grid]) for grid in grids]
    lengths = torch.tensor([high * wide + CLASS_TOKENS for high, wide in grids])
    seen = torch.arange(int(lengths.max())) < lengths[:, None]

    def forward() -> Any:
        pairs = zip(parts, sizes, strict=True)
        tokens = [model.embeddings(part, size)[0] for part, size in pairs]
        hidden = pad_sequence(tokens, batch_first=True)
        mask = seen[:, None, None, :].expand(-1, 1, hidden.size(1), -1)
        return model.encoder(hidden, attention_mask=mask).last_hidden_state[seen]

    return timed(model, forward)


def megatron_core(_folder: Path, grids: Grids) -> Any:
    """`RADIOViTModel` with dynamic resolution, from megatron-core's own layers."""
    import torch

    from megatron_mimo.runtime import Device, prepare_megatron_core
    from megatron_mimo.runtime.host import install

    # Memory as it comes: keeping it is ours.
    install.keep_freed_memory = lambda: None  # type: ignore[attr-defined]
    prepare_megatron_core(Device("cpu"))
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.vision.radio import RADIOViTModel
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_mimo.kernels.attention import SdpaCoreAttention
    from megatron_mimo.kernels.norms import TorchNorm
    from megatron_mimo.runtime.megatron_core import transformer_config
    from megatron_mimo.runtime.solo import solo_groups

    groups = solo_groups()
    config = transformer_config(
        groups,
        params_dtype=torch.float32,
        sequence_parallel=False,
        num_layers=LAYERS,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        ffn_hidden_size=4 * WIDTH,
        layernorm_epsilon=1e-6,
    )
    spec = get_gpt_layer_local_spec()
    spec.submodules.self_attention.params = {"attn_mask_type": AttnMaskType.no_mask}
    spec.submodules.self_attention.submodules.core_attention = SdpaCoreAttention
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = TorchNorm
    model = RADIOViTModel(
        config,
        spec,
        class_token_len=CLASS_TOKENS,
        patch_dim=PATCH,
        dynamic_resolution=True,
        force_cpe_eval_mode=True,
        pg_collection=groups,
    )
    patches, sizes = pixels(grids)[None], [(high * PATCH, wide * PATCH) for high, wide in grids]
    counts = torch.tensor([0] + [high * wide for high, wide in grids], dtype=torch.int32)
    boundaries = counts.cumsum(0, dtype=torch.int32)

    def forward() -> Any:
        # Its forward changes what it is given.
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=boundaries,
            cu_seqlens_kv=boundaries,
            max_seqlen_q=int(counts.max()),
            max_seqlen_kv=int(counts.max()),
        )
        return model(patches, imgs_sizes=sizes, packed_seq_params=packed)

    return timed(model, forward)


CONTENDERS: dict[str, Contender] = {
    "ours": ours,
    "floor": floor,
    "transformers packed": transformers_packed,
    "image by image": image_by_image,
    "padded": padded,
    "megatron-core": megatron_core,
}


def work(name: str, folder: Path, grids: Grids, channel: Connection) -> None:
    """A contender's process: runs what it is asked for and answers with seconds."""
    import logging

    import torch

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    runs = CONTENDERS[name](folder, grids)
    while (which := channel.recv()) is not None:
        start = time.perf_counter()
        runs[which]()
        channel.send(time.perf_counter() - start)


def timed_in_turns(
    names: Sequence[str], folder: Path, grids: Grids, repetitions: int
) -> dict[str, list[list[float]]]:
    """Contender -> seconds of its forwards, and of its forwards with backwards."""
    # Nobody has another's memory settings: whoever needs our engine or megatron-core imports them
    # after the fork, and nothing has computed here in more than one thread.
    context = mp.get_context("fork")
    channels, processes = {}, []
    for name in names:
        channels[name], end = context.Pipe()
        process = context.Process(target=work, args=(name, folder, grids, end), daemon=True)
        process.start()
        end.close()
        processes.append(process)
    seconds: dict[str, list[list[float]]] = {name: [[], []] for name in names}
    for repetition in range(repetitions + 1):
        for which in (0, 1):
            for name in turns(names, repetition):
                channels[name].send(which)
                taken = channels[name].recv()
                # The first round warms up.
                if repetition:
                    seconds[name][which].append(taken)
    for channel, process in zip(channels.values(), processes, strict=True):
        channel.send(None)
        process.join()
    return seconds


def write_weights(folder: Path) -> None:
    """Random weights of the architecture that all contenders run."""
    import torch
    from transformers import RadioConfig, RadioModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = RadioConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        patch_size=PATCH,
        num_cls_tokens=3,
        num_registers=CLASS_TOKENS - 3,
    )
    RadioModel(config).save_pretrained(folder)


def measure(size: Size) -> Iterator[Row]:
    """The rows of every set of images."""
    numbers, repetitions = CASES[size]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_weights(folder)
        for case, grids in image_sets(numbers).items():
            patches = sum(high * wide for high, wide in grids)
            names = [name for name in CONTENDERS if name != "padded" or patches <= LARGEST_PADDED]
            fewer = min(repetitions, FEW_REPETITIONS)
            seconds = timed_in_turns(
                names, folder, grids, fewer if patches > MANY_PATCHES else repetitions
            )
            for which, order in enumerate(FLOOR_TARGETS):
                for peer in names[1:]:
                    target = FLOOR_TARGETS[order] if peer == "floor" else None
                    if peer == "transformers packed" and which == 1:
                        target = PACKED_TARGETS.get(case)
                    yield Row(
                        table=order,
                        line=f"{case} ({patches} patches)",
                        column=peer,
                        ours=tuple(1e3 * taken for taken in seconds["ours"][which]),
                        peer=tuple(1e3 * taken for taken in seconds[peer][which]),
                        target=target,
                        unit="ms",
                    )


if __name__ == "__main__":
    run_benchmark(__doc__, measure, threads=THREADS)
