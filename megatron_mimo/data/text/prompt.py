"""Conversion of turns to tokens: the format of a conversation, and the tokens to learn.

A chat is written out and tokenised as a whole, so that its tokens are those that its tokenizer
makes of it anywhere else, and what is learnt is found among them by the characters that they stand
for. In the plain format, which no tokenizer knows of, prompts and answers are *stretches*: each is
tokenised by itself, as it is when the model answers.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.inputs import Layout, placeholders
from megatron_mimo.data.text.chat_template import ChatTemplate, Span, write_chat
from megatron_mimo.data.text.conversation import Turn
from megatron_mimo.data.text.parts import template_of
from megatron_mimo.data.text.placeholders import require_no_tokens, write_inline
from megatron_mimo.data.text.tokenizer import ByteTokenizer, Spelled, Tokenizer, build_tokenizer

# Module -> how each of its items is written, in the order of its placeholders.
Layouts = Mapping[str, Sequence[Layout]]

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
_NO_PLACES = (
    "the tokenizer does not tell which characters its tokens stand for, so that answers in a chat "
    "cannot be found: give a --tokenizer-model with a tokenizer.json, or choose "
    "--tokenizer-prompt-format plain"
)


@dataclass(frozen=True, slots=True)
class Stretch:
    """A piece of text.

    Attributes:
        text: Text with the placeholders of items.
        learnt: Whether the model learns to write it.
        ends: Whether the end-of-sequence token follows, learnt if the text is.
    """

    text: str
    learnt: bool = False
    ends: bool = False


@dataclass(frozen=True, slots=True)
class Prompt:
    """The tokens of a sample.

    Attributes:
        tokens: Numbers of the tokens, with placeholders expanded to the rows of their items.
        targets: Whether each token is learnt; never one of an item, nor the first token, which has
            no context.
    """

    tokens: list[int]
    targets: list[bool]


def write_prompt(
    turns: Sequence[Turn],
    layouts: Layouts,
    config: DataConfig,
    tokenizer: Tokenizer,
) -> Prompt:
    """Write a conversation as tokens.

    Args:
        turns: Turns with one placeholder for each item.
        layouts: Module -> how each of its items is written, in the order of its placeholders.
        config: Prompt format, and kinds of items.
        tokenizer: Tokenizer of the texts.

    Raises:
        ValueError: The tokenizer's chat template cannot write this conversation, or changes it; the
            tokens have more or fewer places for items than there are items.
    """
    require_no_tokens([turn.text for turn in turns], config.hosts)
    if is_document(turns):
        prompt = encode_text([Stretch(turns[0].text, learnt=True, ends=True)], config, tokenizer)
    elif format_of(config, tokenizer) == "plain":
        prompt = encode_text(joined(plain(turns)), config, tokenizer)
    else:
        prompt = _encode_chat(turns, layouts, config, tokenizer)
    prompt = with_rows(prompt, layouts, config, tokenizer)
    prompt.targets[:1] = [False] * len(prompt.tokens[:1])
    return prompt


def encode_text(stretches: Iterable[Stretch], config: DataConfig, tokenizer: Tokenizer) -> Prompt:
    """Tokens of stretches, with a placeholder's for each item."""
    tokens: list[int] = []
    targets: list[bool] = []
    for stretch in stretches:
        if stretch.text:
            text = write_inline(stretch.text, config.hosts)
            tokens += tokenizer.encode_with_items(text, config.hosts)
        if stretch.ends:
            tokens.append(tokenizer.eos_id)
        targets += [stretch.learnt] * (len(tokens) - len(targets))
    return Prompt(tokens, targets)


def _encode_chat(
    turns: Sequence[Turn],
    layouts: Layouts,
    config: DataConfig,
    tokenizer: Tokenizer,
) -> Prompt:
    """Tokens of a whole chat, with a placeholder's for each item."""
    if format_of(config, tokenizer) == "nemotron6-moe":
        text, spans = nemotron6_moe(inline(turns, config))
    else:
        assert tokenizer.chat_template is not None
        _require_plain_answers(turns, config)
        template = template_of(tokenizer.chat_template, config.hosts)
        text, spans = write_chat(for_template(turns, config), template)
        require_tokens(text, layouts, config, template)
    spelled = tokenizer.spell(text)
    if spelled is None:
        raise ValueError(_NO_PLACES)
    return Prompt(spelled.tokens, _learnt(spelled, spans))


def _require_plain_answers(turns: Sequence[Turn], config: DataConfig) -> None:
    """Refuse answers with items that the template would write, which could not be told apart."""
    for number, turn in enumerate(turns, 1):
        for kind in config.hosts.values():
            if turn.role == "assistant" and kind.part and kind.placeholder in turn.text:
                raise ValueError(
                    f"turn {number}, an answer, has {kind.words.one}: expected them in questions "
                    f"alone; move it to the question before"
                )


def inline(turns: Sequence[Turn], config: DataConfig) -> list[Turn]:
    """Turns with items as they are written where no chat template writes them."""
    return [Turn(turn.role, write_inline(turn.text, config.hosts)) for turn in turns]


def for_template(turns: Sequence[Turn], config: DataConfig) -> Sequence[Turn]:
    """Turns as the result of `template_of` takes them: with placeholders, or with tokens."""
    if any(kind.part for kind in config.hosts.values()):
        return turns
    return inline(turns, config)


def require_tokens(text: str, layouts: Layouts, config: DataConfig, template: ChatTemplate) -> None:
    """Refuse a chat in which the template has dropped or repeated items.

    Raises:
        ValueError: A module has more or fewer tokens than items.
    """
    for module, kind in config.hosts.items():
        found, wanted = text.count(kind.token), len(layouts.get(module, ()))
        if found != wanted:
            taken = f"lists of texts and {kind.words.plural}" if kind.part else "texts"
            raise ValueError(
                f"{template.name} makes {found} placeholders of {wanted} "
                f"({kind.token}): choose another --tokenizer-prompt-format, or a "
                f"template that takes {taken}"
            )


def _learnt(spelled: Spelled, spans: Sequence[Span]) -> list[bool]:
    """Whether each token stands for a character of the spans.

    A token may also stand for characters beside a span, such as a blank that the template writes in
    front of an answer: whoever writes the answer writes that token.
    """
    targets = [False] * len(spelled.tokens)
    for start, stop in spans:
        first, last = bisect_right(spelled.stops, start), bisect_left(spelled.starts, stop)
        targets[first:last] = [True] * (last - first)
    return targets


def with_rows(prompt: Prompt, layouts: Layouts, config: DataConfig, tokenizer: Tokenizer) -> Prompt:
    """The same with the rows and marks of items in place of their placeholders."""
    items: list[tuple[int, list[int]]] = []
    for module, kind in config.hosts.items():
        token, of_module, words = (
            tokenizer.placeholder_ids[module],
            layouts.get(module, ()),
            kind.words,
        )
        places = _places(prompt.tokens, token)
        if len(places) != len(of_module):
            rows = sum(piece for layout in of_module for piece in layout if isinstance(piece, int))
            written = len(places) - len(of_module) + rows
            raise ValueError(
                f"{written} {words.noun} tokens for {rows} rows of its {words.plural}: "
                f"its text contains the {words.noun} token (id {token}) outside of placeholders; "
                f"remove it, or choose another {words.placeholder}"
            )
        if places:
            marks = {mark: _mark(mark, tokenizer) for mark in kind.marks}
            runs = (_written(layout, token, marks) for layout in of_module)
            items += zip(places, runs, strict=True)
    if not items:
        return prompt
    tokens: list[int] = []
    targets: list[bool] = []
    done = 0
    for at, run in sorted(items):
        tokens += prompt.tokens[done:at]
        targets += prompt.targets[done:at]
        tokens += run
        targets += [False] * len(run)
        done = at + 1
    return Prompt(tokens + prompt.tokens[done:], targets + prompt.targets[done:])


def _places(tokens: list[int], token: int) -> list[int]:
    places: list[int] = []
    for _ in range(tokens.count(token)):
        places.append(tokens.index(token, places[-1] + 1 if places else 0))
    return places


def _mark(mark: str, tokenizer: Tokenizer) -> list[int]:
    token = tokenizer.token_id(mark)
    return tokenizer.encode(mark) if token is None else [token]


def _written(layout: Layout, token: int, marks: Mapping[str, list[int]]) -> list[int]:
    """Tokens of an item."""
    tokens: list[int] = []
    for piece in layout:
        tokens += [token] * piece if isinstance(piece, int) else marks[piece]
    return tokens


def tokenizer_for(config: DataConfig, path: str | None) -> Tokenizer:
    """The tokenizer that writes the prompts of the settings.

    Args:
        config: Prompt format and kinds of items.
        path: Path to the folder of a Hugging Face tokenizer; None for the byte tokenizer.

    Raises:
        ValueError: The folder has no tokenizer, or this does not support the settings.
    """
    tokenizer = build_tokenizer(path, placeholders(config.hosts))
    check_prompt_format(config, tokenizer)
    return tokenizer


def check_prompt_format(config: DataConfig, tokenizer: Tokenizer) -> None:
    """Refuse settings that the tokenizer does not support.

    Raises:
        ValueError: The tokenizer has no chat template, or lacks the tokens of the format or of a
            module's marks.
    """
    chosen = format_of(config, tokenizer)
    if chosen == "chat" and tokenizer.chat_template is None:
        raise ValueError(
            "--tokenizer-prompt-format chat: the tokenizer has no chat template; give a "
            "--tokenizer-model whose folder has one (chat_template.jinja), or choose plain"
        )
    if chosen == "chat" and tokenizer.chat_template is not None:
        problem = tokenizer.chat_template.problem
        if problem is not None:
            raise ValueError(problem)
    if chosen == "nemotron6-moe":
        marks = (TURN_START, TURN_END)
        _require_tokens(tokenizer, marks, f"--tokenizer-prompt-format {chosen}")
    if chosen != "plain" and tokenizer.spell("a") is None:
        raise ValueError(_NO_PLACES)
    if not isinstance(tokenizer, ByteTokenizer):
        for kind in config.hosts.values():
            _require_tokens(tokenizer, kind.marks, kind.words.tags)


def _require_tokens(tokenizer: Tokenizer, needed: Sequence[str], chosen: str) -> None:
    lacking = [token for token in needed if tokenizer.token_id(token) is None]
    if lacking:
        raise ValueError(
            f"{chosen} needs {' and '.join(needed)} in the tokenizer's vocabulary, which has "
            f"no {' and no '.join(lacking)}: give another --tokenizer-model, or leave "
            f"{chosen.split()[0]} out"
        )


def format_of(config: DataConfig, tokenizer: Tokenizer) -> str:
    """The format of conversations: the chosen one, else the tokenizer's own, else plain."""
    if config.prompt_format is not None:
        return config.prompt_format
    return "plain" if tokenizer.chat_template is None else "chat"


def joined(stretches: Iterable[Stretch]) -> Iterator[Stretch]:
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
    """Whether the only turn is the assistant's: text to learn completely, without a format."""
    return len(turns) == 1 and turns[0].role == "assistant"


def plain(turns: Sequence[Turn]) -> list[Stretch]:
    """A line for each prompt, and each answer with the end-of-sequence token."""
    return [
        Stretch(turn.text, learnt=True, ends=True)
        if turn.role == "assistant"
        else Stretch(f"{turn.text}\n")
        for turn in turns
    ]


def nemotron6_moe(turns: Sequence[Turn]) -> tuple[str, list[Span]]:
    """Each turn between its marks, as Nemotron 6 MoE models are trained, and what of it is learnt.

    An answer is learnt, with its reasoning and the mark of its end; the line break after it is not.
    """
    written, spans = "", []
    for turn in turns:
        written += f"{TURN_START}{turn.role}\n"
        start = len(written)
        written += f"{turn.text}{TURN_END}"
        if turn.role == "assistant":
            spans.append((start, len(written)))
        written += "\n"
    return written, spans
