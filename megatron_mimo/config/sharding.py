"""What `--sharding fsdp2` goes with."""

from megatron_mimo.model.config import Frozen, ModelConfig
from megatron_mimo.model.reduce import ReduceConfig
from megatron_mimo.modules.families import language_adapter
from megatron_mimo.modules.lora.config import Lora
from megatron_mimo.topology import Layout

_FLAG = "--sharding fsdp2"


def check_sharding(
    reduce: ReduceConfig,
    layout: Layout,
    architecture: ModelConfig,
    frozen: Frozen,
    lora: Lora | None,
) -> None:
    """Refuse what a divided language model does not support.

    Args:
        reduce: Flags of the exchange between data-parallel ranks.
        layout: The grids of all modules.
        architecture: Architecture of every module.
        frozen: Names of the parts that do not train.
        lora: Adapters that train in place of weights; None for none.

    Raises:
        ValueError: There is such a thing; the message names its flag.
    """
    if reduce.sharding == "ddp":
        return
    target = layout.target
    if not language_adapter(architecture.target).replicas_divide:
        raise ValueError(
            f"{_FLAG}: only language models that run transformers' own forward, from --load-hf, "
            f"can be divided so, and this one has layers of megatron-core; leave it out, and raise "
            f"{target.flag('tp')} or {target.flag('pp')} where weights do not fit"
        )
    for axis in ("tp", "pp", "ep"):
        if (size := getattr(target, axis)) > 1:
            raise ValueError(
                f"{target.flag(axis)} {size} with {_FLAG}: data-parallel ranks alone divide the "
                f"language model then; set {target.flag(axis)} 1 and raise {target.flag('dp')}, or "
                f"leave --sharding out"
            )
    if lora is not None:
        raise ValueError(
            f"--lora-rank {lora.rank} with {_FLAG}: adapters train beside weights that each rank "
            f"holds whole; leave one of them out"
        )
    if not architecture.trains(target.name, frozen):
        raise ValueError(
            f"{_FLAG} with a language model that does not train, by --training-stage or "
            f"--freeze-lm: what is frozen is held whole, so there is nothing to divide; leave "
            f"--sharding out"
        )
    for flag, given in (
        ("--overlap-grad-reduce", reduce.overlap_grads),
        ("--overlap-param-gather", reduce.overlap_params),
    ):
        if given:
            raise ValueError(
                f"{flag} with {_FLAG}, which exchanges gradients and weights layer by layer "
                f"anyway: leave {flag} out"
            )
