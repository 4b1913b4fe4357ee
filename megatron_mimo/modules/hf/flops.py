"""Operations of models of transformers, from the shapes of their weights."""

from functools import cache

from torch import nn

from megatron_mimo.modules.adapter import FlopsContext
from megatron_mimo.modules.flops import Flops, TextWork, attention, product
from megatron_mimo.modules.hf.config import HfEncoderConfig, HfLanguageConfig
from megatron_mimo.modules.hf.costs import layer_shapes, linear_shapes
from megatron_mimo.modules.hf.cut import meta_model

# Products of keys, values and queries with the state of linear attention, for each element of it:
# the correction of the delta rule, the update and the reading (Yang et al. 2024, "Gated Delta
# Networks", equation 10).
_STATE_PRODUCTS = 3


def language_flops(config: HfLanguageConfig, work: TextWork, context: FlopsContext) -> Flops:
    """Number of operations of some work of the language model, output layer included.

    Args:
        config: Architecture of the module.
        work: Work of the language model.
        context: Sizes, and the parts that train.
    """
    tokens = work.sequences * context.seq_length
    backward = context.trains("language") or context.rows_train
    linear = context.linear("language", backward=backward)
    total = linear("", tokens, config.hidden_size, context.vocab_size)
    for shape in layer_shapes(config.description):
        # A product with n weights for each token, however they are arranged.
        total += product(tokens, 1, shape.weights, weight=linear.weight, inputs=backward)
        pairs = shape.pairs(work.document_pairs, tokens)
        total += attention(pairs, shape.attention, backward=backward)
        state = 2 * _STATE_PRODUCTS * tokens * shape.state
        total += Flops(state, 2 * state * backward)
    if linear.lora is not None:
        for path, (inner, outer) in linear_shapes(config.description).items():
            if path.rpartition(".")[2] in linear.lora.layers:
                rank = linear.lora.rank
                total += product(tokens, inner, rank, weight=True, inputs=backward)
                total += product(tokens, rank, outer, weight=True, inputs=True)
    return total


def encoder_flops(
    config: HfEncoderConfig, tokens: int, pairs: int, rows: int, context: FlopsContext
) -> Flops:
    """Number of operations of encoder and projector.

    Args:
        config: Architecture of the module.
        tokens: Number of tokens of the encoder.
        pairs: Number of pairs of tokens of one image.
        rows: Number of rows.
        context: Sizes, and the parts that train.
    """
    tower, projector, width = _weights(config.vision.description)
    trains = {part: part not in context.frozen for part in ("vision", "projector")}
    vision = product(tokens, 1, tower, weight=trains["vision"], inputs=trains["vision"])
    vision += attention(pairs, width, backward=trains["vision"])
    return vision + product(rows, 1, projector, weight=trains["projector"], inputs=trains["vision"])


@cache
def _weights(description: str) -> tuple[int, int, int]:
    """Weights of a model's encoder and of its projector that tokens meet; widths of its heads."""
    from megatron_mimo.modules.hf.config import family_from

    model, family = meta_model(description), family_from(description)
    language = model.get_submodule("model.language_model")
    inside = {id(module) for module in language.modules()}
    sizes = {True: 0, False: 0}
    for name, module in model.model.named_modules():
        if id(module) in inside or not isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
            continue
        mine = any(f"model.{name}".startswith(path) for path in family.projector)
        sizes[mine] += module.weight.numel()
    vision = model.config.vision_config
    heads = vision.to_dict()
    depth = heads.get("num_hidden_layers") or heads["depth"]
    return sizes[False], sizes[True], int(depth) * int(heads["hidden_size"])
