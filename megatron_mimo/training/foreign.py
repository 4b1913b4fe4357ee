"""Weights that another program has written, into a run's modules."""

import logging
import time

from megatron_mimo.checkpoint.checkpointer import TrainedParts
from megatron_mimo.model.mimo import ModuleReplica
from megatron_mimo.model.modules import EncoderModule, LanguageModule
from megatron_mimo.omni.weights import Places, describe_carried, load_omni
from megatron_mimo.weights.folder import WeightFolder

logger = logging.getLogger(__name__)


def load_folder(parts: TrainedParts, path: str) -> None:
    """Begin with the weights of a `nemotron_h_omni` folder; each rank reads what it owns.

    Args:
        parts: Freshly built.
        path: The folder.

    Raises:
        ValueError: Weights are missing, unexpected or of another shape; lists them.
    """
    start = time.perf_counter()
    encoder, language = parts.model.encoder, parts.model.language
    encoder_module = None if encoder is None else encoder.module
    language_module = None if language is None else language.module
    assert not isinstance(encoder_module, LanguageModule)
    assert not isinstance(language_module, EncoderModule)
    with WeightFolder(path) as folder:
        carried = load_omni(
            folder,
            encoder=encoder_module,
            language=language_module,
            encoder_place=_place(encoder),
            language_place=_place(language),
        )
    # The optimizer copied what the weights were initialised with.
    parts.optimizer.refresh_main_params()
    if described := describe_carried(carried):
        logger.info("%s", described)
    logger.info("loaded the weights of %s [ %.1f s ]", path, time.perf_counter() - start)


def _place(replica: ModuleReplica | None) -> Places:
    if replica is None:
        return Places()
    place, spec = replica.groups.place, replica.groups.spec
    return Places(
        tp=(place.tp, spec.tp),
        expt_tp=(place.expt_tp, spec.expt_tp),
        first_expert=place.ep * replica.module.experts_per_rank,
    )
