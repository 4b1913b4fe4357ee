"""The audio encoder: ours against transformers' padded batch, its clips one by one, and a floor.

Width 256, four layers, fp32, 80 mel features, half a second to 30 seconds of speech a clip. Every
contender has a process of its own, with one thread, and they run in turns, so that nobody inherits
another's memory. Times are those of the processor, which other load moves little. Peers:
transformers' `ParakeetEncoder` with all clips in a batch that is padded to the longest, and called
for each clip. The floor does the matrix products of the packed rows, the convolutions before them
and the attention of each clip, and nothing else.

*Memory* is the most that a process takes beyond what it takes after loading its weights, in a
forward with backward. *Operations* are those that torch's counter counts in the same: what the time
could be if nothing else took any.

    python benchmarks/bench_audio.py [--smoke | --quick] [--json FILE]
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

WIDTH, LAYERS, HEADS, BINS, CHANNELS, KERNEL = 256, 4, 4, 80, 64, 9
THREADS = 1
# Numbers of mixed clips, and repetitions.
CASES: dict[Size, tuple[tuple[int, ...], int]] = {
    "smoke": ((2,), 1),
    "quick": ((2, 32), 5),
    "full": ((2, 8, 32, 64), 5),
}
# Speech in public sets: few seconds in the median, with a long tail.
MEDIAN_SECONDS, SIGMA, FEWEST_SECONDS, MOST_SECONDS = 7.0, 0.7, 0.5, 30.0
RATE = 16_000
TARGET_CASE, TARGET = "32 mixed", 0.6
TABLES = ("Forward", "Forward and backward")
Contender = Callable[[Path, Sequence[int]], Any]


def clip_sets(size: Size) -> dict[str, list[int]]:
    """Numbers of samples of the clips of each case."""
    import numpy as np

    random = np.random.default_rng(0)
    sets: dict[str, list[int]] = {}
    for number in CASES[size][0]:
        seconds = np.exp(random.normal(np.log(MEDIAN_SECONDS), SIGMA, number))
        seconds = seconds.clip(FEWEST_SECONDS, MOST_SECONDS)
        sets[f"{number} mixed"] = (RATE * seconds).astype(int).tolist()
    if size == "full":
        # The case that padding suits.
        sets["32 of 8 to 12 s"] = (RATE * random.uniform(8, 12, 32)).astype(int).tolist()
    return sets


def frames_of(samples: int) -> int:
    """Mel frames of a clip, the last of which is masked."""
    return 1 + samples // 160


def features(samples: Sequence[int]) -> list[Any]:
    """Mel features of every clip, float32 [frames, bins]."""
    import torch

    random = torch.Generator().manual_seed(1)
    found = [torch.randn(frames_of(each), BINS, generator=random) for each in samples]
    for each in found:
        each[-1] = 0
    return found


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


def ours(folder: Path, samples: Sequence[int]) -> Any:
    """Our encoder on packed clips; packing is the loader's work."""
    import torch

    from megatron_mimo.media.audio.clip import EncodedClip
    from megatron_mimo.media.audio.packing import pack_clips
    from megatron_mimo.runtime import prepare_megatron_core, resolve_device

    prepare_megatron_core(resolve_device("cpu"))
    from megatron_mimo.modules.parakeet.encoder import ParakeetEncoder
    from megatron_mimo.modules.parakeet.weights import load_weights, read_config
    from megatron_mimo.runtime.solo import solo_groups, solo_world
    from megatron_mimo.weights.folder import WeightFolder

    with WeightFolder(folder) as weights:
        config = read_config(weights.config, weights.config_name)
        with solo_world():
            encoder = ParakeetEncoder(config, solo_groups(), torch.float32, initialize=False)
        load_weights(encoder, config, weights, tp_rank=0, tp_size=1)
    audio = config.audio_config()
    packed = pack_clips(
        [
            EncodedClip(samples=number, rows=audio.num_rows(len(each)), features=each.numpy())
            for number, each in zip(samples, features(samples), strict=True)
        ],
        audio,
    )
    encoder.train()
    assert packed is not None
    return timed(encoder, lambda: encoder(packed))


def transformers_model(folder: Path) -> Any:
    """`ParakeetEncoder` in training, with running statistics as ours has them."""
    import torch
    from transformers import ParakeetEncoder
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = ParakeetEncoder.from_pretrained(folder).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.eval()
    return model


def padded(folder: Path, samples: Sequence[int]) -> Any:
    """`ParakeetEncoder` with one batch, as its feature extractor pads it."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    model = transformers_model(folder)
    batch = pad_sequence(features(samples), batch_first=True)
    valid = torch.tensor([frames_of(each) - 1 for each in samples])
    mask = (torch.arange(batch.size(1)) < valid[:, None]).long()
    return timed(model, lambda: model(batch, attention_mask=mask).last_hidden_state)


def one_by_one(folder: Path, samples: Sequence[int]) -> Any:
    """`ParakeetEncoder` called for each clip."""
    import torch

    model = transformers_model(folder)
    inputs = []
    for each in features(samples):
        mask = torch.ones(1, len(each), dtype=torch.long)
        mask[:, -1] = 0
        inputs.append((each[None], mask))

    def forward() -> Any:
        rows = (model(each, attention_mask=mask).last_hidden_state[0] for each, mask in inputs)
        return torch.cat(list(rows))

    return timed(model, forward)


def floor(_folder: Path, samples: Sequence[int]) -> Any:
    """Products alone, in memory that is kept as ours keeps it."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    from megatron_mimo.runtime.host.memory import keep_freed_memory

    keep_freed_memory()
    frames = [-(-frames_of(each) // 8) * 8 for each in samples]
    lengths = [each // 8 for each in frames]
    random = torch.Generator().manual_seed(2)

    def weight(*shape: int) -> Any:
        return nn.Parameter(torch.randn(*shape, generator=random) / shape[-1] ** 0.5)

    inner = ((4, 1), (1, 4), (3, 1), (1, 1), (2, 1), (1, 1), (4, 1), (1, 4))
    layers = [
        nn.ParameterList([weight(out * WIDTH, width * WIDTH) for out, width in inner])
        for _ in range(LAYERS)
    ]
    convolutions = [weight(CHANNELS, 1, 3, 3) for _ in range(3)]
    across = [weight(CHANNELS, CHANNELS) for _ in range(2)]
    into = weight(WIDTH, CHANNELS * BINS // 8)
    every = nn.ModuleList([*layers, nn.ParameterList([*convolutions, *across, into])])
    mel = torch.randn(1, sum(frames), BINS, 1, generator=random).permute(0, 3, 1, 2)
    distances = torch.randn(2 * max(lengths) - 1, WIDTH, generator=random)
    relative = [weight(WIDTH, WIDTH) for _ in range(LAYERS)]
    every.append(nn.ParameterList(relative))

    def attention(qkv: Any, table: Any) -> Any:
        parts = zip(*(part.split(lengths) for part in qkv.chunk(3, dim=1)), lengths, strict=True)
        found = []
        for query, key, value, length in parts:
            heads = [x.view(-1, HEADS, WIDTH // HEADS).transpose(0, 1) for x in (query, key, value)]
            middle = table.size(0) // 2
            used = table[middle - length + 1 : middle + length].view(-1, HEADS, WIDTH // HEADS)
            by_distance = heads[0] @ used.permute(1, 2, 0)
            scores = torch.baddbmm(by_distance[..., :length], heads[0], heads[1].mT)
            found.append((scores @ heads[2]).transpose(0, 1).flatten(1))
        return torch.cat(found)

    def forward() -> Any:
        kernel = convolutions[0].view(CHANNELS, 3, 3, 1).permute(0, 3, 1, 2)
        x = F.conv2d(mel, kernel, stride=2, padding=1)
        for kernel, linear in zip(convolutions[1:], across, strict=True):
            x = F.conv2d(x, kernel, stride=2, padding=1, groups=CHANNELS)
            x = F.linear(x.permute(0, 2, 3, 1), linear).permute(0, 3, 1, 2)
        x = F.linear(x.permute(0, 2, 3, 1)[0].flatten(1), into)
        for products, distance in zip(layers, relative, strict=True):
            up1, down1, qkv, out, gated, back, up2, down2 = products
            x = F.linear(F.linear(x, up1), down1)
            x = F.linear(attention(F.linear(x, qkv), F.linear(distances, distance)), out)
            x = F.linear(F.linear(x, gated)[:, :WIDTH], back)
            x = F.linear(F.linear(x, up2), down2)
        return x

    return timed(every, forward)


CONTENDERS: dict[str, Contender] = {
    "ours": ours,
    "padded": padded,
    "one by one": one_by_one,
    "floor": floor,
}


def memory(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: this benchmark needs Linux")


def work(name: str, folder: Path, samples: Sequence[int], channel: Connection) -> None:
    """A contender's process: answers with seconds and peaks of memory, or operations."""
    import logging

    import torch
    from torch.utils.flop_counter import FlopCounterMode

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    runs = CONTENDERS[name](folder, samples)
    resting = memory("VmRSS")
    while (which := channel.recv()) is not None:
        if which == "operations":
            with FlopCounterMode(display=False) as counter:
                runs[1]()
            channel.send((float(counter.get_total_flops()), 0))
            continue
        # The most so far becomes what it is now.
        Path("/proc/self/clear_refs").write_text("5")
        start = time.process_time()
        runs[which]()
        channel.send((time.process_time() - start, memory("VmHWM") - resting))


def in_turns(
    folder: Path, samples: Sequence[int], repetitions: int
) -> dict[str, dict[str, list[float]]]:
    """Contender -> figures of each quantity."""
    # As in bench_radio: nobody has another's memory settings.
    context = mp.get_context("fork")
    channels, processes = {}, []
    for name in CONTENDERS:
        channels[name], end = context.Pipe()
        process = context.Process(target=work, args=(name, folder, samples, end), daemon=True)
        process.start()
        end.close()
        processes.append(process)
    found: dict[str, dict[str, list[float]]] = {
        name: {table: [] for table in (*TABLES, "Memory", "Operations")} for name in CONTENDERS
    }
    for repetition in range(repetitions + 1):
        for which, table in enumerate(TABLES):
            for name in turns(tuple(CONTENDERS), repetition):
                channels[name].send(which)
                seconds, peak = channels[name].recv()
                # The first round warms up.
                if repetition:
                    found[name][table].append(1e3 * seconds)
                    if which == 1:
                        found[name]["Memory"].append(peak / 2**20)
    for name, channel in channels.items():
        channel.send("operations")
        found[name]["Operations"].append(channel.recv()[0] / 1e9)
    for process, channel in zip(processes, channels.values(), strict=True):
        channel.send(None)
        process.join()
    return found


def write_weights(folder: Path) -> None:
    """Random weights of the architecture that all contenders run."""
    import torch
    from transformers import ParakeetEncoder, ParakeetEncoderConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    no_dropout = ("dropout", "layerdrop", "activation_dropout", "attention_dropout")
    config = ParakeetEncoderConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        subsampling_conv_channels=CHANNELS,
        num_mel_bins=BINS,
        conv_kernel_size=KERNEL,
        attention_bias=False,
        scale_input=False,
        **dict.fromkeys(no_dropout, 0.0),
    )
    ParakeetEncoder(config).save_pretrained(folder)


UNITS = {"Memory": "MiB", "Operations": "GFLOP"}


def measure(size: Size) -> Iterator[Row]:
    """The rows of every set of clips."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_weights(folder)
        for case, samples in clip_sets(size).items():
            share = sum(samples) / (len(samples) * max(samples))
            found = in_turns(folder, samples, CASES[size][1])
            for table in (*TABLES, *UNITS):
                for peer in tuple(CONTENDERS)[1:]:
                    judged = table in ("Forward and backward", "Memory") and peer == "padded"
                    yield Row(
                        table=table,
                        line=f"{case} ({sum(samples) // RATE} s, {share:.0%} of the padded batch)",
                        column=peer,
                        ours=tuple(found["ours"][table]),
                        peer=tuple(found[peer][table]),
                        target=TARGET if judged and case == TARGET_CASE else None,
                        unit=UNITS.get(table, "ms"),
                    )


if __name__ == "__main__":
    run_benchmark(__doc__, measure, threads=THREADS)
