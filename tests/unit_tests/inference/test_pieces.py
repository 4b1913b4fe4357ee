"""Pieces of a text: whole characters, and together the text of all tokens."""

from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mimo.data import ByteTokenizer
from megatron_mimo.data.text.tokenizer import HuggingFaceTokenizer, Tokenizer
from megatron_mimo.inference.pieces import Pieces
from tests.properties import examples
from tests.unit_tests.data.text.chats import save_tokenizer

_MARK = "\N{REPLACEMENT CHARACTER}"
TEXTS = st.text(st.sampled_from("ab é\n日本😀ﬁ.,'"), max_size=12)


def written(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    pieces = Pieces(tokenizer)
    return [*map(pieces.push, tokens), pieces.flush()]


@examples(200)
@given(TEXTS)
def test_pieces_of_bytes_are_whole_characters(text: str) -> None:
    tokenizer = ByteTokenizer()
    pieces = written(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text
    assert not any(_MARK in piece for piece in pieces)
    # Each comes with the last of its bytes.
    assert [piece for piece in pieces if piece] == list(text)


@examples(200)
@given(st.lists(st.integers(0, 259), max_size=12))
def test_bytes_that_are_no_text_are_marked_and_lose_nothing(tokens: list[int]) -> None:
    tokenizer = ByteTokenizer()
    assert "".join(written(tokenizer, tokens)) == tokenizer.decode(tokens)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


@cache
def loaded(folder: Path, name: str) -> HuggingFaceTokenizer:
    save_tokenizer(name, str(folder / name))
    return HuggingFaceTokenizer(str(folder / name), {"encoder": "<image>"})


@pytest.mark.parametrize("name", ["byte-level", "metaspace first", "metaspace always"])
@examples(50)
@given(text=TEXTS)
def test_pieces_of_other_tokenizers_are_the_text_of_their_tokens(
    name: str, text: str, folders: Path
) -> None:
    tokenizer = loaded(folders, name)
    tokens = tokenizer.encode(text)
    assert "".join(written(tokenizer, tokens)) == tokenizer.decode(tokens)
