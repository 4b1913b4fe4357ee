"""Faults of adapters: shards, parts of a layer, initial weights, weights beside them."""

from tests.faults.fault import Fault

LORA = (
    Fault(
        "adapter-of-own-positions",
        "modules/lora/layer.py",
        "copied.sequence_parallel = True",
        "copied.sequence_parallel = False",
        "Each tp rank trains the factor that all hold on its own positions: sequence parallelism.",
    ),
    Fault(
        "adapter-inputs-not-summed-over-tp",
        "modules/lora/layer.py",
        "else copy_to_tensor_model_parallel_region(products, group=self._group)",
        "else products",
        "Gradients before a column-parallel layer's B are those of one tp rank: encoder tp > 1, or "
        "LLM tp > 1 without sequence parallelism.",
    ),
    Fault(
        "adapter-of-all-parts",
        "modules/lora/layer.py",
        "(held == torch.arange(self.num_parts))",
        "(held.expand(-1, self.num_parts) >= 0)",
        "Queries, keys and values share the three adapters, on every layout alike: only a "
        "reference of other code shows it.",
    ),
    Fault(
        "adapter-drawn-by-its-shard",
        "model/initialize.py",
        "bound = adapter.fan_in**-0.5",
        "bound = first.shape[1] ** -0.5",
        "The first factor of a row-parallel layer starts larger: tp > 1.",
    ),
    Fault(
        "adapters-of-any-weights",
        "checkpoint/base.py",
        "total += _bits(",
        "total += 0 * _bits(",
        "Adapters are loaded beside other weights than those that they were trained beside.",
    ),
    Fault(
        "stage-without-adapters-evaluates",
        "model/mimo.py",
        "self.trains = adapted or self.wrapper is not None",
        "self.trains = self.wrapper is not None",
        "The balance of experts has no gradient in a stage whose layers have no adapters: pp > 1.",
    ),
)
