"""Messages and settings of tasks of lmms-eval, in our words. Does not import lmms-eval."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_mimo.data import Turn

_SAMPLING = ("temperature", "top_p", "top_k", "max_new_tokens", "seed")
# The last one says how transformers computes, not what.
_UNDERSTOOD = {*_SAMPLING, "do_sample", "until", "use_cache"}


def turns_of(
    messages: Sequence[Mapping[str, Any]], placeholder: str
) -> tuple[list[Turn], list[Any]]:
    """Turns and images of a task's messages.

    Args:
        messages: Messages, each with a role and a list of parts: {"type": "text", "text": ...} or
            {"type": "image", "url": ...}, an image of Pillow or the path of a file.
        placeholder: Placeholder of an image. In a text of the task it is no image, and left out.

    Raises:
        ValueError: A part is of another type.
    """
    turns, images = [], []
    for message in messages:
        text = ""
        for part in message["content"]:
            match part["type"]:
                case "text":
                    text += part["text"].replace(placeholder, "")
                case "image":
                    images.append(part["url"])
                    text += placeholder
                case other:
                    raise ValueError(
                        f"a message of the task has a part of type {other}: expected text and image"
                    )
        turns.append(Turn(message["role"], text))
    return turns, images


def sampling_of(how: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Fields of `Sampling`, and texts that end an answer, from a task's `generation_kwargs`."""
    sampling = {name: how[name] for name in _SAMPLING if how.get(name) is not None}
    if how.get("do_sample") is False:
        sampling["temperature"] = 0.0
    elif how.get("do_sample"):
        # As in transformers.
        sampling.setdefault("temperature", 1.0)
    until = how.get("until") or []
    return sampling, [end for end in ([until] if isinstance(until, str) else until) if end]


def without_effect(how: Mapping[str, Any]) -> set[str]:
    """Names of a task's `generation_kwargs` that this program does not know."""
    return {
        name for name in how.keys() - _UNDERSTOOD if not (name == "num_beams" and how[name] == 1)
    }
