"""Answers of the model to given samples, to count those that are exactly right."""

import dataclasses
from collections.abc import Sequence

import torch.distributed as dist

from megatron_mimo.data import DataConfig, DataRole, RawSample, Tokenizer, build_list_loader
from megatron_mimo.model.generate import Answer, GreedyStep
from megatron_mimo.training.runner import StepRunner
from megatron_mimo.training.step import agree

_MICRO_BATCH_SIZE = 32


def write_answers(
    runner: StepRunner,
    samples: Sequence[RawSample],
    data: DataConfig,
    role: DataRole,
    tokenizer: Tokenizer,
) -> dict[str, Answer] | None:
    """Let the model answer every sample once, greedily, spread over the lanes.

    Collective over the world; keys must be unique.

    Args:
        runner: Model, optimizer and executor of this rank.
        samples: Questions with their items; the answers are not shown to the model.
        data: Settings of the sequences and items; sequences may be shorter than in training, as
            each has one sample.
        role: Part of the data that this rank needs.
        tokenizer: Tokenizer of the texts.

    Returns:
        Answers by key on the logging rank, None elsewhere.
    """
    batch_size = min(_MICRO_BATCH_SIZE, -(-len(samples) // role.num_lanes))
    # A sequence for each: an answer grows at its end.
    batch = dataclasses.replace(
        data,
        packing_buffer_size=None,
        micro_batch_size=batch_size,
        global_batch_size=batch_size * role.num_lanes,
    )
    loader = build_list_loader(samples, batch, role, tokenizer)
    longest = max(len(tokenizer.encode(sample.answer)) for sample in samples)
    reader = runner.inputs
    if data.seq_length != runner.model.sharding.seq_length:
        reader = reader.at_length(data.seq_length)
    runner.model.train(False)
    answers: list[Answer] = []
    for _ in range(-(-len(samples) // batch.global_batch_size)):
        step = loader.next_step()
        program = GreedyStep(
            runner.model,
            step.microbatches,
            reader,
            pad_id=tokenizer.pad_id,
            eos_id=tokenizer.eos_id,
            max_new_tokens=longest + 1,
        )
        agreement = agree(runner, step, "evaluation by exact match")
        plans = [runner.executor.plan(manifest) for manifest in agreement.manifests]
        runner.executor.run(program, plans, gradients=False)
        answers += program.answers
    runner.model.train()
    return _gather(runner, answers)


def _gather(runner: StepRunner, answers: list[Answer]) -> dict[str, Answer] | None:
    topology = runner.topology
    target = topology.target
    # Tensor-parallel ranks have the same answers.
    mine = answers if target is not None and target.answers_for_replica else []
    everyone: list[list[Answer]] | None = (
        [[] for _ in range(topology.layout.world_size)] if topology.is_logging_rank else None
    )
    # Objects, so over the hosts.
    dist.gather_object(mine, everyone, dst=topology.layout.logging_rank, group=topology.control)
    if everyone is None:
        return None
    # The last global batch wraps around to the first samples: a key may come twice.
    return {answer.key: answer for rank in everyone for answer in rank}
