"""Messages as the chat templates of vision-language models take them: lists of parts."""

from collections.abc import Sequence

from megatron_mimo.data.inputs import Inputs
from megatron_mimo.data.text.chat_template import ChatTemplate, Message, Span
from megatron_mimo.data.text.placeholders import split_text


def template_of(template: ChatTemplate, inputs: Inputs) -> ChatTemplate:
    """A template that takes texts with placeholders."""
    if any(kind.part for kind in inputs.values()):
        return _PartsTemplate(template, inputs)
    return template


class _PartsTemplate:
    """Gives each message to a template as a list of texts and items.

    Args:
        template: Template that takes such lists.
        inputs: Kinds of items.
    """

    def __init__(self, template: ChatTemplate, inputs: Inputs) -> None:
        self.name, self.source, self.problem = template.name, template.source, template.problem
        self._template, self._inputs = template, inputs

    def render(self, messages: Sequence[Message], *, opens_answer: bool = False) -> str:
        """Write messages out."""
        return self._template.render(self._parted(messages), opens_answer=opens_answer)

    def render_marked(self, messages: Sequence[Message]) -> tuple[str, list[Span] | None]:
        """Write messages out, with where its generated parts begin and end."""
        return self._template.render_marked(self._parted(messages))

    def _parted(self, messages: Sequence[Message]) -> list[Message]:
        return [
            {**message, "content": _parts(message["content"], self._inputs)} for message in messages
        ]


def _parts(text: str, inputs: Inputs) -> list[dict[str, str]]:
    parts: list[dict[str, str]] = []
    held = ""
    for piece, module in split_text(text, inputs):
        held += piece
        part = None if module is None else inputs[module].part
        if module is not None and part is None:
            held += inputs[module].inline
            continue
        if held:
            parts.append({"type": "text", "text": held})
            held = ""
        if part is not None:
            parts.append({"type": part})
    # A message of nothing is an empty text.
    return parts or [{"type": "text", "text": ""}]
