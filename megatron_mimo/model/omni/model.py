"""A whole multimodal model in one process, without a launcher."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_mimo.model.omni.config import OmniConfig, read_omni
from megatron_mimo.model.omni.parts import ALL, cut
from megatron_mimo.modules.adapter import ModuleConfig
from megatron_mimo.modules.language.merge import merge_rows, row_positions
from megatron_mimo.modules.radio import RadioEncoder
from megatron_mimo.modules.radio.config import RadioModuleConfig
from megatron_mimo.runtime import prepare_megatron_core, resolve_device
from megatron_mimo.weights.folder import WeightFolder

logger = logging.getLogger(__name__)

# Label of tokens that are not targets, as in transformers.
IGNORED = -100


class OmniModel(nn.Module):
    """Vision encoder, projector and language model; `load_pretrained` makes one.

    Audio and video parts of the folder are no parameters: `save_pretrained` carries them over.

    Attributes:
        config: Architecture and image processing.
        vision: Vision encoder, a `RadioVit`.
        projector: Projector from the encoder's rows to the language model's width.
        language: Language model, megatron-core's `HybridModel`.
        carried: Part that is not trained -> names of its tensors.
    """

    def __init__(
        self,
        config: OmniConfig,
        *,
        vision: RadioEncoder,
        projector: nn.Module,
        language: nn.Module,
        carried: Mapping[str, tuple[str, ...]],
        source: WeightFolder,
    ) -> None:
        super().__init__()
        self.config = config
        self.vision = vision
        self.projector = projector
        self.language = language
        self.carried = carried
        self._source = source

    def loss(self, input_ids: Tensor, labels: Tensor, images: Sequence[Tensor] = ()) -> Tensor:
        """Mean cross entropy of the next token, as transformers' model computes it.

        Args:
            input_ids: Tokens, int64 [B, S]; a row of an image replaces each image token.
            labels: Labels, int64 [B, S]: `input_ids`, not shifted, with -100 at tokens that are not
                targets, such as images, prompts and padding on the right.
            images: Images as in `logits`.

        Returns:
            A float32 scalar, on the model's device.

        Raises:
            ValueError: An input is refused as in `logits`; or labels have another shape or dtype,
                are outside the vocabulary, or have no target.
        """
        self._check_tokens(input_ids)
        self._check_labels(input_ids, labels)
        logits = self.logits(input_ids, images)
        targets = labels[:, 1:].flatten().to(logits.device)
        scores = logits[:, :-1].flatten(0, 1).float()
        return F.cross_entropy(scores, targets, ignore_index=IGNORED)

    def logits(self, input_ids: Tensor, images: Sequence[Tensor] = ()) -> Tensor:
        """Scores of the next token at every position.

        Args:
            input_ids: Tokens, int64 [B, S]; a row of an image replaces each image token.
            images: Images of all samples, in the order of their tokens, sample by sample. Each is
                float [3, H, W] in [0, 1], at its final size: sides are multiples of two patches.
                An image has one row for each square of four patches, in raster order.

        Returns:
            Logits [B, S, V], in the model's dtype.

        Raises:
            ValueError: An input has another shape, dtype or size, a token is outside the
                vocabulary, or the numbers of image tokens and of rows differ.
        """
        self._check_tokens(input_ids)
        rows = self._rows(images)
        positions = row_positions(input_ids.cpu(), self.config.image_token_id)
        found = 0 if rows is None else len(rows)
        if found != len(positions):
            raise ValueError(
                f"{len(images)} images make {found} rows, but input_ids holds {len(positions)} "
                f"image tokens ({self.config.image_token_id}): expected as many"
            )
        device = next(self.language.parameters()).device
        tokens = input_ids.to(device)
        places = torch.arange(tokens.size(1), device=device).expand_as(tokens)
        embeddings = self.language.embedding(  # type: ignore[operator]
            input_ids=tokens, position_ids=places
        )
        if rows is not None:
            embeddings = merge_rows(embeddings, rows.to(embeddings.dtype), positions.to(device))
        scores: Tensor = self.language(
            tokens, places, attention_mask=None, decoder_input=embeddings
        )
        return scores

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that transformers loads; `folder` is created where it does not exist.

        Weights have the dtypes of the folder that was loaded, which must not have changed since;
        those that training did not change are the same bit by bit. Everything else in that folder
        (audio and video weights, config.json, tokenizer, processor) is carried over.
        """
        from megatron_mimo.model.omni.weights import save_omni

        save_omni(
            folder,
            self.config,
            vision=self.vision.vit,
            projector=self.projector,
            language=self.language,
            source=self._source,
        )

    def _rows(self, images: Sequence[Tensor]) -> Tensor | None:
        """[R, H] of all images; None without any."""
        if not images:
            return None
        # Pixels are normalised in fp32, as by transformers' image processor.
        pixels = [image.float() if image.is_floating_point() else image for image in images]
        rows: Tensor = self.projector(torch.cat(self.vision.rows(pixels)))
        return rows

    def _check_tokens(self, input_ids: Tensor) -> None:
        if input_ids.dim() != 2 or input_ids.dtype != torch.int64 or not input_ids.numel():
            raise ValueError(
                f"input_ids is {input_ids.dtype} {list(input_ids.shape)}: expected int64 [B, S]"
            )
        self._check_range("input_ids", input_ids)

    def _check_labels(self, input_ids: Tensor, labels: Tensor) -> None:
        if labels.shape != input_ids.shape or labels.dtype != torch.int64:
            raise ValueError(
                f"labels is {labels.dtype} {list(labels.shape)}: expected int64 "
                f"{list(input_ids.shape)}, as input_ids"
            )
        targets = labels[:, 1:]
        targets = targets[targets != IGNORED]
        if not targets.numel():
            raise ValueError(
                f"labels holds no target: expected a token other than {IGNORED} after the first"
            )
        self._check_range("labels", targets)

    def _check_range(self, name: str, tokens: Tensor) -> None:
        least, most = int(tokens.min()), int(tokens.max())
        if least < 0 or most >= self.config.vocab_size:
            raise ValueError(
                f"{name} holds {least if least < 0 else most}: expected tokens from 0 to "
                f"{self.config.vocab_size - 1}"
            )


def load_pretrained(
    folder: str | Path, dtype: torch.dtype | None = None, device: str = "auto"
) -> OmniModel:
    """Load a folder as transformers' `NemotronH_Omni_Reasoning_V3` writes it.

    Call it before anything imports megatron-core: on a host it has to be adapted first.

    Args:
        folder: Path to a folder with config.json and safetensors; `OmniModel.save_pretrained`
            carries over its other files.
        dtype: Dtype of parameters and logits; None keeps that of the language model's embeddings.
        device: Kind of device: "auto" takes a GPU where there is one, else "cpu" or "cuda".

    Returns:
        The model in evaluation mode; it computes the same while training.

    Raises:
        ValueError: A file is missing or damaged, weights are missing or unexpected (lists them),
            or the architecture is not supported.
    """
    where = resolve_device(device)
    prepare_megatron_core(where)
    from megatron_mimo.model.omni.weights import describe_carried, load_omni

    source = WeightFolder(folder)
    # The model of this class takes images alone.
    config = read_omni(source, ALL)
    stored = cut(source).language.dtype("backbone.embeddings.weight")
    encoder, language = _build(config, dtype or stored)
    carried = load_omni(source, encoder=encoder, language=language, without=ALL)
    if carried:
        logger.info("%s: %s", source.path, describe_carried(carried))
    model = OmniModel(
        config,
        vision=RadioEncoder(config.model.part("vision"), encoder.vision),
        projector=encoder.projector,
        language=language.model,
        carried=carried,
        source=source,
    )
    return model.to(where.torch).eval()


@dataclass(frozen=True, slots=True)
class _Encoder:
    """As `load_omni` takes it."""

    architecture: RadioModuleConfig
    vision: nn.Module
    projector: nn.Module
    video: None = None


@dataclass(frozen=True, slots=True)
class _Language:
    """As `load_omni` takes it."""

    architecture: ModuleConfig
    model: nn.Module


def _build(config: OmniConfig, dtype: torch.dtype) -> tuple[_Encoder, _Language]:
    """Modules with uninitialised weights."""
    from megatron_mimo.model.omni.config import require_exportable
    from megatron_mimo.modules.hybrid.model import build_hybrid
    from megatron_mimo.modules.projector.projector import Projector
    from megatron_mimo.modules.radio.vit import RadioVit
    from megatron_mimo.runtime.solo import solo_groups, solo_world

    hybrid, groups = require_exportable(config.model), solo_groups()
    vision, projection = config.model.part("vision"), config.model.part("projector")
    with solo_world():
        vit = RadioVit(vision, groups, dtype, initialize=False)
        projector = Projector(projection, vision.row_size, hybrid.hidden_size, groups, dtype)
        language = build_hybrid(
            # Load balancing belongs to a training run, which has its own configuration.
            replace(hybrid, moe_aux_loss_coeff=0.0),
            vocab_size=config.vocab_size,
            seq_length=config.seq_length,
            pg_collection=groups,
            params_dtype=dtype,
            sequence_parallel=False,
            perform_initialization=False,
        )
    architecture = RadioModuleConfig(vision=vision, projector=projection)
    return _Encoder(architecture, vit, projector), _Language(hybrid, language)
