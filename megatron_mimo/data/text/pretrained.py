"""A run's tokenizer as transformers loads it, with a chat template in the run's format.

The template takes what transformers' processors are given, lists of texts and images, and texts. It
writes what the run has learnt from: with its own tokenizer's template, in lines, or between marks.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.inputs import OneRunItems
from megatron_mimo.data.text.prompt import TURN_END, TURN_START, format_of
from megatron_mimo.data.text.tokenizer import ByteTokenizer, HuggingFaceTokenizer, Tokenizer

# Names of the byte tokenizer's own tokens: ends of other programs, which no text holds by chance.
_PAD, _EOS = "<|pad|>", "<|endoftext|>"
# Files of a tokenizer that `save_tokenizer` replaces.
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "chat_template.json",
    "chat_template.jinja",
)
# Turns whose content is a list become turns with a text; ITEMS has a branch for each kind of items.
_FLATTEN = """
{%- set flat = namespace(turns=[]) -%}
{%- for message in messages -%}
{%- if message.content is string or message.content is not iterable -%}
{%- set flat.turns = flat.turns + [message] -%}
{%- else -%}
{%- set flat.text = "" -%}
{%- for part in message.content -%}
{%- if part.type == "text" -%}
{%- set flat.text = flat.text + part.text -%}
ITEMS
{%- else -%}
{{- raise_exception("a part of type " ~ part.type ~ ": expected KNOWN") -}}
{%- endif -%}
{%- endfor -%}
{%- set flat.turns = flat.turns + [dict(message, content=flat.text)] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = flat.turns -%}
"""
_PLAIN = """
{%- for message in messages -%}
{%- if message.role == "assistant" -%}
{{- message.content + EOS -}}
{%- else -%}
{{- message.content + "\\n" -}}
{%- endif -%}
{%- endfor -%}
"""
_MARKED = """
{%- for message in messages -%}
{{- START + message.role + "\\n" + message.content + END + "\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- START + "assistant\\n" -}}
{%- endif -%}
"""


def save_tokenizer(folder: Path, tokenizer: Tokenizer, config: DataConfig) -> None:
    """Write a tokenizer into a folder, with its chat template; others there are replaced.

    Args:
        folder: Folder to write into.
        tokenizer: Tokenizer of a run.
        config: Prompt format of the run, and its items with their placeholders and tags.

    Raises:
        ValueError: The tokenizer is neither of bytes nor one of transformers with a tokenizer.json.
    """
    special, kinds = {}, list(config.hosts.values())
    placeholders = [kind.token for kind in kinds]
    by_noun = {kind.words.noun: kind for kind in kinds}
    if len(kinds) == 1 or "image" in by_noun:
        kind = by_noun.get("image", kinds[0])
        before, after = kind.tags if isinstance(kind, OneRunItems) else ("", "")
        special = {
            "image_token": kind.token,
            "image_start_token": before,
            "image_end_token": after,
        }
    if "audio" in by_noun:
        special["audio_token"] = by_noun["audio"].token
    if isinstance(tokenizer, ByteTokenizer):
        written, eos = _of_bytes(placeholders, special), _EOS
    elif isinstance(tokenizer, HuggingFaceTokenizer):
        written, eos = _of_transformers(tokenizer.pretrained, special), tokenizer.eos_token
    else:
        raise ValueError(
            f"{type(tokenizer).__name__} cannot be written as a tokenizer of transformers: "
            f"expected the byte tokenizer, or --tokenizer-model"
        )
    written.chat_template = chat_template(config, tokenizer, eos)
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)
    written.save_pretrained(str(folder))


def chat_template(config: DataConfig, tokenizer: Tokenizer, eos: str) -> str:
    """The template of a run's format, for lists of texts and images as well as for texts.

    Args:
        config: Prompt format, and items.
        tokenizer: Tokenizer of the run.
        eos: Its end-of-sequence token.
    """
    match format_of(config, tokenizer):
        case "plain":
            written = _PLAIN.strip().replace("EOS", json.dumps(eos))
        case "nemotron6-moe":
            written = _MARKED.strip()
            for name, mark in (("START", TURN_START), ("END", TURN_END)):
                written = written.replace(name, json.dumps(mark))
        case "chat":
            assert tokenizer.chat_template is not None
            written = tokenizer.chat_template.source
    if any(kind.part for kind in config.hosts.values()):
        return written
    flatten = _flatten(config)
    # That of a folder that was exported has it.
    return written if written.startswith(flatten) else f"{flatten}\n{written}"


def _flatten(config: DataConfig) -> str:
    """The beginning of a template that takes lists of texts and items."""
    # An item that feeds another kind's module is written out by transformers' processor.
    written = {
        kind.words.noun: kind.inline if kind.feeds is None else kind.placeholder
        for kind in config.inputs.values()
    } or {"image": ""}
    branches = "\n".join(
        f"{{%- elif part.type == {json.dumps(noun)} -%}}\n"
        f"{{%- set flat.text = flat.text + {json.dumps(text)} -%}}"
        for noun, text in written.items()
    )
    *nouns, last = ["text", *written]
    known = f"{', '.join(nouns)} or {last}"
    return _FLATTEN.strip().replace("ITEMS", branches).replace("KNOWN", known)


def _of_transformers(pretrained: Any, special: dict[str, str]) -> Any:
    """The same tokens from every text, and none around it."""
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    if not pretrained.is_fast:
        raise ValueError(
            f"--tokenizer-model {pretrained.name_or_path} has no tokenizer.json: expected one, "
            f"with which the exported folder makes the same tokens"
        )
    own = {
        name: getattr(pretrained, name)
        for name in ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
        if getattr(pretrained, name) is not None
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=Backend.from_str(pretrained.backend_tokenizer.to_str()),
        model_max_length=pretrained.model_max_length,
        padding_side=pretrained.padding_side,
        clean_up_tokenization_spaces=pretrained.clean_up_tokenization_spaces,
        extra_special_tokens=special,
        **own,
    )


def _of_bytes(placeholders: Sequence[str], special: dict[str, str]) -> Any:
    """Tokens 0 to 255 for bytes, and the byte tokenizer's own after them."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocabulary = {letter: byte for byte, letter in bytes_to_unicode().items()}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    # In the order of their numbers.
    tokens = (_PAD, _EOS, *placeholders)
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in tokens])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=_EOS,
        pad_token=_PAD,
        clean_up_tokenization_spaces=False,
        extra_special_tokens=special,
    )
