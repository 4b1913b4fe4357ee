"""Cards of questions on a page: images, what was asked, the model's answer and the right one."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mimo.tools import page

STYLE = """
  .grid { display: grid; gap: .75rem;
          grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)); }
  .grid figure { padding: .6rem; border: 1px solid #d9dce0; border-left: .3rem solid #2a7d4f;
                 border-radius: .3rem; background: #fff; overflow-wrap: anywhere; }
  .grid figure.wrong { border-left-color: #c0392b; }
  .grid img { height: 3.5rem; max-width: 100%; object-fit: contain; image-rendering: pixelated; }
  .grid audio { display: block; width: 100%; height: 2rem; margin: .3rem 0; }
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """An image file.

    Attributes:
        content: Contents of the file.
        media_type: Its media type, such as "image/png".
    """

    content: bytes
    media_type: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Sound:
    """An audio file of a kind that browsers play.

    Attributes:
        content: Contents of the file.
        media_type: Its media type, such as "audio/wav".
    """

    content: bytes
    media_type: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """A question with the answer of the model.

    Attributes:
        pictures: Images that it is about; those that move are videos.
        question: Text of the question.
        expected: The right answer.
        answer: Answer of the model.
        is_right: Whether the answer counts as right.
        sounds: Audio files that it is about.
        remark: Line in small print below it, such as the task; empty for none.
    """

    pictures: tuple[Picture, ...]
    question: str
    expected: str
    answer: str
    is_right: bool
    sounds: tuple[Sound, ...] = ()
    remark: str = ""


def grid(cards: Sequence[Card]) -> str:
    """HTML of cards side by side; a page with it needs `STYLE`."""
    return f'<div class="grid">{"".join(map(_figure, cards))}</div>'


def _figure(card: Card) -> str:
    said = page.escape(card.answer) or "(nothing)"
    verdict = (
        f"<b>{said}</b>"
        if card.is_right
        else f"<b>{said}</b>, should be <b>{page.escape(card.expected)}</b>"
    )
    remark = page.note(card.remark) if card.remark else ""
    return (
        f'<figure class="{"right" if card.is_right else "wrong"}">'
        f"{''.join(map(_image, card.pictures))}{''.join(map(_player, card.sounds))}"
        f"<figcaption>{page.escape(card.question)}<br>{verdict}{remark}</figcaption></figure>"
    )


def _image(picture: Picture) -> str:
    data = _data(picture.content, picture.media_type)
    return f'<img src="{data}" alt="image of the question">'


def _player(sound: Sound) -> str:
    return f'<audio controls src="{_data(sound.content, sound.media_type)}"></audio>'


def _data(content: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"
