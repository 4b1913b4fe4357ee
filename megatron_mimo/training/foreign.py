"""Loading of weights that another program has written into a run's modules."""

import logging
import time

from megatron_mimo.model.hf.weights import Places as HfPlaces
from megatron_mimo.model.hf.weights import load_hf
from megatron_mimo.model.mimo import ModuleReplica
from megatron_mimo.model.omni.config import is_omni
from megatron_mimo.model.omni.weights import Places, describe_carried, load_omni
from megatron_mimo.modules.hf.encoder import HfEncoder
from megatron_mimo.modules.hf.language import HfLanguage
from megatron_mimo.modules.language.module import LanguageModule
from megatron_mimo.modules.radio.module import RadioModule
from megatron_mimo.optim.train_state import TrainState
from megatron_mimo.weights.folder import WeightFolder

logger = logging.getLogger(__name__)


def load_folder(state: TrainState, path: str) -> None:
    """Load the weights of a folder of transformers; each rank reads its own shards.

    Args:
        state: State of this rank, freshly built.
        path: Path to the folder.

    Raises:
        ValueError: Weights are missing, unexpected or of another shape; the message lists them.
    """
    start = time.perf_counter()
    with WeightFolder(path) as folder:
        carried = _load_omni(state, folder) if is_omni(folder) else _load_hf(state, folder)
    # The optimizer has copies of the initial weights.
    state.optimizer.refresh_main_params()
    if carried:
        logger.info("%s", carried)
    logger.info("loaded the weights of %s [ %.1f s ]", path, time.perf_counter() - start)


def _load_hf(state: TrainState, folder: WeightFolder) -> str:
    """Fill the modules of a model of transformers' own forward."""
    load_hf(folder, map(_placed, state.model.replicas))
    return ""


def _placed(replica: ModuleReplica) -> tuple[HfEncoder | HfLanguage, HfPlaces]:
    place, spec, stage = replica.groups.place, replica.groups.spec, replica.module
    # A folder's architecture has one source.
    assert isinstance(stage, HfEncoder | HfLanguage)
    return stage, HfPlaces(tp=(place.tp, spec.tp), ep=(place.ep, spec.ep))


def _load_omni(state: TrainState, folder: WeightFolder) -> str:
    """Fill the modules of a `nemotron_h_omni` model; a sentence on what is carried over."""
    model = state.model
    # A folder's architecture has one source.
    encoder = next((one for one in model.replicas if one is not model.target), None)
    language = model.target
    encoder_module = None if encoder is None else encoder.module
    language_module = None if language is None else language.module
    assert encoder_module is None or isinstance(encoder_module, RadioModule)
    assert language_module is None or isinstance(language_module, LanguageModule)
    carried = load_omni(
        folder,
        encoder=encoder_module,
        language=language_module,
        encoder_place=_place(encoder),
        language_place=_place(language),
    )
    return describe_carried(carried)


def _place(replica: ModuleReplica | None) -> Places:
    if replica is None:
        return Places()
    place, spec = replica.groups.place, replica.groups.spec
    return Places(
        tp=(place.tp, spec.tp),
        expt_tp=(place.expt_tp, spec.expt_tp),
        first_expert=place.ep * replica.module.experts_per_rank,
    )
