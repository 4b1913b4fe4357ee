"""Steps of training from a folder on ranks, and the same steps by transformers and torch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from megatron_mimo.media.items import ItemWords
from megatron_mimo.media.processors import ProcessedImages
from megatron_mimo.topology import Layout
from tests.hf.models import IMAGE, VOCAB, build, image, joined

if TYPE_CHECKING:
    from torch import Tensor

LENGTH = 48
LR, DECAY, BETAS, EPS, CLIP = 1e-3, 0.1, (0.9, 0.95), 1e-5, 1.0
# Numbers of the images of each sample.
CHOSEN = ((0,), (1,), (), (0, 2), (3,), (2,), (1,))


@dataclass(frozen=True)
class Text:
    """A sample: tokens int64 [n + 1], which of them are targets, and numbers of its images."""

    key: str
    tokens: Any
    targets: Any
    images: tuple[int, ...]


def samples(name: str, count: int = len(CHOSEN)) -> list[Text]:
    """Samples of several lengths with no, one or two images."""
    import numpy as np

    found = []
    for index in range(count):
        random = np.random.default_rng(40 + index)
        images = CHOSEN[index % len(CHOSEN)]
        rows = [image(name, number)[1] for number in images]
        if sum(rows) + 10 > LENGTH:
            images, rows = images[:1], rows[:1]
        pieces, targets = [random.integers(3, 240, 3)], [np.zeros(3, dtype=bool)]
        for number in rows:
            pieces += [np.full(number, IMAGE), random.integers(3, 240, 2)]
            targets += [np.zeros(number, dtype=bool), np.ones(2, dtype=bool)]
        tail = 4 + index
        pieces.append(random.integers(3, 240, tail))
        targets.append(np.ones(tail, dtype=bool))
        found.append(
            Text(f"sample-{index}", np.concatenate(pieces), np.concatenate(targets), images)
        )
    return found


@dataclass(frozen=True)
class One:
    """An image of a sample."""

    number: int
    rows: int


@dataclass(frozen=True)
class Images:
    """Images of a family, as the loader takes them."""

    name: str
    words: Any = field(default_factory=lambda: ItemWords(noun="image", article="an"))
    placeholder: str = "<image>"
    tags: tuple[str, str] = ("", "")
    endings: tuple[str, ...] = ()
    feeds: str | None = None
    item_type: Any = One
    packed_type: Any = ProcessedImages

    def facts(self, item: One) -> Mapping[str, list[int]]:
        """Integers of an image that the language model reads."""
        return image(self.name, item.number)[2]

    def pack(self, items: Any, seeds: Any) -> ProcessedImages | None:
        """All images in one call."""
        if not items:
            return None
        found = [image(self.name, item.number) for item in items]
        arguments = joined([one[0] for one in found])
        return ProcessedImages(
            names=tuple(arguments),
            tensors=tuple(arguments.values()),
            lengths=tuple(4 * one[1] for one in found),
            rows=tuple(one[1] for one in found),
            places=tuple(range(len(found))),
        )

    def without_augmentation(self) -> "Images":
        """Itself."""
        return self


@dataclass(frozen=True)
class Words:
    """As much of a tokenizer as the loader asks."""

    pad_id: int = 0
    placeholder_ids: Mapping[str, int] = field(default_factory=lambda: {"encoder": IMAGE})


class Joined:
    """A stream whose sequences have several documents each, taken from a stream of samples.

    Args:
        stream: Stream of single samples.
        documents: Number of documents of a sequence.
    """

    def __init__(self, stream: Any, documents: int) -> None:
        self._stream, self._documents = stream, documents

    def __next__(self) -> Any:
        from megatron_mimo.data.samples.sample import Drawn

        drawn = [next(self._stream).documents for _ in range(self._documents)]
        return Drawn(documents=tuple(one for documents in drawn for one in documents))


class Steps:
    """A loader of samples in their order, over and over.

    Args:
        name: Name of the family.
        chosen: Layout of the ranks.
        rank: This rank.
        batch: Number of samples of a step.
        micro: Number of sequences of a microbatch.
        documents: Number of samples of a sequence; above 1 sequences are packed.
        length: Number of tokens of a sequence.
    """

    def __init__(
        self,
        name: str,
        chosen: Layout,
        rank: int,
        *,
        batch: int,
        micro: int = 1,
        documents: int = 1,
        length: int = LENGTH,
    ) -> None:
        from megatron_mimo.data import DataConfig, data_role
        from megatron_mimo.data.loader.stream_loader import StreamLoader
        from megatron_mimo.data.reading.stream import IndexedStream
        from megatron_mimo.data.samples.sample import EncodedSample

        # A lane takes its documents one after the other, as it takes samples of one microbatch.
        singles = DataConfig(
            seed=1,
            seq_length=length,
            micro_batch_size=micro * documents,
            global_batch_size=batch,
            inputs={"encoder": Images(name)},
        )
        config = singles
        if documents > 1:
            config = replace(
                singles,
                provider="energon",  # Others do not pack; nothing is read from the path.
                path="dataset",
                micro_batch_size=1,
                global_batch_size=batch // documents,
                packing_buffer_size=documents,
            )
        texts = samples(name)

        def make(index: int) -> EncodedSample:
            text = texts[index % len(texts)]
            items = tuple(One(number, image(name, number)[1]) for number in text.images)
            return EncodedSample(
                key=text.key,
                tokens=text.tokens,
                targets=text.targets,
                items={"encoder": items} if items else {},
            )

        role = data_role(chosen, rank)
        streams: dict[int, Any] = {
            lane: IndexedStream(make, lane, role.num_lanes, singles) for lane in role.lanes
        }
        if documents > 1:
            streams = {lane: Joined(stream, documents) for lane, stream in streams.items()}
        self._loader = StreamLoader(streams, config, role, Words())

    def next_step(self) -> Any:
        """The next step."""
        return self._loader.next_step()


def arguments_of(name: str, text: Text, model: Any) -> dict[str, Any]:
    """Arguments of transformers' forward for one sample, labels included."""
    import torch

    ids = torch.from_numpy(text.tokens)[None]
    labels = ids.clone()
    labels[:, ~torch.from_numpy(text.targets)] = -100
    arguments: dict[str, Any] = {"input_ids": ids, "labels": labels, "use_cache": False}
    if not name.startswith(("mistral3", "llava")):
        arguments["mm_token_type_ids"] = (ids == IMAGE).long()
    if text.images:
        arguments |= joined([image(name, number)[0] for number in text.images])
    return arguments


def oracle(
    name: str,
    steps: int,
    batch: int,
    *,
    frozen: str = "",
    model: Any = None,
    keep: bool = False,
    **changes: Any,
) -> "tuple[list[list[float]], dict[str, Tensor], Any]":
    """Loss and norm of each step by transformers and torch's AdamW.

    Args:
        name: Name of the family.
        steps: Number of steps.
        batch: Number of samples of a step.
        frozen: Beginning of the names of weights that do not train; "" for none.
        model: Model to train; None for that of `build`.
        keep: Whether to train only what the model says.
        changes: Changes of its `text_config`.

    Returns:
        The curve, every gradient of the first step before clipping, and the trained model.
    """
    import torch

    model = build(name, **changes) if model is None else model
    trains = {}
    for path, parameter in model.named_parameters():
        if frozen and path.startswith(frozen):
            parameter.requires_grad_(False)
        elif parameter.requires_grad or not keep:
            trains[path] = parameter
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trains.values() if p.dim() > 1], "weight_decay": DECAY},
            {"params": [p for p in trains.values() if p.dim() <= 1], "weight_decay": 0.0},
        ],
        lr=LR,
        betas=BETAS,
        eps=EPS,
    )
    texts, points, first = samples(name), [], {}
    for step in range(steps):
        chosen = [texts[(step * batch + i) % len(texts)] for i in range(batch)]
        whole = sum(int(text.targets[1:].sum()) for text in chosen)
        total = 0.0
        for text in chosen:
            loss = model(**arguments_of(name, text, model)).loss
            share = loss * int(text.targets[1:].sum()) / whole
            share.backward()
            total += share.item()
        if step == 0:
            first = {p: w.grad.clone() for p, w in trains.items() if w.grad is not None}
        norm = torch.nn.utils.clip_grad_norm_(list(trains.values()), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        points.append([total, norm.item()])
    return points, first, model


def called(function: Any, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
    """A function's result; `run_ranks` passes arguments by position alone."""
    return function(*arguments, **named)


def runner_of(
    folder: str,
    chosen: Layout,
    *,
    frozen: Any = (),
    overrides: Any = (),
    dtype: str = "float32",
    recompute: bool = False,
    length: int = LENGTH,
    lora: Any = None,
    sharding: str = "ddp",
) -> Any:
    """This rank's runner with the weights of a folder.

    Args:
        folder: Folder of the weights.
        chosen: Layout of the ranks.
        frozen: Names of parts that do not train.
        overrides: Values of `--override`.
        dtype: Dtype of the run.
        recompute: Whether the language model computes its layers again in the backward.
        length: Number of tokens of a sequence.
        lora: Adapters in place of weights, a `Lora`.
        sharding: Value of `--sharding`.
    """
    import torch

    from megatron_mimo.config.model_file import read_architecture, read_folder
    from megatron_mimo.model.config import Frozen, ReduceConfig
    from megatron_mimo.model.mimo import BuildConfig
    from megatron_mimo.modules.language import ExecutionConfig
    from megatron_mimo.optim.config import AdamConfig, LossScaleConfig, ScheduleConfig
    from megatron_mimo.runtime import Device
    from megatron_mimo.training.foreign import load_folder
    from megatron_mimo.training.runner import StepConfig, build_runner

    found = read_folder("hf", folder)
    assert found is not None
    runner = build_runner(
        chosen,
        read_architecture("hf", None, overrides, found),
        Frozen(frozen),
        BuildConfig(
            params_dtype=getattr(torch, dtype),
            execution=ExecutionConfig(recompute_granularity="full" if recompute else None),
            seed=1,
            init="megatron",
            vocab_size=found.vocab_size,
            seq_length=length,
            sequence_parallel=False,
            lora=lora,
            reduce=ReduceConfig(sharding=sharding),
        ),
        AdamConfig(
            lr=LR,
            min_lr=0.0,
            weight_decay=DECAY,
            beta1=BETAS[0],
            beta2=BETAS[1],
            eps=EPS,
            clip_grad=CLIP,
            # Low enough for no update to be left out.
            loss_scale=LossScaleConfig(initial=2.0**6) if dtype == "float16" else None,
        ),
        ScheduleConfig(style="constant", warmup_samples=0, decay_samples=1000),
        StepConfig(placeholder_ids={"encoder": IMAGE}),
        device=Device("cpu"),
    )
    load_folder(runner, folder)
    return runner


def curve(
    folder: str, name: str, chosen: Layout, steps: int, batch: int, **build: Any
) -> list[list[float]]:
    """(loss, gradient norm) of each step, on every rank; other arguments are `runner_of`'s."""
    import torch.distributed as dist

    from megatron_mimo.training.step import train_step

    runner = runner_of(folder, chosen, **build)
    loader = Steps(name, chosen, dist.get_rank(), batch=batch)
    points = []
    for step in range(steps):
        metrics = train_step(runner, loader, step + 1, batch)
        points.append([metrics.agreed_loss, metrics.update.grad_norm])
    return points


def losses_without_rows(folder: str, name: str, chosen: Layout, batch: int) -> tuple[float, float]:
    """Loss of the first step's samples, and the same with zeros for the encoder's rows."""
    import torch.distributed as dist

    from megatron_mimo.modules.hf.encoder import HfEncoder
    from megatron_mimo.training.step import evaluate

    losses = []
    for kept in (1.0, 0.0):
        runner = runner_of(folder, chosen)
        for replica in runner.model.replicas:
            if isinstance(replica.module, HfEncoder):
                replica.module.register_forward_hook(lambda *found, kept=kept: found[-1] * kept)
        loader = Steps(name, chosen, dist.get_rank(), batch=batch)
        losses.append(evaluate(runner, loader, 1).item())
    return losses[0], losses[1]


def heads(folder: str, name: str, chosen: Layout, batch: int) -> dict[str, Any]:
    """What a rank has of embedding and output layer, after a step.

    Returns:
        "marks": name of each such weight -> whether it is `shared`, and `shared_embedding`;
        "point": loss and norm of the step; "weight": sum of the weight's elements.
    """
    import torch.distributed as dist

    from megatron_mimo.training.step import train_step

    runner = runner_of(folder, chosen)
    metrics = train_step(runner, Steps(name, chosen, dist.get_rank(), batch=batch), 1, batch)
    found = {
        path: weight
        for replica in runner.model.replicas
        for path, weight in replica.module.named_parameters()
        if path.endswith(("embed_tokens.weight", "lm_head.weight"))
    }
    return {
        "marks": {
            path: (getattr(one, "shared", False), getattr(one, "shared_embedding", False))
            for path, one in found.items()
        },
        "point": [metrics.agreed_loss, metrics.update.grad_norm],
        "weight": [one.double().sum().item() for one in found.values()],
    }


def first_gradients(
    folder: str,
    name: str,
    chosen: Layout,
    batch: int,
    *,
    frozen: Any = (),
    overrides: Any = (),
    length: int = LENGTH,
    build: Mapping[str, Any] = MappingProxyType({}),
    **loader: Any,
) -> "dict[str, Tensor]":
    """Whole gradients of the first step of this rank's weights, by their names in transformers.

    Args:
        folder: Folder of the weights.
        name: Name of the family.
        chosen: Layout of the ranks.
        batch: Number of samples of the step.
        frozen: Names of parts that do not train.
        overrides: Values of `--override`.
        length: Number of tokens of a sequence.
        build: Other arguments of `runner_of`.
        loader: Other arguments of `Steps`.
    """
    import torch.distributed as dist

    from megatron_mimo.model.program import MimoStep
    from megatron_mimo.optim.mimo_optimizer import finalize_gradients
    from megatron_mimo.training.step import agree

    runner = runner_of(folder, chosen, frozen=frozen, overrides=overrides, length=length, **build)
    rank = dist.get_rank()
    data = Steps(name, chosen, rank, batch=batch, length=length, **loader).next_step()
    agreement = agree(runner, data, "the first step")
    for replica in runner.model.replicas:
        replica.zero_grad()
    program = MimoStep(runner.model, runner.inputs.of(data))
    plans = [runner.executor.plan(manifest) for manifest in agreement.manifests]
    runner.executor.run(program, plans, gradients=True)
    finalize_gradients(runner.model, agreement.target_tokens)
    return dict(_gradients(runner))


def _gradients(runner: Any) -> "Iterator[tuple[str, Tensor]]":
    """Gradients after the sum over replicas, put together over tensor and expert ranks."""
    import torch

    from megatron_mimo.weights.shards import is_expert

    for replica in runner.model.replicas:
        if replica.sharded is not None:
            yield from _parts_together(replica.sharded)
        pg = replica.groups.pg_collection
        for name, parameter, gradient in summed_gradients(replica):
            if is_expert(parameter) and pg.ep.size() > 1:
                gradient = _together(gradient, 0, pg.ep, 1)
            yield name.removeprefix("model."), gradient
    assert torch.is_grad_enabled()


def _parts_together(sharded: Any) -> "Iterator[tuple[str, Tensor]]":
    """Gradients of a divided module, whole on every rank."""
    from torch.distributed.tensor import DTensor

    for weight in sharded.weights:
        gradient = weight.parameter.grad
        whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()
        yield weight.name.removeprefix("model."), whole


def summed_gradients(replica: Any) -> "Iterator[tuple[str, Any, Tensor]]":
    """Name, parameter, and gradient after the sum over replicas, put together over tensor ranks.

    Each data-parallel rank holds a part of the summed gradients; the buffers are summed again from
    those parts.
    """
    import torch.distributed as dist

    from megatron_mimo.weights.shards import sharded_axis

    if replica.ddp is None:
        return
    pg = replica.groups.pg_collection
    for group, buffers in (
        (pg.dp_cp, replica.ddp.buffers),
        (pg.expt_dp, replica.ddp.expert_parallel_buffers),
    ):
        for buffer in buffers:
            size, rank = group.size(), group.rank()
            for bucket in buffer.buckets:
                whole = bucket.grad_data
                part = whole.view(size, -1)[rank].clone()
                dist.all_gather_into_tensor(whole, part, group=group)
    for name, parameter in replica.module.named_parameters():
        if not parameter.requires_grad:
            continue
        gradient = parameter.main_grad.clone()
        axis = sharded_axis(parameter)
        if axis is not None and pg.tp.size() > 1:
            gradient = _together(gradient, axis, pg.tp, parameter.partition_stride)
        yield name, parameter, gradient


def _together(part: "Tensor", axis: int, group: Any, stride: int) -> "Tensor":
    import torch
    import torch.distributed as dist

    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    pieces = [one.chunk(stride, axis) for one in parts]
    return torch.cat([piece[i] for i in range(stride) for piece in pieces], axis)


assert VOCAB > IMAGE
