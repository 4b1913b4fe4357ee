"""Faults of stopping and going on."""

from tests.faults.fault import Fault

RESUME = (
    Fault(
        "second-moments-not-loaded",
        "checkpoint/tensors.py",
        "                for kind, values in state.tensors.items():\n",
        "                for kind, values in state.tensors.items():\n"
        '                    if reading and kind == "exp_avg_sq":\n'
        "                        continue\n",
        "Adam goes on with second moments of zero.",
    ),
    Fault(
        "expert-bias-not-saved",
        "checkpoint/tensors.py",
        "        if not isinstance(entry, ShardedTensor | ShardedTensorFactory):\n",
        "        if not isinstance(entry, ShardedTensor | ShardedTensorFactory) or (\n"
        '            name.endswith("expert_bias")\n'
        "        ):\n",
        "Experts' biases begin at zero: hybrid LLM.",
    ),
    Fault(
        "bias-correction-one-update-behind",
        "checkpoint/checkpointer.py",
        'state.optimizer.num_updates = common["optimizer"]["step"]',
        'state.optimizer.num_updates = common["optimizer"]["step"] - 1',
        "Adam's bias correction counts an update too few.",
    ),
    Fault(
        "schedule-one-step-behind",
        "checkpoint/checkpointer.py",
        'state.scheduler.num_steps = common["opt_param_scheduler"]["num_steps"]',
        'state.scheduler.num_steps = max(0, common["opt_param_scheduler"]["num_steps"] - 1)',
        "The learning rate lags by one sample.",
    ),
    Fault(
        "first-update-with-the-first-rate",
        "checkpoint/checkpointer.py",
        "        state.scheduler.step(0)\n",
        "",
        "The first update after resuming uses the learning rate of a new run.",
    ),
    Fault(
        "one-sample-skipped",
        "data/reading/stream.py",
        'return {"drawn": self._drawn}',
        'return {"drawn": self._drawn + 1}',
        "Readers go on a sample too far: mock data.",
    ),
    Fault(
        "one-sequence-read-again",
        "data/reading/readers.py",
        "self._again = position.since",
        "self._again = max(0, position.since - 1)",
        "Readers go on with the last sequence that was trained on: energon.",
    ),
    Fault(
        "crops-of-the-first-steps",
        "data/loader/stream_loader.py",
        'self._step = states[0]["step"]',
        'self._step = 0 * states[0]["step"]',
        "Random crops of the position table begin again: resuming with position crops.",
    ),
    Fault(
        "samples-of-one-lane-on-other-lanes",
        "data/reading/stream.py",
        "self._drawn = sum(drawn) // self._num_lanes",
        "self._drawn = drawn[0]",
        "Readers go on where the lanes of the old layout would: resuming on another number of "
        "lanes.",
    ),
)
