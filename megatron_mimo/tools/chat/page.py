"""The page of `chat --web`: a conversation in a browser.

Gradio is imported by nothing else than this module and `serve`.
"""

import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio

from megatron_mimo.border import reason_of
from megatron_mimo.inference.sampling import Sampling
from megatron_mimo.settings.ranges import MOST_POSITIONS
from megatron_mimo.tools.chat.history import History
from megatron_mimo.tools.generate.command import fields_of

if TYPE_CHECKING:
    from megatron_mimo.inference import LoadedModel, Stream

_NOT_ANSWERED = "Not answered"
_HEIGHT = "70vh"


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """One visitor's conversation, which stays on this side: nothing of it comes from a browser.

    Attributes:
        history: What the model has been asked and has answered.
        messages: What the page shows, also of questions that were refused, in gradio's form.
    """

    history: History = field(default_factory=History)
    messages: tuple[dict[str, Any], ...] = ()

    def asking(self, text: str, images: list[str]) -> "Shown":
        """With a question on the page."""
        files = [_message("user", {"path": image}) for image in images]
        asked = [_message("user", text)] if text else []
        return Shown(history=self.history, messages=(*self.messages, *files, *asked))

    def answering(self, asked: History, text: str) -> "Shown":
        """With an answer, or what there is of it."""
        answer = _message("assistant", text)
        return Shown(history=asked.answered(text), messages=(*self.messages, answer))

    def refusing(self, reason: str) -> "Shown":
        """With the reason why a question is not answered; the model will never see either."""
        line = _message("assistant", reason, metadata={"title": _NOT_ANSWERED})
        return Shown(history=self.history, messages=(*self.messages, line))


class Questions:
    """Answers the questions of all visitors, one at a time.

    Args:
        model: The model that answers.
        sampling: How tokens are chosen where the page has no control.
    """

    def __init__(self, model: "LoadedModel", sampling: Sampling) -> None:
        self._model = model
        self._sampling = fields_of(sampling)
        # An answer that is stopped ends with the token that is being computed.
        self._turn = threading.Lock()

    def answer(
        self, asked: dict[str, Any] | None, shown: Shown, chosen: dict[str, Any]
    ) -> Iterator[Shown]:
        """The page's states while a question is answered.

        Args:
            asked: The question: its "text", and paths to its images, "files".
            shown: The conversation before it.
            chosen: Fields of `Sampling` from the page's controls.
        """
        given = asked or {}
        text: str = given.get("text") or ""
        images: list[str] = given.get("files") or []
        if not text.strip() and not images:
            yield shown
            return
        before = shown.asking(text, images)
        yield before
        try:
            question = shown.history.asked(self._model, text, images)
            with self._turn:
                stream = question.stream(self._model, self._sampling | chosen)
            written = ""
            while (piece := self._next(stream)) is not None:
                written += piece
                yield before.answering(question, written)
        except (ValueError, RuntimeError, MemoryError) as error:
            # The question can be asked in another way. Memory that does not suffice, which long
            # conversations come to, is a RuntimeError in torch.
            yield before.refusing(_without_folders(_reason(error), images))
            return
        yield before.answering(question, written)

    def _next(self, stream: "Stream") -> str | None:
        with self._turn:
            return next(stream, None)


def build_page(model: "LoadedModel", name: str, sampling: Sampling) -> gradio.Blocks:
    """The page, not served yet.

    Args:
        model: The model that answers.
        name: Name of the model, for the title.
        sampling: First values of the controls, and the fields that have none.
    """
    questions = Questions(model, sampling)
    with gradio.Blocks(
        title=f"{name} - megatron-mimo", analytics_enabled=False, fill_height=True
    ) as page:
        state = gradio.State(Shown())
        chat = gradio.Chatbot(
            label=name, height=_HEIGHT, buttons=["copy"], allow_tags=False, feedback_options=None
        )
        box = gradio.MultimodalTextbox(
            sources=["upload"],
            file_types=["image"],
            file_count="multiple",
            show_label=False,
            placeholder="A question, with images if it is about any",
            stop_btn=False,
            autofocus=True,
        )
        # A subclass would be another component to gradio's page.
        box.async_move_resource_to_block_cache = _only_here(box.async_move_resource_to_block_cache)
        with gradio.Row():
            stop = gradio.Button("Stop", elem_id="stop", interactive=False)
            new = gradio.Button("New conversation", elem_id="new")
        with gradio.Accordion("How tokens are chosen", open=False):
            temperature = gradio.Slider(0, 2, sampling.temperature, step=0.05, label="temperature")
            top_p = gradio.Slider(0.05, 1, sampling.top_p, step=0.05, label="top-p")
            most = gradio.Number(
                sampling.max_new_tokens,
                label="max-new-tokens",
                precision=0,
                minimum=1,
                maximum=MOST_POSITIONS,
            )
        waiting = gradio.State(None)

        def answer(
            asked: Any, shown: Shown, temperature: float, top_p: float, most: int
        ) -> Iterator[tuple[Shown, list[dict[str, Any]]]]:
            chosen = {"temperature": temperature, "top_p": top_p, "max_new_tokens": most}
            for now in questions.answer(asked, shown, chosen):
                yield now, list(now.messages)

        hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        quick: dict[str, Any] = hidden | {"queue": False}
        taken = box.submit(_take, [box], [waiting, box, stop], **quick)
        controls = [temperature, top_p, most]
        answered = taken.then(
            answer, [waiting, state, *controls], [state, chat], concurrency_limit=1, **hidden
        )
        answered.then(_ready, None, [box, stop], **quick)
        stop.click(_ready, None, [box, stop], cancels=[answered], **quick)
        # The sign in the corner of the conversation does what the button does.
        for begin in (new.click, chat.clear):
            begin(_new, None, [state, chat, box, stop], cancels=[answered], **quick)
    return page


def _only_here(take: Callable[[Any], Awaitable[Any]]) -> Callable[[Any], Awaitable[Any]]:
    """What takes an image of the page, without addresses, which gradio would follow."""

    async def take_file(path: Any) -> Any:
        if path is not None and not Path(str(path)).is_file():
            raise gradio.Error("an image is not there: expected a file that was added on this page")
        return await take(path)

    return take_file


def _take(asked: dict[str, Any]) -> tuple[dict[str, Any], Any, Any]:
    """The question, and the page while it is answered: nothing to type, something to stop."""
    return asked, gradio.update(value=None, interactive=False), gradio.update(interactive=True)


def _ready() -> tuple[Any, Any]:
    """The page that waits for a question."""
    return gradio.update(interactive=True), gradio.update(interactive=False)


def _new() -> tuple[Any, ...]:
    """The page without a conversation."""
    return Shown(), [], *_ready()


def _message(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def _reason(error: Exception) -> str:
    if isinstance(error, ValueError):
        return reason_of(error)
    return f"{reason_of(error)}; ask less at once, or begin a new conversation"


def _without_folders(reason: str, images: list[str]) -> str:
    """The reason with the names of images as the visitor knows them."""
    for image in images:
        reason = reason.replace(image, Path(image).name)
    return reason
