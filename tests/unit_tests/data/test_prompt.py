"""How conversations are written out, against transformers' own templates and tokens."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.conversation import Turn
from megatron_mimo.data.prompt import check_prompt_format, write_prompt
from megatron_mimo.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, build_tokenizer

SPECIAL = ("<unk>", "<image>", "<img>", "</img>", "<|im_start|>", "<|im_end|>")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{{ '\n' }}"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
)
# Adds a system turn, trims every text, and puts empty thoughts in front of answers without any.
THINKING = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and '<think>' not in m.content %}<think></think>{% endif %}"
    "{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last or m.role != 'assistant' %}{{ m.content }}{% else %}"
    "{{ m.content.split('</think>')[-1] }}{% endif %}<|im_end|>\n{% endfor %}"
)
SHOUTING = "{% for m in messages %}{{ m.role }}: {{ m.content | upper }}\n{% endfor %}"
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}<|im_end|>{% endfor %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str | None], str]:
    """Writes a small byte-pair tokenizer with a chat template, as `save_pretrained` does."""

    @cache
    def write(template: str | None) -> str:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast

        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        corpus = ["what is the answer to this question", "user assistant system", "\n\n\n"] * 20
        tokenizer.train_from_iterator(corpus, trainer)
        saved = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            eos_token="<|im_end|>",
            unk_token="<unk>",
            additional_special_tokens=["<image>", "<img>", "</img>", "<|im_start|>"],
        )
        saved.chat_template = template
        path = tmp_path_factory.mktemp("tokenizer")
        saved.save_pretrained(path)
        return str(path)

    return write


Load = Callable[[str | None], HuggingFaceTokenizer]


@pytest.fixture(scope="module")
def load(folder: Callable[[str | None], str]) -> Load:
    @cache
    def load(template: str | None) -> HuggingFaceTokenizer:
        tokenizer = build_tokenizer(folder(template), "<image>")
        assert isinstance(tokenizer, HuggingFaceTokenizer)
        return tokenizer

    return load


def spoken(*turns: str) -> list[Turn]:
    """Turns from "u: text", "a: text" and "s: text"."""
    roles: dict[str, Any] = {"u": "user", "a": "assistant", "s": "system"}
    return [Turn(roles[turn[0]], turn[3:]) for turn in turns]


def written(
    tokenizer: HuggingFaceTokenizer, turns: Sequence[Turn], rows: Sequence[int] = (), **fields: Any
) -> tuple[str, list[str]]:
    """The whole text, and the stretches that are learnt, as the tokens spell them."""
    prompt = write_prompt(turns, rows, DataConfig(**fields), tokenizer)
    spell = tokenizer._tokenizer.decode
    learnt: list[list[int]] = [[]]
    for token, target in zip(prompt.tokens, prompt.targets, strict=True):
        if target:
            learnt[-1].append(token)
        elif learnt[-1]:
            learnt.append([])
    return spell(prompt.tokens), [spell(tokens) for tokens in learnt if tokens]


TALK = spoken("s: Be brief.", "u: What?", "a: This.", "u: Why?", "a:  So\n")


def test_plain_is_a_line_for_each_prompt_and_an_end_for_each_answer() -> None:
    tokenizer = ByteTokenizer()
    prompt = write_prompt(TALK, (), DataConfig(), tokenizer)
    end = [tokenizer.eos_id]
    given, asked = list(b"Be brief.\nWhat?\n"), list(b"Why?\n")
    answers = [list(b"This.") + end, list(b" So\n") + end]
    assert prompt.tokens == given + answers[0] + asked + answers[1]
    learnt = [t for t, target in zip(prompt.tokens, prompt.targets, strict=True) if target]
    assert learnt == answers[0] + answers[1]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_chat_learns_answers_and_their_ends(load: Load, template: str) -> None:
    text, learnt = written(load(template), TALK)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat?<|im_end|>\n"
        "<|im_start|>assistant\nThis.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\n So\n<|im_end|>\n"
    )
    assert learnt == ["This.<|im_end|>", " So\n<|im_end|>"]


def test_nemotron_learns_the_same_without_a_template(load: Load) -> None:
    chat = write_prompt(TALK, (), DataConfig(), load(CHATML))
    nemotron = write_prompt(TALK, (), DataConfig(prompt_format="nemotron6-moe"), load(None))
    assert nemotron == chat


words = st.text(st.sampled_from("ab \nusertén"), max_size=12).filter(lambda text: text.strip())
talks = st.lists(st.tuples(words, words), min_size=1, max_size=4)


@given(talks, st.sampled_from([CHATML, MARKED, THINKING]))
def test_texts_are_those_of_transformers(
    load: Load, talk: list[tuple[str, str]], template: str
) -> None:
    turns = [t for asked, said in talk for t in (Turn("user", asked), Turn("assistant", said))]
    tokenizer = load(template)
    text, learnt = written(tokenizer, turns)
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    assert text == tokenizer._tokenizer.apply_chat_template(messages, tokenize=False)
    kept = [said.strip() if template == THINKING else said for _, said in talk]
    assert learnt == [f"{said}<|im_end|>" for said in kept]


def test_tokens_are_those_of_transformers(load: Load) -> None:
    tokenizer = load(CHATML)
    messages = [{"role": turn.role, "content": turn.text} for turn in TALK[:3]]
    theirs = tokenizer._tokenizer.apply_chat_template(messages, return_dict=False)
    assert write_prompt(TALK[:3], (), DataConfig(), tokenizer).tokens == theirs


def test_marked_answers_are_those_of_transformers(load: Load) -> None:
    tokenizer = load(MARKED)
    messages = [{"role": turn.role, "content": turn.text} for turn in TALK[:3]]
    theirs = tokenizer._tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    ours = write_prompt(TALK[:3], (), DataConfig(), tokenizer)
    assert ours.tokens == theirs["input_ids"]
    assert ours.targets == [bool(mark) for mark in theirs["assistant_masks"]]


def test_thoughts_that_the_template_adds_are_given_and_written_ones_learnt(load: Load) -> None:
    turns = spoken("u: q", "a: a", "u: q", "a: <think>well</think>a")
    text, learnt = written(load(THINKING), turns)
    assert "<|im_start|>assistant\n<think></think>a<|im_end|>" in text
    assert text.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user")
    assert learnt == ["a<|im_end|>", "<think>well</think>a<|im_end|>"]


def test_an_answer_that_spells_a_role_is_found(load: Load) -> None:
    _, learnt = written(load(CHATML), spoken("u: assistant", "a: assistant", "u: s", "a: s"))
    assert learnt == ["assistant<|im_end|>", "s<|im_end|>"]


def test_a_template_that_forgets_thoughts_is_refused(load: Load) -> None:
    turns = spoken("u: q", "a: <think>hm</think>a", "u: q", "a: b")
    with pytest.raises(ValueError, match="changes turn 2, the answer '<think>hm</think>a': choose"):
        written(load(FORGETFUL), turns)
    _, learnt = written(load(FORGETFUL), turns[:2])
    assert learnt == ["<think>hm</think>a<|im_end|>"]


def test_a_template_is_asked_to_keep_thoughts(load: Load) -> None:
    template = FORGETFUL.replace("if loop.last", "if not truncate_history_thinking or loop.last")
    _, learnt = written(load(template), spoken("u: q", "a: <think>hm</think>a", "u: q", "a: b"))
    assert learnt == ["<think>hm</think>a<|im_end|>", "b<|im_end|>"]


def test_a_template_that_ends_the_last_turn_alone_is_refused(load: Load) -> None:
    template = (
        "{% for m in messages %}{{ m.content }}{{ '<|im_end|>' if loop.last else ' ' }}{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"turn 2 of 4 in another way .* --tokenizer-prompt-form"):
        written(load(template), spoken("u: q", "a: a", "u: q", "a: b"))


def test_a_template_that_changes_answers_is_refused(load: Load) -> None:
    with pytest.raises(ValueError, match="changes turn 2, the answer 'quiet'"):
        written(load(SHOUTING), spoken("u: q", "a: quiet"))


def test_what_a_template_refuses_names_the_roles(load: Load) -> None:
    with pytest.raises(
        ValueError, match=r"refuses a conversation of user, user, assistant \(roles must alternate"
    ):
        written(load(ALTERNATING), spoken("u: q", "u: r", "a: x"))


@pytest.mark.parametrize("chosen", ["plain", "chat", "nemotron6-moe"])
def test_a_document_has_no_frame(load: Load, chosen: str) -> None:
    text, learnt = written(load(CHATML), spoken("a: xyz"), prompt_format=chosen)
    assert text == "xyz<|im_end|>"
    assert learnt == ["yz<|im_end|>"]


@pytest.mark.parametrize("chosen", ["plain", "chat", "nemotron6-moe"])
@pytest.mark.parametrize("tags", [None, "internvl"])
def test_images_take_their_rows_and_tags_and_are_never_learnt(
    load: Load, chosen: str, tags: str | None
) -> None:
    turns = spoken("u: <image>a<image>", "a: b<image>c")
    text, learnt = written(
        load(CHATML), turns, rows=[2, 1, 3], prompt_format=chosen, image_tag_type=tags
    )
    before, after = ("<img>", "</img>") if tags else ("", "")
    images = [before + "<image>" * count + after for count in (2, 1, 3)]
    assert f"{images[0]}a{images[1]}" in text
    assert f"b{images[2]}c" in text
    assert learnt == ["b", "c<|im_end|>"]


def test_bytes_take_tags_too() -> None:
    tokenizer = ByteTokenizer()
    config = DataConfig(image_tag_type="internvl")
    prompt = write_prompt(spoken("u: <image>", "a: b"), [2], config, tokenizer)
    image = [*b"<img>", *[tokenizer.image_token_id] * 2, *b"</img>"]
    assert prompt.tokens == [*image, *b"\nb", tokenizer.eos_id]


def test_a_template_without_the_image_is_refused(load: Load) -> None:
    template = "{% for m in messages %}{{ m.content | replace('<image>', '') }}{% endfor %}"
    turns = spoken("u: <image>q", "a: x")
    with pytest.raises(ValueError, match="makes 0 placeholders of 1"):
        written(load(template), turns, rows=[2])


def test_the_default_is_the_template_where_there_is_one(load: Load) -> None:
    turns = spoken("u: q", "a: x")
    assert written(load(None), turns)[0] == "q\nx<|im_end|>"
    assert written(load(CHATML), turns)[0].startswith("<|im_start|>user")
    assert written(load(CHATML), turns, prompt_format="plain")[0] == "q\nx<|im_end|>"


def test_what_the_tokenizer_lacks_is_said_first(load: Load, tmp_path: Path) -> None:
    check_prompt_format(DataConfig(prompt_format="chat", image_tag_type="internvl"), load(CHATML))
    check_prompt_format(DataConfig(prompt_format="nemotron6-moe"), load(None))
    check_prompt_format(DataConfig(image_tag_type="internvl"), ByteTokenizer())
    with pytest.raises(ValueError, match="format chat: the tokenizer has no chat template"):
        check_prompt_format(DataConfig(prompt_format="chat"), load(None))
    with pytest.raises(ValueError, match="format nemotron6-moe needs <.im_start.> and <.im_end.>"):
        check_prompt_format(DataConfig(prompt_format="nemotron6-moe"), ByteTokenizer())
    bare = _word_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="type internvl needs .* has no <img> and no </img>: give"):
        check_prompt_format(DataConfig(image_tag_type="internvl"), bare)


def _word_tokenizer(path: Path) -> HuggingFaceTokenizer:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    model = models.WordLevel({"[UNK]": 0, "<image>": 1, "</s>": 2}, unk_token="[UNK]")
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(model), eos_token="</s>", unk_token="[UNK]"
    ).save_pretrained(path)
    return HuggingFaceTokenizer(str(path), "<image>")
