"""AdamW over the weights that data-parallel ranks divide among them."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_mimo.model.fully_sharded import FullySharded, HeldWeight
from megatron_mimo.optim.config import AdamConfig
from megatron_mimo.optim.param_state import MOMENTS, ParamState


class ShardedAdam:
    """torch's AdamW on the parts of weights that this rank holds.

    It has the methods that `MimoOptimizer` calls on megatron-core's distributed optimizer, and
    decays the same weights: those of two dimensions and more that are not biases.

    Args:
        sharded: The divided module.
        config: Settings of AdamW.
    """

    def __init__(self, sharded: FullySharded, config: AdamConfig) -> None:
        self._sharded = sharded
        self._weights = [weight for weight in sharded.weights if weight.owned]
        groups: list[dict[str, Any]] = [
            {
                "params": [w.main for w in self._weights if _decays(w) == decays],
                "wd_mult": float(decays),
                "weight_decay": config.weight_decay * decays,
            }
            for decays in (True, False)
        ]
        self._adam = torch.optim.AdamW(
            groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps
        )
        for group in self._adam.param_groups:
            group |= {"max_lr": config.lr, "min_lr": config.min_lr, "default_config": True}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Parameter groups, for the schedule of the learning rate."""
        return self._adam.param_groups

    def prepare_grads(self) -> None:
        """Give each weight its gradient, zero for one that the loss did not depend on."""
        for weight in self._weights:
            gradient = weight.gradient
            weight.main.grad = torch.zeros_like(weight.main) if gradient is None else gradient

    def get_parameters(self) -> list[Tensor]:
        """The weights [...] that this rank updates, float32, each with its gradient."""
        return [weight.main for weight in self._weights]

    def get_grads_for_grad_norm(self) -> list[Tensor]:
        """Gradients [...], float32, of which every element is on one rank alone."""
        return [weight.main.grad for weight in self._weights if weight.main.grad is not None]

    def step_with_ready_grads(self) -> None:
        """Update the weights; collective over the data-parallel ranks."""
        self._adam.step()
        for weight in self._weights:
            weight.main.grad = None
        self._sharded.publish()

    def reload_model_params(self) -> None:
        """Begin from the weights that were loaded into the module."""
        self._sharded.take_values()

    def param_states(self) -> dict[int, ParamState]:
        """The state of each weight, by the address of its values."""
        self._allocate()
        found = {}
        for weight in self._weights:
            state = self._adam.state[weight.main]
            tensors = {"fp32_param": weight.main} | {name: state[name] for name in MOMENTS}
            found[weight.values.data_ptr()] = ParamState(
                0, weight.main.numel(), {name: one.view(-1) for name, one in tensors.items()}
            )
        return found

    def state_tensors(self) -> Iterator[Tensor]:
        """Moments, and main weights that are beside those of the model, float32 [...]."""
        for state in self._adam.state.values():
            yield from (value for name, value in state.items() if name in MOMENTS)
        yield from (weight.main for weight in self._weights if weight.values is not weight.main)

    def set_step(self, step: int) -> None:
        """Set the number of updates that the bias correction counts from."""
        self._allocate()
        for state in self._adam.state.values():
            state["step"] = torch.full_like(state["step"], step)

    def _allocate(self) -> None:
        for weight in self._weights:
            state = self._adam.state[weight.main]
            for name in MOMENTS:
                if name not in state:
                    state[name] = torch.zeros_like(weight.main)
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32)


def _decays(weight: HeldWeight) -> bool:
    return weight.dimensions > 1 and not weight.name.endswith(".bias")
