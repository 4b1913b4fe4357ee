"""How a tokenizer writes conversations, and which parts of the text its model learns.

What a template marks with `{% generation %}` is learnt. Few templates do: in the text of others the
answers are found by writing the conversation once more with marks around them. What the template
writes beside an answer, such as a blank in front of it or empty thoughts, is not the answer's.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Protocol

from megatron_mimo.data.text.conversation import Turn

Message = Mapping[str, Any]
# First and one past the last character of a part of a text.
Span = tuple[int, int]

_PRIVATE_USE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
_REMEDY = "mark answers in the template with {% generation %}"
_PROBE = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


class ChatTemplate(Protocol):
    """How a tokenizer writes conversations; a message has a role and a content, a text.

    Templates of vision-language models take lists of parts as contents too.

    Attributes:
        name: Which template it is, for messages: "the chat template of FOLDER".
        source: Its text, in the language of jinja.
        problem: Why it cannot be used for any conversation, and what to do; None if it can.
    """

    name: str
    source: str
    problem: str | None

    def render(self, messages: Sequence[Message], *, opens_answer: bool = False) -> str:
        """Write messages out.

        Args:
            messages: Messages in order.
            opens_answer: Whether what the template writes in front of an answer follows them.

        Raises:
            ValueError: The template refuses them.
        """
        ...

    def render_marked(self, messages: Sequence[Message]) -> tuple[str, list[Span] | None]:
        """Write messages out, with where its generated parts begin and end.

        Returns:
            The text, and its generated parts; None where the template does not mark any.

        Raises:
            ValueError: The template refuses them.
        """
        ...


class HuggingFaceChatTemplate:
    """The template in a `transformers` tokenizer's folder.

    Of several with names it is the one that `transformers` chooses, "default".

    Args:
        tokenizer: Tokenizer of `transformers`, with a chat template.
        path: Folder that it is from, for messages.
    """

    def __init__(self, tokenizer: Any, path: str) -> None:
        self.name = f"the chat template of {path}"
        self.problem: str | None = None
        self.source = ""
        self._tokenizer = tokenizer
        named = tokenizer.chat_template
        if isinstance(named, dict) and "default" not in named:
            self.problem = (
                f"{path} has the chat templates {', '.join(sorted(named))} and none by the name "
                f"default: choose another --tokenizer-prompt-format, or name one of them default "
                f"(chat_template.jinja in its folder)"
            )
            return
        self.source = tokenizer.get_chat_template()
        self._marks = re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", self.source) is not None
        self.problem = self._wrong_syntax()

    def render(self, messages: Sequence[Message], *, opens_answer: bool = False) -> str:
        """Write messages out."""
        return self._render(messages, opens_answer=opens_answer)[0]

    def render_marked(self, messages: Sequence[Message]) -> tuple[str, list[Span] | None]:
        """Write messages out, with what stands in `generation` blocks."""
        text, marked = self._render(messages)
        return text, marked if self._marks else None

    def _render(
        self, messages: Sequence[Message], *, opens_answer: bool = False
    ) -> tuple[str, list[Span]]:
        if self.problem is not None:
            raise ValueError(self.problem)
        try:
            return self._render_any(messages, opens_answer=opens_answer)
        # A template is a program of the folder's: it may raise whatever a program raises.
        except Exception as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(
                f"{self.name} refuses a conversation of {roles} ({_line(error)}): change the "
                f"sample, or choose another --tokenizer-prompt-format"
            ) from error

    def _render_any(
        self, messages: Sequence[Message], *, opens_answer: bool = False
    ) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        (text,), marked = render_jinja_template(
            conversations=[list(messages)],
            chat_template=self.source,
            return_assistant_tokens_mask=self._marks,
            add_generation_prompt=opens_answer,
            # Thoughts of earlier turns are learnt too; templates that do not know the name pass it
            # over.
            truncate_history_thinking=False,
            **self._tokenizer.special_tokens_map,
        )
        return text, [(start, stop) for start, stop in marked[0]] if marked else []

    def _wrong_syntax(self) -> str | None:
        from jinja2.exceptions import TemplateSyntaxError

        try:
            self._render_any(_PROBE)
        except TemplateSyntaxError as error:
            return (
                f"{self.name} is none ({_line(error)}, line {error.lineno}): correct it, or choose "
                f"another --tokenizer-prompt-format"
            )
        # It may refuse or fail on this conversation and take others.
        except Exception:
            return None
        return None


def _line(error: Exception) -> str:
    from jinja2.exceptions import TemplateError

    text = " ".join(str(error).split())
    return text if isinstance(error, TemplateError) else f"{type(error).__name__}: {text}"


# -- what is learnt --------------------------------------------------------------------------------


def write_chat(turns: Sequence[Turn], template: ChatTemplate) -> tuple[str, list[Span]]:
    """The whole conversation as the template writes it, and what of it is learnt.

    Without marks of the template's own, that is each answer with what follows it in its turn, its
    end token, but no white space at the end.

    Raises:
        ValueError: The template refuses the conversation, changes an answer by more than white
            space around it, or ends a turn in another way where more follow.
    """
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    whole, marked = template.render_marked(messages)
    if marked is not None:
        return whole, marked
    answers = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
    spans = []
    for index, (start, stop) in zip(
        answers, _find(answers, messages, whole, template), strict=True
    ):
        rest = whole[stop:]
        if index + 1 < len(turns):
            rest = _end_of_turn(messages[: index + 1], rest, len(turns), template)
        spans.append((start, stop + len(rest.rstrip())))
    return whole, spans


def _find(
    answers: Sequence[int], messages: Sequence[Message], whole: str, template: ChatTemplate
) -> list[Span]:
    """Where in the whole the answers stand."""
    found = _try_find(answers, messages, whole, template)
    if found is not None:
        return found
    wrong = next(
        (at for at in answers if _try_find([at], messages, whole, template) is None), answers[0]
    )
    text = messages[wrong]["content"]
    short = text if len(text) <= 40 else f"{text[:37]}..."
    raise ValueError(
        f"{template.name} changes turn {wrong + 1}, the answer {short!r}: choose another "
        f"--tokenizer-prompt-format, write the answer as the template does (some leave out "
        f"thoughts of earlier turns), or {_REMEDY}"
    )


def _try_find(
    answers: Sequence[int], messages: Sequence[Message], whole: str, template: ChatTemplate
) -> list[Span] | None:
    """Places of answers by marks around them, or after them alone.

    A short answer also occurs by chance, in the name of a role for one, so it is not searched for.
    Templates that look for thoughts at the beginning of an answer lose a mark in front of it.
    """
    mark = _unused_mark(messages, whole)
    texts = [messages[index]["content"] for index in answers]
    both = _render_with(answers, messages, mark, mark, template).split(mark)
    found = _align(both[::2], texts, whole) if both[1::2] == texts else None
    if found is not None:
        return found
    pieces = _render_with(answers, messages, "", mark, template).split(mark)
    if len(pieces) != len(texts) + 1:
        return None
    beside, kept = [], []
    for piece, text in zip(pieces, texts, strict=False):
        form = next((form for form in _left_stripped(text) if piece.endswith(form)), None)
        if form is None:
            return None
        beside.append(piece[: len(piece) - len(form)])
        kept.append(form)
    return _align([*beside, pieces[-1]], kept, whole)


def _align(beside: Sequence[str], answers: Sequence[str], whole: str) -> list[Span] | None:
    """Places of the answers in a text that consists of them and of what stands beside them.

    Args:
        beside: Texts before, between and after the answers.
        answers: Texts of the answers; the whole may lack white space at their ends, which templates
            strip where no mark protects it.
        whole: The text.
    """
    if not whole.startswith(beside[0]):
        return None
    spans: list[Span] = []
    at = len(beside[0])
    for answer, follows in zip(answers, beside[1:], strict=True):
        is_last = len(spans) + 1 == len(answers)
        behind = next(
            (
                end
                for end in _ends(answer, whole, at)
                if (whole[end:] == follows if is_last else whole.startswith(follows, end))
            ),
            None,
        )
        if behind is None:
            return None
        spans.append((at, behind))
        at = behind + len(follows)
    return spans


def _ends(answer: str, whole: str, at: int) -> Iterator[int]:
    """Where an answer that begins in the whole may end, with more or less white space around it."""
    for form in _left_stripped(answer):
        kept = len(form.rstrip())
        if whole.startswith(form[:kept], at):
            for length in range(len(form), kept - 1, -1):
                if whole.startswith(form[:length], at):
                    yield at + length


def _left_stripped(text: str) -> Iterator[str]:
    """The text without none, one, and so on to all of the white space that it begins with."""
    for start in range(len(text) - len(text.lstrip()) + 1):
        yield text[start:]


def _end_of_turn(
    messages: Sequence[Message], rest: str, num_turns: int, template: ChatTemplate
) -> str:
    """What belongs to the last of the messages after its answer.

    Args:
        messages: The conversation up to an answer.
        rest: Text of the whole conversation after that answer.
        num_turns: Number of turns of the whole conversation.
        template: Writes the messages.
    """
    mark = _unused_mark(messages, rest)
    upto = _render_with([len(messages) - 1], messages, "", mark, template)
    _, found, end = upto.rpartition(mark)
    if not found or not rest.startswith(end):
        raise ValueError(
            f"{template.name} writes turn {len(messages)} of {num_turns} in another way when more "
            f"follow, so its answer cannot be told apart: choose another "
            f"--tokenizer-prompt-format, or {_REMEDY}"
        )
    return end


def _render_with(
    answers: Sequence[int],
    messages: Sequence[Message],
    before: str,
    behind: str,
    template: ChatTemplate,
) -> str:
    marked = list(messages)
    for index in answers:
        message = messages[index]
        marked[index] = {**message, "content": f"{before}{message['content']}{behind}"}
    return template.render(marked)


def _unused_mark(messages: Sequence[Message], whole: str) -> str:
    """A character for private use that no text has."""
    texts = (whole, *(message["content"] for message in messages))
    marks = map(chr, chain(*_PRIVATE_USE))
    return next(mark for mark in marks if not any(mark in text for text in texts))
