"""Turns to tokens: how a conversation is written out, and which of its tokens are learnt.

A conversation becomes *stretches* of text that are learnt or not: what the assistant says and its
end are, all else is given. Every stretch is tokenised by itself, as it is when the model answers,
so that no token straddles the border between a prompt and its answer.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.conversation import Turn
from megatron_mimo.data.tokenizer import ByteTokenizer, ChatTemplate, Tokenizer

_TURN_START, _TURN_END = "<|im_start|>", "<|im_end|>"
_IMAGE_TAGS = {"internvl": ("<img>", "</img>")}
# Stands behind an answer to find its place; of characters for private use.
_MARK = "\ue0f8end of answer\ue0f8"


@dataclass(frozen=True, slots=True)
class Stretch:
    """A piece of text.

    Attributes:
        text: With the placeholders of images.
        learnt: The model learns to write it.
        ends: The end-of-sequence token follows, learnt or not as the text is.
    """

    text: str
    learnt: bool = False
    ends: bool = False


@dataclass(frozen=True, slots=True)
class Prompt:
    """A sample's tokens.

    Attributes:
        tokens: Image tokens are expanded to the rows of their images.
        targets: Of each token, whether it is learnt; never an image token, nor the first token,
            which nothing predicts.
    """

    tokens: list[int]
    targets: list[bool]


def write_prompt(
    turns: Sequence[Turn], rows: Sequence[int], config: DataConfig, tokenizer: Tokenizer
) -> Prompt:
    """Write a conversation out.

    Args:
        turns: With one placeholder for each image.
        rows: Of each image, in the order of the placeholders.
        config: Prompt format, placeholder and image tags.
        tokenizer: Of the texts.

    Raises:
        ValueError: The tokenizer's chat template cannot write this conversation, or changes it.
    """
    stretches = _stretches(turns, config, tokenizer)
    placeholders = sum(stretch.text.count(config.image_token) for stretch in stretches)
    if placeholders != len(rows):
        raise ValueError(
            f"the tokenizer's chat template makes {placeholders} placeholders of {len(rows)}: "
            f"choose another --tokenizer-prompt-format, or a template that takes texts"
        )
    opening, closing = image_tags(config)
    before, after = tokenizer.encode(opening), tokenizer.encode(closing)
    image_id = tokenizer.image_token_id
    left = iter(rows)
    tokens: list[int] = []
    targets: list[bool] = []
    for stretch in _joined(stretches):
        for index, text in enumerate(stretch.text.split(config.image_token)):
            if index:
                image = [*before, *[image_id] * next(left), *after]
                tokens += image
                targets += [False] * len(image)
            written = tokenizer.encode(text) if text else []
            tokens += written
            targets += [stretch.learnt] * len(written)
        if stretch.ends:
            tokens.append(tokenizer.eos_id)
            targets.append(stretch.learnt)
    targets[:1] = [False] * len(tokens[:1])
    return Prompt(tokens, targets)


def check_prompt_format(config: DataConfig, tokenizer: Tokenizer) -> None:
    """Refuse settings that the tokenizer cannot follow.

    Raises:
        ValueError: It has no chat template, or lacks the tokens of the format or of image tags.
    """
    chosen = _format(config, tokenizer)
    if chosen == "chat" and tokenizer.chat_template is None:
        raise ValueError(
            "--tokenizer-prompt-format chat: the tokenizer has no chat template; give a "
            "--tokenizer-model whose folder has one (chat_template.jinja), or choose plain"
        )
    if chosen == "nemotron6-moe":
        _require_tokens(tokenizer, (_TURN_START, _TURN_END), "--tokenizer-prompt-format", chosen)
    if config.image_tag_type is not None and not isinstance(tokenizer, ByteTokenizer):
        _require_tokens(tokenizer, image_tags(config), "--image-tag-type", config.image_tag_type)


def _require_tokens(tokenizer: Tokenizer, needed: Sequence[str], flag: str, value: str) -> None:
    lacking = [token for token in needed if tokenizer.token_id(token) is None]
    if lacking:
        raise ValueError(
            f"{flag} {value} needs {' and '.join(needed)} in the tokenizer's vocabulary, which has "
            f"no {' and no '.join(lacking)}: give another --tokenizer-model, or leave {flag} out"
        )


def _format(config: DataConfig, tokenizer: Tokenizer) -> str:
    if config.prompt_format is not None:
        return config.prompt_format
    return "plain" if tokenizer.chat_template is None else "chat"


def image_tags(config: DataConfig) -> tuple[str, str]:
    """What is written in front of an image and behind it."""
    return ("", "") if config.image_tag_type is None else _IMAGE_TAGS[config.image_tag_type]


def _stretches(turns: Sequence[Turn], config: DataConfig, tokenizer: Tokenizer) -> list[Stretch]:
    if is_document(turns):
        return [Stretch(turns[0].text, learnt=True, ends=True)]
    match _format(config, tokenizer):
        case "plain":
            return plain(turns)
        case "nemotron6-moe":
            return nemotron6_moe(turns)
        case _:
            assert tokenizer.chat_template is not None
            return chat(turns, tokenizer.chat_template)


def _joined(stretches: Sequence[Stretch]) -> Iterator[Stretch]:
    """Neighbours that are both given become one."""
    held = ""
    for stretch in stretches:
        if not stretch.learnt and not stretch.ends:
            held += stretch.text
            continue
        if held:
            yield Stretch(held)
            held = ""
        yield stretch
    if held:
        yield Stretch(held)


# -- formats ---------------------------------------------------------------------------------------


def is_document(turns: Sequence[Turn]) -> bool:
    """A turn of the assistant's alone is text to learn throughout; no format frames it."""
    return len(turns) == 1 and turns[0].role == "assistant"


def plain(turns: Sequence[Turn]) -> list[Stretch]:
    """A line for each prompt, and each answer with the end-of-sequence token."""
    return [
        Stretch(turn.text, learnt=True, ends=True)
        if turn.role == "assistant"
        else Stretch(f"{turn.text}\n")
        for turn in turns
    ]


def nemotron6_moe(turns: Sequence[Turn]) -> list[Stretch]:
    """Each turn between its marks, as Nemotron 6 MoE models are trained.

    Learnt are an answer, its thoughts among it, and the mark of its end; the line break after it is
    not.
    """
    stretches = []
    for turn in turns:
        stretches += [
            Stretch(f"{_TURN_START}{turn.role}\n"),
            Stretch(f"{turn.text}{_TURN_END}", learnt=turn.role == "assistant"),
            Stretch("\n"),
        ]
    return stretches


def chat(turns: Sequence[Turn], template: ChatTemplate) -> list[Stretch]:
    """As the tokenizer's own template writes it.

    Where the template marks what it generates, that is learnt. Otherwise the answers are found by
    writing the conversation up to each of them; what follows one in its turn, the end token, goes
    with it, but no white space at the end.

    Raises:
        ValueError: The template refuses the conversation, changes an answer, or writes a beginning
            of the conversation other than the whole.
    """
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    whole, marked = template.render_marked(messages)
    spans = marked if marked is not None else _answers(turns, messages, whole, template)
    stretches, at = [], 0
    for start, stop in spans:
        stretches += [Stretch(whole[at:start]), Stretch(whole[start:stop], learnt=True)]
        at = stop
    return [*stretches, Stretch(whole[at:])]


def _answers(
    turns: Sequence[Turn],
    messages: Sequence[Mapping[str, str]],
    whole: str,
    template: ChatTemplate,
) -> list[tuple[int, int]]:
    """Where in the whole each answer begins and its turn ends."""
    spans = []
    for index, turn in enumerate(turns):
        if turn.role != "assistant":
            continue
        start = _start(messages[: index + 1], whole, template)
        last = index + 1 == len(turns)
        upto = whole if last else template.render(messages[: index + 1])
        if not whole.startswith(upto):
            raise ValueError(
                f"the tokenizer's chat template writes turn {index + 1} of {len(turns)} in another "
                f"way when more follow, so its answer cannot be told apart: choose another "
                f"--tokenizer-prompt-format, or mark answers in the template with "
                f"{{% generation %}}"
            )
        # The end token counts, white space behind it does not; inside the answer it does.
        kept = turn.text if whole.startswith(turn.text, start) else turn.text.strip()
        spans.append((start, max(start + len(kept), len(upto.rstrip()))))
    return spans


def _start(messages: Sequence[Mapping[str, str]], whole: str, template: ChatTemplate) -> int:
    """Where the last message's text begins in the whole.

    A short answer also occurs by chance, in the name of a role for one, so its place is found by
    writing a mark behind it.
    """
    text = messages[-1]["content"]
    marked = template.render([*messages[:-1], {**messages[-1], "content": text + _MARK}])
    before = marked.partition(_MARK)[0]
    for kept in (text, text.lstrip()):
        start = len(before) - len(kept)
        there = before.endswith(kept) and whole.startswith(before[:start])
        if there and whole.startswith(kept.rstrip(), start):
            return start
    raise ValueError(
        f"the tokenizer's chat template changes turn {len(messages)}, the answer {text[:40]!r}: "
        f"choose another --tokenizer-prompt-format, or a template that writes answers as they are"
    )
