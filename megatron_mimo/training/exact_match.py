"""How many answers the model writes exactly right."""

import dataclasses
from collections.abc import Sequence

import torch.distributed as dist

from megatron_mimo.data import DataConfig, DataRole, RawSample, Tokenizer, build_list_loader
from megatron_mimo.model.generate import Answer, GreedyStep
from megatron_mimo.training.step import Engine, agree

_MICRO_BATCH_SIZE = 32


def write_answers(
    engine: Engine,
    samples: Sequence[RawSample],
    data: DataConfig,
    role: DataRole,
    tokenizer: Tokenizer,
) -> dict[str, Answer] | None:
    """Let the model answer every sample once, greedily, spread over the lanes.

    Collective over the world; keys must be unique.

    Args:
        engine: This rank's parts.
        samples: Questions with images; the answers are not shown to the model.
        data: Sequence length and image sizes.
        role: What this rank needs of the data.
        tokenizer: Of the texts.

    Returns:
        Answers by key on the logging rank, None elsewhere.
    """
    batch_size = min(_MICRO_BATCH_SIZE, -(-len(samples) // role.num_lanes))
    batch = dataclasses.replace(
        data, micro_batch_size=batch_size, global_batch_size=batch_size * role.num_lanes
    )
    loader = build_list_loader(samples, batch, role, tokenizer)
    longest = max(len(tokenizer.encode(sample.answer)) for sample in samples)
    engine.model.train(False)
    answers: list[Answer] = []
    for _ in range(-(-len(samples) // batch.global_batch_size)):
        step = loader.next_step()
        program = GreedyStep(
            engine.model,
            step.microbatches,
            engine.image_token_id,
            pad_id=tokenizer.pad_id,
            eos_id=tokenizer.eos_id,
            max_new_tokens=longest + 1,
        )
        agreement = agree(engine, step, "evaluation by exact match")
        crossings = [engine.executor.plan(manifest) for manifest in agreement.manifests]
        engine.executor.run(program, crossings, gradients=False)
        answers += program.answers
    engine.model.train()
    return _gather(engine, answers)


def _gather(engine: Engine, answers: list[Answer]) -> dict[str, Answer] | None:
    llm = engine.topology.llm
    if llm is None or llm.place.tp != 0:
        return None
    lanes: list[list[Answer]] | None = (
        [[] for _ in range(llm.spec.dp)] if llm.place.dp == 0 else None
    )
    group = llm.pg_collection.dp
    dist.gather_object(answers, lanes, dst=llm.spec.rank(), group=group)
    if lanes is None:
        return None
    # The last global batch wraps around to the first samples: a key may come twice.
    return {answer.key: answer for lane in lanes for answer in lane}
