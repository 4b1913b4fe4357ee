"""What has been said in a conversation: its turns, and the images of all of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_mimo.data import Turn
    from megatron_mimo.inference import LoadedModel, Stream


@dataclass(frozen=True, kw_only=True, slots=True)
class History:
    """A conversation so far; every question and answer makes another one.

    Attributes:
        turns: Its turns, with a placeholder for each image.
        images: Paths to the images of all turns, in the order of their placeholders.
    """

    turns: "tuple[Turn, ...]" = ()
    images: tuple[str, ...] = ()

    def asked(self, model: "LoadedModel", question: str, images: Sequence[str]) -> "History":
        """With a question, and images that it is about, at its end.

        Raises:
            ValueError: The model takes no images, or placeholders and images differ in number.
        """
        from megatron_mimo.data import Turn

        turn = Turn("user", model.with_placeholders(question, images))
        return History(turns=(*self.turns, turn), images=(*self.images, *images))

    def answered(self, text: str) -> "History":
        """With the answer to its last question."""
        from megatron_mimo.data import Turn

        return History(turns=(*self.turns, Turn("assistant", text)), images=self.images)

    def stream(self, model: "LoadedModel", sampling: dict[str, Any]) -> "Stream":
        """The answer to its last question, piece by piece.

        Raises:
            ValueError: An image cannot be used, or a field of `Sampling` is out of bounds.
        """
        return model.stream(self.turns, self.images, **sampling)
