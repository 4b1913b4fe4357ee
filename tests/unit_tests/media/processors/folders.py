"""Small folders of vision-language models: a processor, a tokenizer, a chat template, a config.

Processors and tokenizers are those of transformers, with few pixels and few tokens; templates are
written in the way of the published ones. In front of and behind what the assistant writes they have
BEGIN and END, so that they can be used with and without `generation` blocks.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_CORPUS = ["what is the answer to this question", "user assistant system model", "\n\n\n"] * 20
_CHATML = "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"

QWEN = (
    "{% macro write(content) %}{% if content is string %}{{ content }}{% else %}"
    "{% for c in content %}{% if c.type == 'image' %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}{% endmacro %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}BEGIN{{ write(m.content) + '<|im_end|>' }}END{{ '\n' }}"
    "{% else %}{{ write(m.content) + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Thoughts of earlier turns go; the last answer has some, empty ones if need be.
QWEN_THINKING = QWEN.replace(
    "BEGIN{{ write(m.content)",
    "{% if loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}BEGIN{{ write(m.content) | trim",
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ '[SYSTEM_PROMPT]' }}"
    "{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}{% endif %}"
    "{{ '[/SYSTEM_PROMPT]' }}{% elif m.role == 'user' %}{{ '[INST]' }}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'text' %}{{ c.text }}{% else %}{{ '[IMG]' }}{% endif %}"
    "{% endfor %}{% endif %}{{ '[/INST]' }}{% else %}BEGIN"
    "{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}{% endif %}"
    "{{ eos_token }}END{% endif %}{% endfor %}"
)
GEMMA = (
    "{% macro write(content) %}{% if content is string %}{{ content | trim }}{% else %}"
    "{% for c in content %}{% if c.type == 'text' %}{{ c.text | trim }}"
    "{% else %}{{ '<|image|>' }}{% endif %}{% endfor %}{% endif %}{% endmacro %}"
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'assistant' %}"
    "{{ '<|turn>model\n' }}BEGIN{{ write(m.content) + '<turn|>' }}END{{ '\n' }}"
    "{% else %}{{ '<|turn>' + m.role + '\n' + write(m.content) + '<turn|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|turn>model\n' }}{% endif %}"
)
# All images of a turn stand in front of its texts, and texts that are no part are not seen.
LLAVA = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + ' ' }}"
    "{% for c in m.content | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% if m.role != 'assistant' %}"
    "{% for c in m.content | selectattr('type', 'equalto', 'text') %}{{ '\n' + c.text }}"
    "{% endfor %}{{ '<|im_end|>' }}{% else %}"
    "{% for c in m.content | selectattr('type', 'equalto', 'text') %}{{ '\n' }}"
    "BEGIN{{ c.text + '<|im_end|>' }}END{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES: Mapping[str, str] = {
    "gemma4": GEMMA,
    "llava_onevision": LLAVA,
    "mistral3": MISTRAL,
    "qwen3_5": QWEN_THINKING,
    "qwen3_vl": QWEN,
}
MODEL_TYPES = tuple(TEMPLATES)


def template(model_type: str, *, marked: bool) -> str:
    """The chat template of a family, with `generation` blocks or without."""
    begin, end = ("{% generation %}", "{% endgeneration %}") if marked else ("", "")
    return TEMPLATES[model_type].replace("BEGIN", begin).replace("END", end)


def save_folder(model_type: str, folder: Path, *, marked: bool = False) -> dict[str, Any]:
    """Write a folder, and return its config."""
    processor = _PROCESSORS[model_type](template(model_type, marked=marked))
    processor.save_pretrained(folder)
    config = config_of(model_type, processor.image_token_id)
    (folder / "config.json").write_text(json.dumps(config))
    return config


def config_of(model_type: str, image_token: int) -> dict[str, Any]:
    """A small configuration, as config.json has it."""
    text: dict[str, Any] = {
        "vocab_size": 768,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    tower = {"hidden_size": 32, "intermediate_size": 64, "patch_size": 4}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    match model_type:
        case "gemma4":
            more: dict[str, Any] = {
                "text_config": text
                | {"vocab_size_per_layer_input": 768, "hidden_size_per_layer_input": 0}
                | {"layer_types": ["full_attention"], "global_head_dim": 16},
                "vision_config": tower
                | layers
                | {"head_dim": 16, "pooling_kernel_size": 2, "position_embedding_size": 1024},
                "audio_config": None,
            }
        case "llava_onevision":
            more = {
                "text_config": text | {"model_type": "qwen2"},
                "vision_config": tower
                | layers
                | {"model_type": "siglip_vision_model", "image_size": 16, "vision_use_head": False},
                "image_grid_pinpoints": PINPOINTS,
                "vision_feature_layer": -1,
                "vision_feature_select_strategy": "full",
                "vision_aspect_ratio": "anyres_max_9",
            }
        case "mistral3":
            more = {
                "text_config": text | {"model_type": "mistral"},
                "vision_config": tower
                | layers
                | {"model_type": "pixtral", "image_size": 64, "head_dim": 16},
                "spatial_merge_size": 2,
            }
        case _:
            more = {
                "text_config": text,
                "vision_config": tower
                | {"depth": 1, "num_heads": 2, "spatial_merge_size": 2, "temporal_patch_size": 2}
                | {"out_hidden_size": 32, "num_position_embeddings": 64},
            }
            if model_type == "qwen3_vl":
                more["vision_config"]["deepstack_visual_indexes"] = [0]
    return {"model_type": model_type, "image_token_id": image_token, **more}


def _tokenizer(
    special: tuple[str, ...], chat_template: str, *, spaced: bool = False, **fields: Any
) -> Any:
    """A tokenizer of bytes, or of letters with the blank as one of them, as Gemma's."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ("<pad>", "<bos>", "<eos>", *special)
    if spaced:
        special += tuple(f"<0x{byte:02X}>" for byte in range(256))
        backend = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True))
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.decoder = decoders.Replace("▁", " ")
    else:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + 350,
        special_tokens=list(special),
        initial_alphabet=[] if spaced else pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        **fields,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def _gemma4(chat_template: str) -> Any:
    from transformers import (
        Gemma4AudioFeatureExtractor,
        Gemma4ImageProcessor,
        Gemma4Processor,
        Gemma4VideoProcessor,
    )

    names = {
        "image_token": "<|image|>",
        "boi_token": "<|image>",
        "eoi_token": "<image|>",
        "audio_token": "<|audio|>",
        "boa_token": "<|audio>",
        "eoa_token": "<audio|>",
    }
    special = (*names.values(), "<|turn>", "<turn|>", "<|video|>")
    tokenizer = _tokenizer(special, chat_template, spaced=True, extra_special_tokens=names)
    sizes = {"patch_size": 4, "pooling_kernel_size": 2, "max_soft_tokens": 70}
    return Gemma4Processor(
        Gemma4AudioFeatureExtractor(),
        Gemma4ImageProcessor(**sizes),
        tokenizer,
        Gemma4VideoProcessor(**sizes),
        chat_template=chat_template,
    )


def _qwen(chat_template: str) -> Any:
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    special = (*_CHATML, "<|image_pad|>", "<|video_pad|>")
    sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    edges = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    return Qwen3VLProcessor(
        Qwen2VLImageProcessor(size=edges, image_mean=[0.5] * 3, image_std=[0.5] * 3, **sizes),
        _tokenizer(special, chat_template),
        Qwen3VLVideoProcessor(size=edges, **sizes),
        chat_template=chat_template,
    )


def _mistral3(chat_template: str) -> Any:
    from transformers import PixtralImageProcessor, PixtralProcessor

    marks = ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
    special = (*marks, "[IMG]", "[IMG_BREAK]", "[IMG_END]")
    return PixtralProcessor(
        PixtralImageProcessor(patch_size=4, size={"longest_edge": 64}),
        _tokenizer(special, chat_template),
        patch_size=4,
        spatial_merge_size=2,
        chat_template=chat_template,
    )


PINPOINTS = [[16 * rows, 16 * columns] for rows in range(1, 7) for columns in range(1, 7)]


def _llava(chat_template: str) -> Any:
    from transformers import (
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
    )

    size = {"height": 16, "width": 16}
    return LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=PINPOINTS),
        _tokenizer((*_CHATML, "<image>", "<video>"), chat_template),
        LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=chat_template,
    )


_PROCESSORS = {
    "gemma4": _gemma4,
    "llava_onevision": _llava,
    "mistral3": _mistral3,
    "qwen3_5": _qwen,
    "qwen3_vl": _qwen,
}
