"""The checkpoint of a run as a folder that transformers loads, and answers from as the run does."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # megatron-core has to be adapted to a host before anything imports it.
    from megatron_mimo.inference.run import Run
    from megatron_mimo.model.omni import OmniConfig
    from megatron_mimo.modules.stage import ModuleStage

_GENERATION = "generation_config.json"
# What runs of presets become: with text alone, and with images.
_PRESETS = ("nemotron_h", "nemotron_h_omni")


def export_run(
    checkpoint: Path,
    target: Path,
    *,
    load_hf: str | None = None,
    tokenizer_model: str | None = None,
    custom_import: Sequence[str] = (),
) -> str:
    """Write a run as a folder of the model that it began from.

    A run of a preset becomes `nemotron_h_omni`, or `nemotron_h` where it has text alone. Of these,
    what transformers needs to answer as the run does is the run's own: the architecture, the sizes
    and the normalisation of images, the tokens, the format of a conversation, and what ends an
    answer. A run that began from such a folder has its audio and video carried over. Of all other
    models, everything but the weights is carried over from their folder.

    Args:
        checkpoint: Folder of the checkpoint of one iteration, undamaged.
        target: Folder to create.
        load_hf: Folder that the run began from, in place of where it was.
        tokenizer_model: Folder of the tokenizer in place of the run's.
        custom_import: Modules that the run's `--custom-import` may name.

    Returns:
        Description of what was written.

    Raises:
        ValueError: transformers has no such model; the message names the field, its value, and what
            would be needed. Or the run needs something that is not there.
    """
    from megatron_mimo.inference.run import read_run
    from megatron_mimo.runtime import prepare_megatron_core, resolve_device

    run = read_run(
        checkpoint, tokenizer_model=tokenizer_model, load_hf=load_hf, custom_import=custom_import
    )
    model, config = _model_of(run)
    prepare_megatron_core(resolve_device("cpu"))
    from megatron_mimo.inference.modules import load_modules

    modules = load_modules(run)
    if run.resolved.lora is not None:
        from megatron_mimo.modules.lora.apply import merge_lora

        for module in modules.values():
            merge_lora(module)
    staged = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        if model not in _PRESETS:
            _write_hf(staged, run, modules)
        else:
            if config is None:
                _write_text(staged, run, modules)
            else:
                _write_omni(staged, run, config, modules)
            _write_beside(staged, run)
        if target.is_dir():
            target.rmdir()  # An empty one.
        staged.rename(target)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return f"{checkpoint} as a folder of {model}"


def _model_of(run: "Run") -> "tuple[str, OmniConfig | None]":
    """What a run becomes; of nemotron_h_omni, its architecture and image processing too.

    Raises:
        ValueError: transformers has no such model; the message names the field.
    """
    from megatron_mimo.model.hf import HfFolder
    from megatron_mimo.model.omni.config import require_hybrid

    folder = run.resolved.folder
    if isinstance(folder, HfFolder):
        return folder.model_type, None
    require_hybrid(run.resolved.architecture)
    text, omni = _PRESETS
    return (text, None) if len(run.resolved.layout.modules) == 1 else (omni, omni_config(run))


def export_adapters(
    checkpoint: Path,
    target: Path,
    *,
    load_hf: str | None = None,
    tokenizer_model: str | None = None,
    custom_import: Sequence[str] = (),
) -> str:
    """Write the adapters of a run as a folder that peft loads onto the exported model.

    Args:
        checkpoint: Folder of the checkpoint of one iteration, undamaged.
        target: Folder to create.
        load_hf: Folder that the run began from, in place of where it was.
        tokenizer_model: Folder of the tokenizer in place of the run's.
        custom_import: Modules that the run's `--custom-import` may name.

    Returns:
        Description of what was written.

    Raises:
        ValueError: The run has no adapters, or trains more than adapters, or transformers has no
            such model; the message names what.
    """
    from megatron_mimo.inference.run import read_run
    from megatron_mimo.model.hf import HfFolder
    from megatron_mimo.model.omni.lora import peft_tables, require_plain_scales
    from megatron_mimo.runtime import prepare_megatron_core, resolve_device
    from megatron_mimo.weights.folder import WeightFolder
    from megatron_mimo.weights.peft import PeftFolder, write_peft

    run = read_run(
        checkpoint, tokenizer_model=tokenizer_model, load_hf=load_hf, custom_import=custom_import
    )
    resolved, lora = run.resolved, run.resolved.lora
    if lora is None:
        raise ValueError(f"--peft: the run of {checkpoint} has no adapters: leave --peft out")
    architecture, modules = resolved.architecture, resolved.layout.modules
    parts = {part for module in modules for part in architecture.parts_of(module)}
    if whole := sorted(parts - resolved.freeze - lora.targets.keys()):
        raise ValueError(
            f"--peft: the run of {checkpoint} trained {' and '.join(whole)} whole, which a folder "
            f"of adapters does not hold: leave --peft out, which merges the adapters"
        )
    tables = peft_tables(architecture, text_alone=len(modules) == 1)
    base = resolved.first_weights.load_hf
    if base is not None and not isinstance(resolved.folder, HfFolder):
        with WeightFolder(base) as folder:
            require_plain_scales(folder, architecture, lora)
    prepare_megatron_core(resolve_device("cpu"))
    from megatron_mimo.inference.modules import load_modules
    from megatron_mimo.modules.lora import exchange

    stages = load_modules(run)
    tensors = {
        layer: factors
        for name, stage in stages.items()
        for layer, factors in exchange.export_adapters(stage, tables[name])
    }
    content = PeftFolder(rank=lora.rank, alpha=lora.alpha, rslora=lora.rslora, tensors=tensors)
    write_peft(target, content, base=base, dropout=lora.dropout)
    return f"the adapters of {checkpoint} as a folder of peft"


def omni_config(run: "Run") -> "OmniConfig":
    """Architecture and image processing of a run, as transformers' class has them.

    Raises:
        ValueError: The class does not have them; the message names the field.
    """
    from megatron_mimo.media.audio.input import AudioInput
    from megatron_mimo.media.images import ImageInput
    from megatron_mimo.media.video.input import VideoInput
    from megatron_mimo.model.omni.config import OmniConfig, require_exportable
    from megatron_mimo.model.omni.fields import require_carried

    resolved, folder = run.resolved, run.resolved.folder
    require_exportable(resolved.architecture)
    kinds = {type(kind): (name, kind) for name, kind in run.data.inputs.items()}
    module, kind = kinds[ImageInput]
    assert isinstance(kind, ImageInput)
    require_carried("items", kind)
    require_carried("images", kind.config)
    _, videos = kinds.get(VideoInput, ("", None))
    audio, clips = kinds.get(AudioInput, ("", None))
    assert videos is None or isinstance(videos, VideoInput)
    assert clips is None or isinstance(clips, AudioInput)
    return OmniConfig(
        model=resolved.architecture,
        vocab_size=run.vocab_size,
        seq_length=resolved.model.seq_length if folder is None else folder.seq_length,
        image_token_id=run.tokenizer.placeholder_ids[module],
        audio_token_id=None if clips is None else run.tokenizer.placeholder_ids[audio],
        min_patches=kind.config.min_patches,
        max_patches=kind.config.max_patches,
        videos=None if videos is None else videos.config,
        audio=None if clips is None else clips.config,
    )


def _write_hf(folder: Path, run: "Run", modules: "Mapping[str, ModuleStage]") -> None:
    from megatron_mimo.inference.modules import hf_stages
    from megatron_mimo.model.hf.weights import save_hf
    from megatron_mimo.weights.folder import WeightFolder

    source = run.resolved.config.checkpoints.first_weights.load_hf
    assert source is not None
    with WeightFolder(source) as weights:
        save_hf(folder, weights, hf_stages(modules))


def _write_omni(
    folder: Path, run: "Run", config: "OmniConfig", modules: "Mapping[str, ModuleStage]"
) -> None:
    from megatron_mimo.model.omni.config import save_processor
    from megatron_mimo.model.omni.weights import save_omni
    from megatron_mimo.modules.language.module import LanguageModule
    from megatron_mimo.modules.parakeet.module import ParakeetModule
    from megatron_mimo.modules.radio.module import RadioModule
    from megatron_mimo.weights.folder import WeightFolder

    held = {type(module): module for module in modules.values()}
    encoder, audio = held[RadioModule], held.get(ParakeetModule)
    language = held[LanguageModule]
    assert isinstance(encoder, RadioModule) and isinstance(language, LanguageModule)
    assert audio is None or isinstance(audio, ParakeetModule)
    assert encoder.projector is not None
    source = run.resolved.config.checkpoints.first_weights.load_hf
    save_omni(
        folder,
        config,
        vision=encoder.vision,
        projector=encoder.projector,
        language=language.model,
        video=encoder.video,
        audio=None if audio is None else audio.audio,
        audio_projector=None if audio is None else audio.audio_projector,
        source=None if source is None else WeightFolder(source),
        tokens=_token_ids(run),
    )
    save_processor(folder, config)


def _write_text(folder: Path, run: "Run", modules: "Mapping[str, ModuleStage]") -> None:
    from megatron_mimo.model.omni.config import require_hybrid
    from megatron_mimo.model.omni.weights import dtype_name
    from megatron_mimo.modules.hybrid.weights import export_weights, write_config
    from megatron_mimo.modules.language.module import LanguageModule
    from megatron_mimo.weights.folder import write_folder

    (language,) = modules.values()
    assert isinstance(language, LanguageModule)
    hybrid = require_hybrid(run.resolved.architecture)
    tensors = export_weights(language.model, hybrid)
    described = write_config(hybrid, run.vocab_size) | _token_ids(run)
    described["max_position_embeddings"] = run.resolved.model.seq_length
    described["dtype"] = dtype_name(tensors["backbone.embeddings.weight"])
    write_folder(folder, described, tensors)


def _write_beside(folder: Path, run: "Run") -> None:
    """Tokenizer, chat template, and how an answer is generated."""
    from megatron_mimo.data.text.pretrained import save_tokenizer
    from megatron_mimo.inference.sampling import Sampling

    save_tokenizer(folder, run.tokenizer, run.data)
    path = folder / _GENERATION
    # As `megatron-mimo generate` answers, unless a folder says otherwise.
    generation: dict[str, Any] = {"do_sample": False, "max_new_tokens": Sampling().max_new_tokens}
    if path.exists():
        generation = json.loads(path.read_text())
    generation |= _token_ids(run)
    if padding := list(range(run.tokenizer.num_tokens, run.vocab_size)):
        # Rows of the table that are no tokens.
        generation["suppress_tokens"] = padding
    path.write_text(json.dumps(generation, indent=2) + "\n")


def _token_ids(run: "Run") -> dict[str, Any]:
    from megatron_mimo.data.text.question import answer_ends

    return {
        "bos_token_id": None,
        "eos_token_id": sorted(answer_ends(run.data, run.tokenizer)),
        "pad_token_id": run.tokenizer.pad_id,
    }
