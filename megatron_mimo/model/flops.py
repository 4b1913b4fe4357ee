"""Exact counts of the floating-point operations of a training step.

Conventions:

- A multiply-add is two operations. Matrix products count and nothing else does, as in torch's
  `FlopCounterMode` and in the counts that papers report: norms, activations, softmax, the
  width-4 convolution of a Mamba layer and the interpolation of position embeddings do not.
- Backward is, of each product, the gradient of its weight and that of its input, as many operations
  as forward each. A frozen weight has no gradient; where nothing below trains, the input has none.
  What is computed twice to save memory (recomputation, the scores inside fused attention) counts
  once: these are model FLOPs, as in Chowdhery et al. 2022, "PaLM", appendix B.
- Attention counts pairs of positions of one segment (document, image). A causal mask hides all but
  n (n + 1) / 2 of n^2 pairs: `causal_pairs` counts those that are visible, or all, as torch's
  counter does, which does not look at masks.
- A Mamba layer is the chunked scan of Dao and Gu 2024, "Transformers are SSMs", section 6. Inside a
  chunk all pairs count, for whole chunks are multiplied.

The counts are of a whole module, whatever its layout: work that tensor-parallel ranks do in copies
counts once.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields

from megatron_mimo.encoders.radio.config import RadioConfig
from megatron_mimo.language.config import GptConfig, HybridConfig, LanguageConfig
from megatron_mimo.model.config import FreezeConfig, ModelConfig

# Of mamba-ssm's kernels, as megatron-core's `MambaMixer` calls them.
MAMBA_CHUNK = 128


@dataclass(frozen=True, slots=True)
class Flops:
    """Operations of a forward and of its backward; sums add up part by part."""

    forward: int = 0
    backward: int = 0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, times: int) -> "Flops":
        return Flops(self.forward * times, self.backward * times)

    @property
    def total(self) -> int:
        """Forward and backward."""
        return self.forward + self.backward


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What a model runs; that of microbatches, lanes and encoder ranks adds up.

    Attributes:
        sequences: Of the language model.
        document_pairs: Pairs of positions of one document, over all sequences (`causal_pairs`);
            without packing a sequence is one document.
        patches: Of all images.
        pieces: Images, or tiles of them.
        piece_pairs: Pairs of tokens of one piece, class tokens included (`all_pairs`).
        rows: That the projector makes.
    """

    sequences: int = 0
    document_pairs: int = 0
    patches: int = 0
    pieces: int = 0
    piece_pairs: int = 0
    rows: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            **{
                field.name: getattr(self, field.name) + getattr(other, field.name)
                for field in fields(self)
            }
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFlops:
    """Operations of each module.

    Attributes:
        vision: Of the vision encoder.
        projector: Of the projector.
        language: Of the language model, output layer included.
    """

    vision: Flops
    projector: Flops
    language: Flops

    @property
    def encoder(self) -> Flops:
        """Of what runs on the encoder's grid."""
        return self.vision + self.projector

    @property
    def total(self) -> int:
        """Of all modules, forward and backward."""
        return self.encoder.total + self.language.total


def all_pairs(lengths: Iterable[int]) -> int:
    """Pairs of positions inside segments of some lengths, each with itself included."""
    return sum(length * length for length in lengths)


def causal_pairs(lengths: Iterable[int], *, masked: bool = False) -> int:
    """Pairs of which a causal mask lets the later position see the earlier.

    Args:
        lengths: Of the segments; padding that is a segment of its own counts if it is given.
        masked: Count the pairs that the mask hides too.
    """
    lengths = tuple(lengths)
    return all_pairs(lengths) if masked else (all_pairs(lengths) + sum(lengths)) // 2


def text_work(documents: Iterable[int], *, sequences: int = 1, masked: bool = False) -> Work:
    """Work of the language model on sequences whose documents have some lengths."""
    return Work(sequences=sequences, document_pairs=causal_pairs(documents, masked=masked))


def image_work(lengths: Iterable[int], config: RadioConfig) -> Work:
    """Work of the encoder on pieces of some lengths in tokens (`PackedImages.lengths`)."""
    lengths = tuple(lengths)
    patches = sum(lengths) - len(lengths) * config.class_token_len
    return Work(
        patches=patches,
        pieces=len(lengths),
        piece_pairs=all_pairs(lengths),
        rows=patches // (4 if config.pixel_shuffle else 1),
    )


def model_flops(
    config: ModelConfig,
    freeze: FreezeConfig,
    work: Work,
    *,
    vocab_size: int,
    seq_length: int,
    chunk: int = MAMBA_CHUNK,
) -> ModelFlops:
    """Operations of a training step, module by module.

    Args:
        config: The architecture.
        freeze: What has no backward.
        work: What the step runs.
        vocab_size: V.
        seq_length: S.
        chunk: Positions of a chunk of a Mamba layer.
    """
    return ModelFlops(
        vision=vision_flops(config.vision, work, trains=not freeze.vision),
        projector=projector_flops(
            config, work.rows, trains=not freeze.projector, vision_trains=not freeze.vision
        ),
        language=language_flops(
            config.language,
            work,
            vocab_size=vocab_size,
            seq_length=seq_length,
            chunk=chunk,
            trains=not freeze.language,
            returns_gradients=freeze.encoder_trains,
        ),
    )


def vision_flops(config: RadioConfig, work: Work, *, trains: bool = True) -> Flops:
    """Operations of the packed vision transformer."""
    width, tokens = config.hidden_size, work.patches + work.pieces * config.class_token_len
    # Pixels have no gradient.
    patches = _product(work.patches, 3 * config.patch_dim**2, width, weight=trains, inputs=False)
    layer = _product(tokens, width, 4 * width, weight=trains, inputs=trains)
    layer += _product(tokens, width, 2 * config.ffn_hidden_size, weight=trains, inputs=trains)
    layer += _attention(work.piece_pairs, width, trains)
    return patches + layer * config.num_layers


def projector_flops(
    config: ModelConfig, rows: int, *, trains: bool = True, vision_trains: bool = True
) -> Flops:
    """Operations of the projector."""
    projector = config.projector
    inner, outer = projector.ffn_hidden_size, config.language.hidden_size
    # The norm in front has a weight to train.
    to_input = vision_trains or (trains and projector.normalization != "none")
    if projector.kind == "affine":
        return _product(rows, config.vision.row_size, outer, weight=trains, inputs=to_input)
    first = _product(rows, config.vision.row_size, inner, weight=trains, inputs=to_input)
    return first + _product(rows, inner, outer, weight=trains, inputs=trains or vision_trains)


def language_flops(
    config: LanguageConfig,
    work: Work,
    *,
    vocab_size: int,
    seq_length: int,
    chunk: int = MAMBA_CHUNK,
    trains: bool = True,
    returns_gradients: bool = True,
) -> Flops:
    """Operations of the language model.

    Args:
        config: The architecture.
        work: What it runs.
        vocab_size: V.
        seq_length: S.
        chunk: Positions of a chunk of a Mamba layer.
        trains: Whether it is not frozen.
        returns_gradients: Whether a trainable encoder wants gradients of its rows.
    """
    tokens, width = work.sequences * seq_length, config.hidden_size
    backward = trains or returns_gradients

    def linear(inputs: int, outputs: int, through: int = tokens) -> Flops:
        return _product(through, inputs, outputs, weight=trains, inputs=backward)

    output = linear(width, vocab_size)
    if isinstance(config, GptConfig):
        head = width // config.num_attention_heads
        layer = linear(width, head * (config.num_attention_heads + 2 * config.num_query_groups))
        layer += linear(head * config.num_attention_heads, width)
        layer += _attention(work.document_pairs, head * config.num_attention_heads, backward)
        layer += linear(width, 2 * config.ffn_hidden_size)
        return output + layer * config.num_layers
    inner, attended = _mamba_inner(config), config.num_attention_heads * config.kv_channels
    shared = config.moe_shared_expert_intermediate_size
    routed = tokens * config.moe_router_topk
    states = config.mamba_num_groups * config.mamba_state_dim
    layers = {
        "M": linear(width, 2 * inner + 2 * states + config.mamba_num_heads)
        + linear(inner, width)
        + _scan(config, work.sequences, seq_length, chunk, backward),
        "*": linear(width, attended + 2 * config.num_query_groups * config.kv_channels)
        + linear(attended, width)
        + _attention(work.document_pairs, attended, backward),
        "-": linear(width, 2 * config.ffn_hidden_size),
        "E": linear(width, config.num_moe_experts)
        + linear(width, 2 * config.moe_ffn_hidden_size, routed)
        + linear(width, 2 * shared),
    }
    return sum((layers[letter] for letter in config.layers), output)


def _mamba_inner(config: HybridConfig) -> int:
    return config.mamba_num_heads * config.mamba_head_dim


def _product(rows: int, inner: int, outer: int, *, weight: bool, inputs: bool) -> Flops:
    """[rows, inner] @ [inner, outer]; which gradients backward computes."""
    forward = 2 * rows * inner * outer
    return Flops(forward, forward * (weight + inputs))


def _attention(pairs: int, width: int, backward: bool) -> Flops:
    """Scores of all heads, `width` wide together, and the values they weigh; both gradients."""
    forward = 2 * 2 * pairs * width
    return Flops(forward, 2 * forward * backward)


def _scan(
    config: HybridConfig, sequences: int, seq_length: int, chunk: int, backward: bool
) -> Flops:
    """The four products of a chunked scan; the last chunk is filled up.

    Per chunk of q positions, with g groups, state size n and h heads of width p: C B^T (g q q n),
    the weighted sum over the chunk (h p q q), what it adds to the state and what it reads of the
    state before (h p q n each).
    """
    size = min(chunk, seq_length)
    in_sequence = -(-seq_length // size)
    chunks, inner, state = sequences * in_sequence, _mamba_inner(config), config.mamba_state_dim
    inside = 2 * chunks * size * size * (config.mamba_num_groups * state + inner)
    states = 2 * chunks * size * 2 * inner * state
    # The state behind a sequence's only chunk is read by nobody: of four gradients C's is left.
    to_states = 2 * states if in_sequence > 1 else states // 2
    return Flops(inside + states, (2 * inside + to_states) * backward)
