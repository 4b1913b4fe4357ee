"""What follows from a folder of `--load-hf` whose model runs transformers' own forward."""

from dataclasses import replace

from megatron_mimo.config.model_file import Folder
from megatron_mimo.config.sections import ModelSection, TrainConfig
from megatron_mimo.model.hf import HfFolder

_OF_IMAGES = (
    "image_tag_type",
    "dynamic_resolution_min_patches",
    "dynamic_resolution_max_patches",
    "dynamic_resolution_rule",
    "img_h",
    "img_w",
    "use_tiling",
    "use_thumbnail",
)
_PRECISIONS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def with_folder(config: TrainConfig, folder: Folder | None) -> TrainConfig:
    """The config with the tokenizer and the precision of the folder, where no flag says another.

    Args:
        config: Flags as given.
        folder: Model of the folder of `--load-hf`; None without one.

    Raises:
        ValueError: A flag is for images of another kind of encoder, or the folder's dtype is none
            that training knows.
    """
    if not isinstance(folder, HfFolder):
        return config
    model = config.model
    _require_no_image_flags(model, folder)
    own = _precision(model, folder)
    return replace(
        config,
        model=replace(
            model,
            tokenizer_model=model.tokenizer_model or str(folder.path),
            bf16=model.bf16 or own == "bf16",
            fp16=model.fp16 or own == "fp16",
        ),
    )


def _require_no_image_flags(model: ModelSection, folder: HfFolder) -> None:
    given = [name for name in _OF_IMAGES if getattr(model, name)]
    given += [] if model.dynamic_resolution else ["no_dynamic_resolution"]
    if given:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(
            f"{flags} with --load-hf {folder.path}: the folder's own processor makes the pixels of "
            f"images; leave out the flags, or change processor_config.json"
        )


def _precision(model: ModelSection, folder: HfFolder) -> str | None:
    """The precision that the folder says; None where a flag says one, or the folder does not."""
    if model.bf16 or model.fp16 or model.fp32 or folder.dtype is None:
        return None
    if folder.dtype not in _PRECISIONS:
        raise ValueError(
            f"{folder.path}: dtype is {folder.dtype!r} in config.json: expected one of "
            f"{', '.join(_PRECISIONS)}; correct it, or give --bf16, --fp16 or --fp32"
        )
    return _PRECISIONS[folder.dtype]
