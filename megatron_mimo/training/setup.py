"""From checked flags to everything that a rank trains with."""

from dataclasses import dataclass

import torch

from megatron_mimo.data import (
    DataConfig,
    DataRole,
    SampleTrace,
    StepLoader,
    Tokenizer,
    build_eval_loader,
    build_tokenizer,
    build_train_loader,
)
from megatron_mimo.model.mimo import BuildConfig
from megatron_mimo.runtime import RuntimeContext
from megatron_mimo.training.engine import build_engine, data_role
from megatron_mimo.training.loop import LoopConfig
from megatron_mimo.training.resolve import Resolved
from megatron_mimo.training.step import Engine


@dataclass(frozen=True, kw_only=True, slots=True)
class Trainer:
    """Everything that this rank trains with.

    Attributes:
        engine: Runs steps.
        loader: Training samples.
        data: How samples are read.
        role: What this rank needs of them.
        tokenizer: Of the texts.
        loop: How long to train, and when to look.
    """

    engine: Engine
    loader: StepLoader
    data: DataConfig
    role: DataRole
    tokenizer: Tokenizer
    loop: LoopConfig

    def eval_loader(self) -> StepLoader:
        """The val split from its start."""
        return build_eval_loader(self.data, self.role, self.tokenizer)


def build_trainer(resolved: Resolved, context: RuntimeContext) -> Trainer:
    """Build the model and the loaders of this rank. Collective over the world.

    Raises:
        ValueError: The tokenizer or the dataset is missing or unfit, or sizes do not divide.
    """
    model, data = resolved.config.model, resolved.data
    tokenizer = build_tokenizer(model.tokenizer_model, model.image_token)
    role = data_role(resolved.layout, context.rank)
    trace = None
    if data.sample_trace_dir is not None:
        role_name = resolved.layout.describe_rank(context.rank)
        trace = SampleTrace(data.sample_trace_dir, context.rank, role_name)
    # Data first: a wrong path should not cost the time to build a model.
    loader = build_train_loader(data, role, tokenizer, trace=trace)
    engine = build_engine(
        resolved.layout,
        resolved.architecture,
        resolved.freeze,
        BuildConfig(
            params_dtype=torch.bfloat16 if model.bf16 else torch.float32,
            seed=resolved.config.training.seed,
            init=model.init,
            vocab_size=tokenizer.vocab_size,
            seq_length=model.seq_length,
            sequence_parallel=bool(resolved.config.grids.sequence_parallel),
            execution=resolved.execution,
        ),
        resolved.adam,
        resolved.schedule,
        run_ahead=resolved.config.grids.encoder_run_ahead,
        check_bridge=resolved.config.grids.check_bridge,
        image_token_id=tokenizer.image_token_id,
        validate_data=resolved.config.data.validate_data_alignment,
        device=context.device,
    )
    training, watching = resolved.config.training, resolved.config.watching
    loop = LoopConfig(
        train_iters=training.train_iters,
        global_batch_size=resolved.global_batch_size,
        exit_interval=training.exit_interval,
        log_interval=watching.log_interval,
        eval_interval=training.eval_interval,
        eval_iters=training.eval_iters,
    )
    return Trainer(
        engine=engine, loader=loader, data=data, role=role, tokenizer=tokenizer, loop=loop
    )
