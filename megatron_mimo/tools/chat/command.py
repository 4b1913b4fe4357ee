"""`megatron-mimo chat`: a conversation on a terminal, whose history the model sees."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_mimo.border import printable
from megatron_mimo.tools.chat.history import History
from megatron_mimo.tools.generate.command import fields_of, open_model
from megatron_mimo.tools.generate.config import ChatConfig

if TYPE_CHECKING:
    from megatron_mimo.inference import LoadedModel

_PROMPT = "> "
_HELP = """\
/image PATH  add an image to the next question; again for another one
/reset       forget the conversation and its images
/exit        leave; so does the end of the input
Ctrl-C       while the model answers: stop it there"""


class Conversation:
    """A conversation with a model on a terminal, line by line.

    Attributes:
        history: What has been said.

    Args:
        model: The model that answers.
        config: Values of the flags.
        write: Where to write.
    """

    def __init__(
        self, model: "LoadedModel", config: ChatConfig, write: Callable[[str], object]
    ) -> None:
        self._model = model
        self._config = config
        self._write = write
        self.history = History()
        # Images of the next question.
        self._waiting: list[str] = []
        self._commands: Mapping[str, Callable[[str], bool]] = {
            "/image": self._add_image,
            "/reset": self._reset,
            "/exit": lambda _: False,
            "/help": self._help,
        }
        for image in config.image:
            self._add_image(image)

    def take(self, line: str) -> bool:
        """Take one line that was typed: a command, or a question.

        Returns:
            Whether the conversation goes on.
        """
        line = line.strip()
        if not line:
            return True
        if not line.startswith("/"):
            return self._ask(line)
        name, _, rest = line.partition(" ")
        if name not in self._commands:
            self._say(f"{name} is not known: expected {', '.join(self._commands)}, or a question")
            return True
        return self._commands[name](rest.strip())

    def _ask(self, question: str) -> bool:
        try:
            asked = self.history.asked(self._model, question, self._waiting)
            stream = asked.stream(self._model, fields_of(self._config.sampling))
        except ValueError as error:
            # The question can be asked in another way.
            self._say(f"error: {error}")
            return True
        try:
            for piece in stream:
                self._write(printable(piece))
        except KeyboardInterrupt:
            pass
        self._write("\n")
        self.history, self._waiting = asked.answered(stream.answer.text), []
        return True

    def _add_image(self, path: str) -> bool:
        if not path:
            self._say("/image without a path: expected /image PATH")
        elif not Path(path).is_file():
            self._say(f"{path} is not there: expected an image file")
        else:
            self._waiting.append(path)
            self._say(f"the next question is about {' and '.join(self._waiting)}")
        return True

    def _reset(self, _: str) -> bool:
        self.history, self._waiting = History(), []
        self._say("the conversation is forgotten")
        return True

    def _help(self, _: str) -> bool:
        self._say(_HELP)
        return True

    def _say(self, text: str) -> None:
        self._write(f"{printable(text)}\n")


def run_chat(run: str, config: ChatConfig) -> int:
    """Load the model and talk until the end of the input, or serve a page with --web.

    Args:
        run: Folder of the run, or of a model.
        config: Values of the flags.

    Returns:
        The exit code, 0.

    Raises:
        ValueError: There is no model, or it is damaged; the message names it.
    """
    if config.web:
        from megatron_mimo.tools.chat.serve import serve_chat

        return serve_chat(run, config)
    model = open_model(run, config.model)
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if on_terminal:
        import readline  # noqa: F401 (input() edits lines with it)

        _write("/help lists commands, /exit leaves\n")
    conversation = Conversation(model, config, _write)
    while True:
        try:
            line = input(_PROMPT if on_terminal else "")
        except EOFError:
            if on_terminal:
                _write("\n")
            return 0
        if not conversation.take(line):
            return 0


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
