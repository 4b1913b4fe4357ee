"""Which characters of a stored text are text: one rule for every source."""

_BYTE_ORDER_MARK = "\ufeff"


class MalformedError(Exception):
    """Text that is broken rather than of another form."""


def clean_text(text: str) -> str:
    """A stored text without what files carry beside their text, and other readers drop.

    That is a byte-order mark in front of it, and carriage returns: line ends become line feeds.

    Raises:
        MalformedError: It has half of a surrogate pair.
    """
    require_unicode(text, "text")
    return text.removeprefix(_BYTE_ORDER_MARK).replace("\r\n", "\n").replace("\r", "\n")


def require_unicode(text: str, what: str) -> None:
    """Refuse half of a surrogate pair, which JSON can spell and no tokenizer or file system takes.

    Args:
        text: The text.
        what: What it is, for the message.

    Raises:
        MalformedError: It has one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise MalformedError(
            f"its {what} is not valid Unicode: {error.reason} (character {error.start + 1})"
        ) from error
