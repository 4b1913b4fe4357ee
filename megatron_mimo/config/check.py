"""Checks of relations between flags of several parts, which marks cannot express."""

import os

from megatron_mimo.config.model_file import HUGGING_FACE
from megatron_mimo.config.sections import (
    CheckpointSection,
    ModelSection,
    TrainConfig,
)
from megatron_mimo.config.watch_config import WatchConfig
from megatron_mimo.settings import check_settings


def check(config: TrainConfig) -> None:
    """Refuse values out of range, and flags that contradict each other.

    Rules within the settings of one part are checked by that part.

    Args:
        config: Flags as given.

    Raises:
        ValueError: A value is out of range or flags contradict each other; the message names them.
    """
    check_settings(config)
    _check_images(config.model)
    _check_prompt(config.model)
    _check_folders(config.checkpoints, config.data.readers.save)
    _check_services(config.watching, config.checkpoints.save.root)
    _check_first_weights(config.checkpoints, llm_only=config.grids.llm_only)


def _check_images(model: ModelSection) -> None:
    """Refuse flags of the other way to size images, which would have no effect."""
    sides = {"--img-h": model.img_h, "--img-w": model.img_w}
    bounds = {
        "--dynamic-resolution-min-patches": model.dynamic_resolution_min_patches,
        "--dynamic-resolution-max-patches": model.dynamic_resolution_max_patches,
        "--dynamic-resolution-rule": model.dynamic_resolution_rule,
    }
    if model.dynamic_resolution:
        given = [flag for flag, value in sides.items() if value is not None]
        if given:
            raise ValueError(
                f"{' and '.join(given)} size images only without dynamic resolution: add "
                f"--no-dynamic-resolution, or leave them out"
            )
        return
    missing = [flag for flag, value in sides.items() if value is None]
    if missing:
        raise ValueError(f"--no-dynamic-resolution needs {' and '.join(missing)}, in pixels")
    given = [flag for flag, value in bounds.items() if value is not None]
    if given:
        raise ValueError(
            f"{' and '.join(given)} bound images only with dynamic resolution: leave out either "
            f"them or --no-dynamic-resolution"
        )


def _check_prompt(model: ModelSection) -> None:
    """Refuse formats that the built-in tokenizer does not support."""
    chosen = model.tokenizer_prompt_format
    own = model.tokenizer_model is not None or model.model_provider == HUGGING_FACE
    if chosen in ("chat", "nemotron6-moe") and not own:
        raise ValueError(
            f"--tokenizer-prompt-format {chosen} needs --tokenizer-model: the built-in byte "
            f"tokenizer has neither a chat template nor tokens for turns; add it, or choose plain"
        )


def _check_folders(checkpoints: CheckpointSection, positions: str | None) -> None:
    """Refuse the same folder for checkpoints and for positions of the readers."""
    save = checkpoints.save.root
    if positions is None or save is None:
        return
    if os.path.abspath(positions) == os.path.abspath(save):
        raise ValueError(
            f"--dataloader-save {positions} is the folder of --save, whose checkpoints say where "
            f"the data stands anyway: name another folder, or leave it out"
        )


def _check_services(watching: WatchConfig, save: str | None) -> None:
    """Refuse a service that has no folder for its own files."""
    services = watching.services
    folders = services.wandb_save_dir, save, watching.tensorboard_dir
    if services.wandb_project is not None and not any(folders):
        raise ValueError(
            f"--wandb-project {services.wandb_project} without a folder for W&B's own files: add "
            f"--wandb-save-dir, --save or --tensorboard-dir"
        )


def _check_first_weights(checkpoints: CheckpointSection, *, llm_only: bool) -> None:
    path = checkpoints.first_weights.load_vision_from
    if llm_only and path is not None:
        raise ValueError(
            f"--load-vision-from {path} with --llm-only, which has no vision encoder: leave one out"
        )
