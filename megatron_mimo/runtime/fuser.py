"""megatron-core's fuser on a GPU, for numbers of tokens that change with every microbatch.

megatron-core compiles some forty small functions with `torch.compile`, among them the ones behind
every layer and the activation of experts. What is compiled first fits one number of tokens alone;
another number compiles again, for seconds in which all other ranks wait, and after eight versions
of a function torch stops compiling it. An encoder's microbatches, and each expert's share of one,
have another number of tokens every time, so that number is left open from the start.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree


def fuse_for_any_number[**P, R](
    function: Callable[P, R], compile_: Callable[[Callable[P, R]], Callable[P, R]]
) -> Callable[P, R]:
    """Compile a function of tensors [tokens, ...] for any number of tokens.

    No tokens and a single one are still compiled by themselves, as torch always does.

    Args:
        function: Function of tensors, tuples of tensors and numbers.
        compile_: Compiler to use.
    """
    compiled = compile_(function)

    @wraps(function)
    def fused(*args: P.args, **kwargs: P.kwargs) -> R:
        for value in _pytree.tree_leaves((args, kwargs)):
            # Vectors, such as biases, have no tokens.
            if isinstance(value, Tensor) and value.dim() > 1:
                torch._dynamo.maybe_mark_dynamic(value, 0)
        return compiled(*args, **kwargs)

    return fused


@contextmanager
def fuser_of_any_number() -> Iterator[None]:
    """Give `fuse_for_any_number` to megatron-core as its fuser; import `megatron.core` inside.

    It takes `torch.compile` when it is first imported, and keeps it.
    """
    compile_ = torch.compile

    def compile_once(model: Any = None, **options: Any) -> Any:
        if model is None or options:
            return compile_(model, **options)
        return fuse_for_any_number(model, compile_)

    torch.compile = compile_once
    try:
        yield
    finally:
        torch.compile = compile_
