from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mimo.data.text.tokenizer import ByteTokenizer, HuggingFaceTokenizer, build_tokenizer


@given(st.text())
def test_bytes_round_trip(text: str) -> None:
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.decode([*tokens, tokenizer.eos_id, tokenizer.pad_id]) == text
    special = {tokenizer.pad_id, tokenizer.eos_id, *tokenizer.placeholder_ids.values()}
    assert len(special) == 3
    assert not special & set(tokens)
    assert max(special) == tokenizer.num_tokens - 1 < tokenizer.vocab_size
    assert tokenizer.vocab_size % 128 == 0


def test_no_path_is_the_byte_tokenizer() -> None:
    assert isinstance(build_tokenizer(None, {"encoder": "<image>"}), ByteTokenizer)


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
    tokenizer = build_tokenizer(str(saved_tokenizer), {"encoder": "<image>"})
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    assert tokenizer.encode("which digit") == [3, 4]
    assert tokenizer.decode([5, tokenizer.eos_id]) == "seven"
    assert (tokenizer.placeholder_ids["encoder"], tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)
    assert (tokenizer.num_tokens, tokenizer.vocab_size) == (6, 128)


def test_a_placeholder_is_one_token_wherever_it_stands(saved_tokenizer: Path) -> None:
    """Words of the vocabulary that are no tokens of their own too: "digit" is one."""
    tokenizer = HuggingFaceTokenizer(str(saved_tokenizer), {"encoder": "digit"})
    assert tokenizer.encode_with_items("whichdigitdigit seven", {}) == [3, 4, 4, 5]
    assert (tokenizer.num_tokens, tokenizer.placeholder_ids) == (6, {"encoder": 4})


def test_tokens_know_the_characters_that_they_stand_for(tmp_path: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    # It takes white space out of the places of tokens, which would hide it in an answer.
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    saved = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    greedy = AddedToken("<|assistant|>", lstrip=True, rstrip=True)
    saved.add_tokens([greedy, "<image>"], special_tokens=True)
    saved.save_pretrained(tmp_path)
    spelled = HuggingFaceTokenizer(str(tmp_path), {"encoder": "<image>"}).spell(
        " a \n<|assistant|>\n b<image> é"
    )
    assert spelled is not None
    assert list(zip(spelled.starts, spelled.stops, strict=True)) == [
        (0, 1), (1, 2), (4, 17), (19, 20), (20, 27), (27, 28), (28, 29), (28, 29)
    ]  # fmt: skip


def test_unknown_image_token_names_what_there_is(saved_tokenizer: Path) -> None:
    with pytest.raises(ValueError, match=r"--image-token '<img>' .* it has <image>"):
        build_tokenizer(str(saved_tokenizer), {"encoder": "<img>"})


def test_each_module_has_a_placeholder_of_the_vocabulary(saved_tokenizer: Path) -> None:
    found = build_tokenizer(str(saved_tokenizer), {"encoder": "<image>", "audio": "digit"})
    assert found.placeholder_ids == {"encoder": 1, "audio": 4}
    with pytest.raises(
        ValueError, match=r"the placeholder of module audio '<images>' .*; it has <image>: name a"
    ):
        build_tokenizer(str(saved_tokenizer), {"encoder": "<image>", "audio": "<images>"})
    two = build_tokenizer(None, {"encoder": "<image>", "audio": "<tone>"})
    assert two.placeholder_ids == {"encoder": 258, "audio": 259}


def test_missing_folder_names_the_flag(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--tokenizer-model .*nowhere is not a folder"):
        build_tokenizer(str(tmp_path / "nowhere"), {"encoder": "<image>"})


def test_folder_without_tokenizer_names_the_flag(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--tokenizer-model .* holds no tokenizer"):
        build_tokenizer(str(tmp_path), {"encoder": "<image>"})
