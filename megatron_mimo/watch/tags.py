"""Names of a run's curves, in metrics.jsonl, in TensorBoard and in services."""

from collections.abc import Mapping

METRICS_FILE = "metrics.jsonl"
VS_SAMPLES = " vs samples"
TAGS: Mapping[str, str] = {
    "lm_loss": "lm loss",
    "learning_rate": "learning-rate",
    "grad_norm": "grad-norm",
    "global_batch_size": "batch-size",
    "loss_scale": "loss-scale",
    "iteration_time_ms": "iteration-time-ms",
    "num_zeros": "num-zeros",
    "packing_fill": "packing fill",
    "lm_loss_validation": "lm loss validation",
    "lm_loss_validation_ppl": "lm loss validation ppl",
}
"""Field of metrics.jsonl -> TensorBoard tag; every other field is its own tag."""


def over_samples(scalars: Mapping[str, float]) -> dict[str, float]:
    """The same values under the tags of their curves over consumed samples."""
    return {f"{tag}{VS_SAMPLES}": value for tag, value in scalars.items()}
