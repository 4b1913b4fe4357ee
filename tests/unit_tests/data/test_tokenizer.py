from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mimo.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, build_tokenizer


@given(st.text())
def test_bytes_round_trip(text: str) -> None:
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.decode([*tokens, tokenizer.eos_id, tokenizer.pad_id]) == text
    special = {tokenizer.pad_id, tokenizer.eos_id, tokenizer.image_token_id}
    assert len(special) == 3
    assert not special & set(tokens)
    assert max(special) == tokenizer.num_tokens - 1 < tokenizer.vocab_size
    assert tokenizer.vocab_size % 128 == 0


def test_no_path_is_the_byte_tokenizer() -> None:
    assert isinstance(build_tokenizer(None, "<image>"), ByteTokenizer)


@pytest.fixture(scope="module")
def saved_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A word tokenizer, as `save_pretrained` writes it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[UNK]", "<image>", "</s>", "which", "digit", "seven"]
    model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    # Like many, it would add an end of sequence to each text.
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    path = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        unk_token="[UNK]",
        additional_special_tokens=["<image>"],
    ).save_pretrained(path)
    return path


def test_folder_is_a_hugging_face_tokenizer(saved_tokenizer: Path) -> None:
    tokenizer = build_tokenizer(str(saved_tokenizer), "<image>")
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    assert tokenizer.encode("which digit") == [3, 4]
    assert tokenizer.decode([5, tokenizer.eos_id]) == "seven"
    assert (tokenizer.image_token_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)
    assert (tokenizer.num_tokens, tokenizer.vocab_size) == (6, 128)


def test_unknown_image_token_names_what_there_is(saved_tokenizer: Path) -> None:
    with pytest.raises(ValueError, match=r"--image-token '<img>' .* it has <image>"):
        build_tokenizer(str(saved_tokenizer), "<img>")


def test_missing_folder_names_the_flag(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--tokenizer-model .*nowhere is not a folder"):
        build_tokenizer(str(tmp_path / "nowhere"), "<image>")


def test_folder_without_tokenizer_names_the_flag(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--tokenizer-model .* holds no tokenizer"):
        build_tokenizer(str(tmp_path), "<image>")
