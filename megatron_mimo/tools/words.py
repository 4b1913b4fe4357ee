"""Words for modules in sentences of all commands."""

_IN_WORDS = {"llm": "language model"}


def in_words(module: str) -> str:
    """A module's name in a sentence."""
    return _IN_WORDS.get(module, module)
