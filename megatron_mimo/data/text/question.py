"""Conversation so far, to the tokens that a model continues: its next answer begins after them.

They are the tokens that stand in front of an answer in training (`prompt`), by the same code. In a
chat they are those of the template's own `add_generation_prompt`.
"""

from bisect import bisect_right
from collections.abc import Sequence

from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.text.chat_template import ChatTemplate
from megatron_mimo.data.text.conversation import Turn
from megatron_mimo.data.text.parts import template_of
from megatron_mimo.data.text.placeholders import require_no_tokens
from megatron_mimo.data.text.prompt import (
    TURN_START,
    Layouts,
    Prompt,
    encode_text,
    for_template,
    format_of,
    inline,
    joined,
    nemotron6_moe,
    plain,
    require_tokens,
    with_rows,
    write_prompt,
)
from megatron_mimo.data.text.tokenizer import Tokenizer

# A character for private use, which no question has.
_MARK = "\ue000"


def write_question(
    turns: Sequence[Turn],
    layouts: Layouts,
    config: DataConfig,
    tokenizer: Tokenizer,
) -> list[int]:
    """Write a conversation that ends with a question.

    Args:
        turns: Turns with one placeholder for each item; the last one is not the assistant's.
        layouts: Module -> how each of its items is written, in the order of its placeholders.
        config: Prompt format, and kinds of items.
        tokenizer: Tokenizer of the texts.

    Returns:
        Numbers of the tokens, with placeholders expanded to the rows of their items.

    Raises:
        ValueError: The tokenizer's chat template cannot write this conversation; the tokens have
            more or fewer places for items than there are items.
    """
    require_no_tokens([turn.text for turn in turns], config.hosts)
    chosen = format_of(config, tokenizer)
    if chosen == "plain":
        prompt = encode_text(joined(plain(turns)), config, tokenizer)
    else:
        cut = 0
        if chosen == "nemotron6-moe":
            text = f"{nemotron6_moe(inline(turns, config))[0]}{TURN_START}assistant\n"
        else:
            assert tokenizer.chat_template is not None
            template = template_of(tokenizer.chat_template, config.hosts)
            text, cut = _opened(for_template(turns, config), template)
            require_tokens(text, layouts, config, template)
        tokens = _up_to(cut, text, tokenizer) if cut else tokenizer.encode(text)
        prompt = Prompt(tokens, [False] * len(tokens))
    return with_rows(prompt, layouts, config, tokenizer).tokens


def _opened(turns: Sequence[Turn], template: ChatTemplate) -> tuple[str, int]:
    """The conversation as the template writes it, with what it writes in front of an answer.

    Returns:
        The text, and 0. A template without `add_generation_prompt` is asked for an answer; then the
        text ends with that answer, and the number is that of the characters in front of it, without
        blanks.
    """
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    opened = template.render(messages, opens_answer=True)
    if opened != template.render(messages):
        return opened, 0
    answered = template.render([*messages, {"role": "assistant", "content": _MARK}])
    before, mark, _ = answered.partition(_MARK)
    if not mark or not before.startswith(opened):
        return opened, 0
    # A blank in front of an answer is a part of its first token, in nearly every vocabulary.
    return f"{before}a", len(before.rstrip(" "))


def _up_to(cut: int, text: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a text that stand for its first characters alone."""
    spelled = tokenizer.spell(text)
    assert spelled is not None  # `check_prompt_format` has asked.
    return spelled.tokens[: bisect_right(spelled.stops, cut)]


def answer_ends(config: DataConfig, tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that end an answer: the tokenizer's end of sequence, and the format's own.

    The latter is what the model learns to write after every answer, where that is a special token.
    """
    learnt = []
    for answer in ("a", "b"):
        turns = (Turn("user", "?"), Turn("assistant", answer))
        try:
            prompt = write_prompt(turns, {}, config, tokenizer)
        except ValueError:  # A template may insist on other roles, or on an item.
            return frozenset({tokenizer.eos_id})
        learnt.append(
            [t for t, target in zip(prompt.tokens, prompt.targets, strict=True) if target]
        )
    found = {tokenizer.eos_id}
    if all(learnt) and learnt[0][-1] == learnt[1][-1] and not tokenizer.decode(learnt[0][-1:]):
        found.add(learnt[0][-1])
    return frozenset(found)
