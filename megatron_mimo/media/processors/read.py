"""The processor of a folder, checked against what its family is known to do."""

from collections.abc import Mapping
from copy import copy
from functools import reduce
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mimo.border import border
from megatron_mimo.media.processors.family import FAMILIES, ProcessorFamily
from megatron_mimo.media.processors.input import ProcessorInput

# An image that every processor takes.
_PROBE = np.zeros((64, 64, 3), np.uint8)
_FILES = ("processor_config.json", "preprocessor_config.json")
# Names of the image token's id in configurations of transformers.
_TOKEN_FIELDS = ("image_token_id", "image_token_index")


def read_processor(
    folder: str | Path,
    model_type: str,
    config: Mapping[str, Any],
    *,
    placeholder: str = "<image>",
    noun: str = "image",
) -> ProcessorInput:
    """The images of a folder's processor as items.

    Args:
        folder: Path to the folder of a vision-language model, with its processor and tokenizer.
        model_type: Family of the model, as the folder's config.json says.
        config: Configuration of the model, as config.json has it or with all defaults.
        placeholder: Placeholder of an image in stored samples.
        noun: Name of one image, and of its field in stored samples.

    Raises:
        ValueError: The family is not known, the folder has no processor or one of another kind,
            torchvision is missing, or the processor contradicts the configuration.
    """
    family = FAMILIES.get(model_type)
    if family is None:
        raise ValueError(
            f"{folder} has a model of type {model_type}, whose images are not known: expected one "
            f"of {', '.join(FAMILIES)}"
        )
    path = Path(folder)
    if not any((path / name).is_file() for name in _FILES):
        raise ValueError(
            f"{path} has no processor: expected {' or '.join(_FILES)}, which transformers' "
            f"save_pretrained writes; copy it from where the model was published"
        )
    if find_spec("torchvision") is None:
        raise ValueError(
            f"the image processor of {path} needs torchvision, which is not installed: "
            f"pip install torchvision, in the version that goes with torch"
        )
    processor = _load(path)
    _check_classes(processor, family, path)
    _check_numbers(processor, family, config, path)
    texts = family.texts(processor)
    _check_token(processor, texts.token, config, path)
    given = _given(processor, family)
    settings = _own(processor.image_processor) | given
    if not settings["do_resize"]:
        raise ValueError(
            f"{path}: its image processor has do_resize false, with which images are not resized "
            f"to whole patches: set it to true"
        )
    # Only image settings are needed from here on; reader processes are sent a copy.
    slim = copy(processor)
    for name in slim.get_attributes():
        if name != "image_processor":
            setattr(slim, name, None)
    kind = ProcessorInput(
        folder=str(path),
        model_type=model_type,
        texts=texts,
        placeholder=placeholder,
        noun=noun,
        processor=slim,
        settings=settings,
        given=given,
    )
    with border(lambda why: f"{path} has a processor that takes no image: {why}"):
        kind.encode(_PROBE, kind.examine(_PROBE), with_content=True)
    return kind


def _load(path: Path) -> Any:
    from transformers import AutoProcessor

    with border(lambda why: f"{path} holds no processor that transformers can load: {why}"):
        return AutoProcessor.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def _check_classes(processor: Any, family: ProcessorFamily, path: Path) -> None:
    found = type(processor).__name__, type(getattr(processor, "image_processor", None)).__name__
    wanted = family.processor, family.image_processor
    if found != wanted:
        raise ValueError(
            f"{path} has a {found[0]} with a {found[1]}: expected {wanted[0]} with {wanted[1]}"
        )


def _check_numbers(
    processor: Any, family: ProcessorFamily, config: Mapping[str, Any], path: Path
) -> None:
    for here, there in family.same:
        found = reduce(_step, here.split("."), processor)
        wanted = reduce(_step, there.split("."), config)
        if None not in (found, wanted) and _plain(found) != _plain(wanted):
            raise ValueError(
                f"{path}: its processor has {here} {found}, and config.json {there} {wanted}: "
                f"expected the same; take both files from one model"
            )


def _step(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)


def _plain(value: Any) -> Any:
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def _check_token(processor: Any, token: str, config: Mapping[str, Any], path: Path) -> None:
    found = processor.tokenizer.convert_tokens_to_ids(token)
    wanted = next((config[name] for name in _TOKEN_FIELDS if name in config), found)
    if found != wanted:
        raise ValueError(
            f"{path}: its tokenizer has {token!r} as token {found}, and config.json says that "
            f"images are token {wanted}: expected the same; take both files from one model"
        )


def _own(images: Any) -> dict[str, Any]:
    """An image processor's own settings by name."""
    found = ((name, getattr(images, name, None)) for name in images.valid_kwargs.__annotations__)
    return {name: value for name, value in found if value is not None}


def _given(processor: Any, family: ProcessorFamily) -> dict[str, Any]:
    """What the processor gives its image processor with each call."""
    merged = processor._merge_kwargs(tokenizer_init_kwargs=processor.tokenizer.init_kwargs)
    given = {name: value for name, value in merged["images_kwargs"].items() if value is not None}
    given.pop("return_tensors", None)
    return {**given, **family.settings(processor)}
