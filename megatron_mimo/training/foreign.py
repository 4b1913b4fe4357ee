"""Loading of weights that another program has written into a run's modules."""

import logging
import time
from collections.abc import Callable, Collection

from megatron_mimo.model.config import ModelConfig
from megatron_mimo.model.hf.weights import Places as HfPlaces
from megatron_mimo.model.hf.weights import load_hf
from megatron_mimo.model.mimo import ModuleReplica
from megatron_mimo.model.omni.config import is_omni
from megatron_mimo.model.omni.lora import peft_layers, peft_tables
from megatron_mimo.model.omni.parts import Optional
from megatron_mimo.model.omni.weights import Places, describe_carried, load_omni
from megatron_mimo.modules.hf.encoder import HfEncoder
from megatron_mimo.modules.hf.language import HfLanguage
from megatron_mimo.modules.language.module import LanguageModule
from megatron_mimo.modules.lora.exchange import fill_lora
from megatron_mimo.modules.parakeet.module import ParakeetModule
from megatron_mimo.modules.radio.module import RadioModule
from megatron_mimo.modules.stage import ModuleStage
from megatron_mimo.optim.train_state import TrainState
from megatron_mimo.weights.folder import WeightFolder
from megatron_mimo.weights.peft import read_peft

logger = logging.getLogger(__name__)


def load_folder(state: TrainState, path: str, without: Collection[Optional] = ()) -> None:
    """Load the weights of a folder of transformers; each rank reads its own shards.

    Args:
        state: State of this rank, freshly built.
        path: Path to the folder.
        without: Parts of the folder that the model leaves out.

    Raises:
        ValueError: Weights are missing, unexpected or of another shape; the message lists them.
    """
    start = time.perf_counter()
    with WeightFolder(path) as folder:
        carried = _load_omni(state, folder, without) if is_omni(folder) else _load_hf(state, folder)
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


def _load_omni(state: TrainState, folder: WeightFolder, without: Collection[Optional]) -> str:
    """Fill the modules of a `nemotron_h_omni` model; a sentence on what is carried over."""
    encoder, encoder_place = _held(state, RadioModule, lambda stage: stage.architecture.images)
    video, video_place = _held(state, RadioModule, lambda stage: not stage.architecture.images)
    audio, audio_place = _held(state, ParakeetModule)
    language, language_place = _held(state, LanguageModule)
    carried = load_omni(
        folder,
        encoder=encoder,
        video_encoder=video,
        audio=audio,
        language=language,
        without=without,
        encoder_place=encoder_place,
        video_place=video_place,
        audio_place=audio_place,
        language_place=language_place,
    )
    return describe_carried(carried)


def _held[S: ModuleStage](
    state: TrainState, kind: type[S], fits: Callable[[S], bool] = lambda _: True
) -> tuple[S | None, Places]:
    """The stage of a family that this rank holds and that fits, and its positions."""
    for replica in state.model.replicas:
        if isinstance(replica.module, kind) and fits(replica.module):
            return replica.module, _place(replica)
    return None, Places()


def load_adapters(state: TrainState, architecture: ModelConfig, path: str) -> None:
    """Load adapters that peft has written; each rank keeps its own shards.

    Args:
        state: State of this rank, freshly built, with adapters.
        architecture: Architecture of every module.
        path: Path to the folder.

    Raises:
        ValueError: The folder is damaged, or has other adapters than the run; the message names
            the first.
    """
    flag, lora = f"--load-lora {path}", state.model.lora
    assert lora is not None
    try:
        tables = peft_tables(architecture, text_alone=not state.topology.layout.sources)
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from error
    found = read_peft(path)
    for what, stored, wanted in (
        ("--lora-rank", found.rank, lora.rank),
        ("--lora-alpha", found.alpha, lora.alpha),
        ("--lora-rslora", found.rslora, lora.rslora),
    ):
        if stored != wanted:
            raise ValueError(f"{flag} has {what} {stored}, this run {wanted}: give the same")
    layers = peft_layers(architecture, lora, tables)
    faults = [f"no adapter of {layer}" for layer in sorted(layers - found.tensors.keys())]
    faults += [f"an adapter of {layer}" for layer in sorted(found.tensors.keys() - layers)]
    if faults:
        more = f", and {len(faults) - 1} more such layers" if len(faults) > 1 else ""
        raise ValueError(
            f"{flag} has {faults[0]}{more}, unlike this run: give --lora-targets for the layers of "
            f"the folder"
        )
    try:
        for replica in state.model.replicas:
            group = replica.groups.pg_collection.tp
            fill_lora(replica.module, tables[replica.name], found.tensors, group)
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from error
    state.optimizer.refresh_main_params()
    logger.info("loaded the adapters of %d layers of %s", len(layers), path)


def _place(replica: ModuleReplica) -> Places:
    place, spec = replica.groups.place, replica.groups.spec
    return Places(
        tp=(place.tp, spec.tp),
        expt_tp=(place.expt_tp, spec.expt_tp),
        first_expert=place.ep * replica.module.experts_per_rank,
    )
