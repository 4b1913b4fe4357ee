"""How conversations are written out, against transformers' own templates and tokens."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.text.conversation import Turn
from megatron_mimo.data.text.prompt import check_prompt_format, write_prompt
from megatron_mimo.data.text.tokenizer import ByteTokenizer, HuggingFaceTokenizer
from megatron_mimo.media.images import ImageInput, ImageTagType
from tests.unit_tests.data.text import chats
from tests.unit_tests.data.toy import ToneInput

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


Template = str | Mapping[str, str] | None
Load = Callable[[Template], HuggingFaceTokenizer]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Loads a small byte-pair tokenizer with a chat template, as `save_pretrained` writes it."""
    loaded: dict[str, HuggingFaceTokenizer] = {}

    def load(template: Template) -> HuggingFaceTokenizer:
        name = repr(template)
        if name not in loaded:
            path = tmp_path_factory.mktemp("tokenizer")
            _save(path, template)
            loaded[name] = HuggingFaceTokenizer(str(path), {"encoder": "<image>"})
        return loaded[name]

    return load


def _save(path: Path, template: Template) -> None:
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
    saved.save_pretrained(path)


def tagged(tag_type: ImageTagType | None) -> dict[str, ImageInput]:
    return {"encoder": ImageInput(tag_type=tag_type)}


def spoken(*turns: str) -> list[Turn]:
    """Turns from "u: text", "a: text" and "s: text"."""
    roles: dict[str, Any] = {"u": "user", "a": "assistant", "s": "system"}
    return [Turn(roles[turn[0]], turn[3:]) for turn in turns]


def written(
    tokenizer: HuggingFaceTokenizer, turns: Sequence[Turn], rows: Sequence[int] = (), **fields: Any
) -> tuple[str, list[str]]:
    """The whole text, and the stretches that are learnt, as the tokens spell them."""
    config = DataConfig(**fields)
    layouts = chats.laid_out({"encoder": rows}, config)
    prompt = write_prompt(turns, layouts, config, tokenizer)
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
    prompt = write_prompt(TALK, {}, DataConfig(), tokenizer)
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


words = st.text(st.sampled_from("ab \nusertén"), max_size=12).filter(lambda text: text.strip())
talks = st.lists(st.tuples(words, words), min_size=1, max_size=4)


@given(talks)
def test_nemotron_learns_the_same_without_a_template(
    load: Load, talk: list[tuple[str, str]]
) -> None:
    turns = [t for asked, said in talk for t in (Turn("user", asked), Turn("assistant", said))]
    chat = write_prompt(turns, {}, DataConfig(), load(CHATML))
    nemotron = write_prompt(turns, {}, DataConfig(prompt_format="nemotron6-moe"), load(None))
    assert nemotron == chat


@given(talks, st.sampled_from([CHATML, MARKED, THINKING]))
def test_texts_are_those_of_transformers(
    load: Load, talk: list[tuple[str, str]], template: str
) -> None:
    turns = [t for asked, said in talk for t in (Turn("user", asked), Turn("assistant", said))]
    tokenizer = load(template)
    text, learnt = written(tokenizer, turns)
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    assert text == tokenizer._tokenizer.apply_chat_template(messages, tokenize=False)
    for stretch, (_, said) in zip(learnt, talk, strict=True):
        kept = f"{said.strip() if template == THINKING else said}<|im_end|>"
        # A token may hold the line break in front of an answer with those that the answer has.
        assert stretch in (kept, f"\n{kept}" if said[0] == "\n" else kept)


def test_tokens_are_those_of_transformers(load: Load) -> None:
    tokenizer = load(CHATML)
    messages = [{"role": turn.role, "content": turn.text} for turn in TALK[:3]]
    theirs = tokenizer._tokenizer.apply_chat_template(messages, return_dict=False)
    assert write_prompt(TALK[:3], {}, DataConfig(), tokenizer).tokens == theirs


def test_marked_answers_are_those_of_transformers(load: Load) -> None:
    tokenizer = load(MARKED)
    messages = [{"role": turn.role, "content": turn.text} for turn in TALK[:3]]
    theirs = tokenizer._tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    ours = write_prompt(TALK[:3], {}, DataConfig(), tokenizer)
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


def test_thoughts_that_only_the_last_answer_gets_are_given(load: Load) -> None:
    """Where a beginning of the conversation is not written like the beginning of the whole."""
    whole = load(chats.template("qwen3", marked=False))
    turns = spoken("u: q", "a: a", "u: q", "a: b")
    text, learnt = written(whole, turns)
    assert text.count("<think>") == 1
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\nb<|im_end|>\n")
    assert learnt == ["a<|im_end|>", "b<|im_end|>"]
    thoughts = "<think>\nhm\n</think>\n\nb"
    _, learnt = written(whole, [*turns[:3], Turn("assistant", thoughts)])
    assert learnt == ["a<|im_end|>", f"{thoughts}<|im_end|>"]
    for lost in (1, 3):
        given = list(turns)
        given[lost] = Turn("assistant", "<think>hm</think>b")
        with pytest.raises(ValueError, match=f"changes turn {lost + 1}, the answer '<think>hm"):
            written(whole, given)
    marked = load(chats.template("qwen3", marked=True))
    turns[1] = Turn("assistant", thoughts)
    assert written(marked, turns)[1] == ["b<|im_end|>", "b<|im_end|>"]


def test_a_template_that_changes_answers_is_refused(load: Load) -> None:
    with pytest.raises(
        ValueError, match="the chat template of /.*tokenizer.* changes turn 2, the answer 'quiet'"
    ):
        written(load(SHOUTING), spoken("u: q", "a: quiet"))
    more = load(
        "{% for m in messages %}{{ m.content }}{% if m.content[-1] == '.' %} End.{% endif %}"
        "{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"changes turn 2, the answer 'a\.'"):
        written(more, spoken("u: q", "a: a."))
    quiet = load(SHOUTING.replace("m.content | upper", "m.content | replace('w', 'x')"))
    with pytest.raises(ValueError, match="changes turn 4, the answer 'wet'"):
        written(quiet, spoken("u: w", "a: dry", "u: w", "a: wet"))


def test_what_a_template_refuses_names_the_roles(load: Load) -> None:
    with pytest.raises(
        ValueError, match=r"refuses a conversation of user, user, assistant \(roles must alternate"
    ):
        written(load(ALTERNATING), spoken("u: q", "u: r", "a: x"))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("{{ raise_exception('two\nlines') }}", "two lines"),
        ("{{ messages[9].content.nothing }}", "list object has no element 9"),
        ("{{ 1 + 'a' }}", "TypeError: unsupported operand"),
        ("{% for i in range(10**9) %}{% endfor %}", "OverflowError: Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError: maximum"),
    ],
)
def test_whatever_a_template_raises_names_it(load: Load, body: str, reason: str) -> None:
    with pytest.raises(
        ValueError, match=f"template of /.* refuses a conversation of user, assistant .({reason})"
    ) as caught:
        written(load(f"{{% set a = 1 %}}{body}"), spoken("u: q", "a: x"))
    assert "\n" not in str(caught.value)


def test_a_template_that_cannot_be_used_is_said_first(load: Load) -> None:
    plain, chat = DataConfig(prompt_format="plain"), DataConfig()
    broken = load("a\n{% for m in messages %}{{ m.content }")
    named = load({"rag": CHATML, "tool_use": CHATML})
    for tokenizer, reason in (
        (
            broken,
            "the chat template of /.* is none .unexpected '}', line 2.: correct it, or choose ",
        ),
        (named, "has the chat templates rag, tool_use and none by the name default: choose anoth"),
    ):
        check_prompt_format(plain, tokenizer)
        assert (
            written(tokenizer, spoken("u: q", "a: x"), prompt_format="plain")[0] == "q\nx<|im_end|>"
        )
        with pytest.raises(ValueError, match=reason):
            check_prompt_format(chat, tokenizer)
        with pytest.raises(ValueError, match=reason):
            written(tokenizer, spoken("u: q", "a: x"))


def test_of_named_templates_the_default_writes(load: Load) -> None:
    tokenizer = load({"default": CHATML, "rag": SHOUTING})
    check_prompt_format(DataConfig(), tokenizer)
    assert written(tokenizer, TALK) == written(load(CHATML), TALK)


@pytest.mark.parametrize("chosen", ["plain", "chat", "nemotron6-moe"])
def test_a_document_has_no_frame(load: Load, chosen: str) -> None:
    text, learnt = written(load(CHATML), spoken("a: xyz"), prompt_format=chosen)
    assert text == "xyz<|im_end|>"
    assert learnt == ["yz<|im_end|>"]


@pytest.mark.parametrize("chosen", ["plain", "chat", "nemotron6-moe"])
@pytest.mark.parametrize("tags", [None, "internvl"])
def test_images_take_their_rows_and_tags_and_are_never_learnt(
    load: Load, chosen: str, tags: ImageTagType | None
) -> None:
    turns = spoken("u: <image>a<image>", "a: b<image>c")
    text, learnt = written(
        load(CHATML), turns, rows=[2, 1, 3], prompt_format=chosen, inputs=tagged(tags)
    )
    before, after = ("<img>", "</img>") if tags else ("", "")
    images = [before + "<image>" * count + after for count in (2, 1, 3)]
    assert f"{images[0]}a{images[1]}" in text
    assert f"b{images[2]}c" in text
    assert learnt == ["b", "c<|im_end|>"]


def test_bytes_take_tags_too() -> None:
    tokenizer = ByteTokenizer()
    config = DataConfig(inputs=tagged("internvl"))
    layouts = chats.laid_out({"encoder": [2]}, config)
    prompt = write_prompt(spoken("u: <image>", "a: b"), layouts, config, tokenizer)
    image = [*b"<img>", *[tokenizer.placeholder_ids["encoder"]] * 2, *b"</img>"]
    assert prompt.tokens == [*image, *b"\nb", tokenizer.eos_id]


def test_a_template_without_the_image_is_refused(load: Load) -> None:
    template = "{% for m in messages %}{{ m.content | replace('<image>', '') }}{% endfor %}"
    turns = spoken("u: <image>q", "a: x")
    with pytest.raises(ValueError, match="makes 0 placeholders of 1"):
        written(load(template), turns, rows=[2])


def test_a_template_without_the_items_of_one_module_is_refused(load: Load) -> None:
    template = "{% for m in messages %}{{ m.content | replace('<tone>', '') }}{% endfor %}"
    turns = spoken("u: <image><tone>q", "a: x")
    config = DataConfig(inputs={"encoder": ImageInput(), "audio": ToneInput()})
    with pytest.raises(ValueError, match="makes 0 placeholders of 1 .<tone>.: choose"):
        write_prompt(turns, {"encoder": [(1,)], "audio": [(1,)]}, config, load(template))


def test_the_default_is_the_template_where_there_is_one(load: Load) -> None:
    turns = spoken("u: q", "a: x")
    assert written(load(None), turns)[0] == "q\nx<|im_end|>"
    assert written(load(CHATML), turns)[0].startswith("<|im_start|>user")
    assert written(load(CHATML), turns, prompt_format="plain")[0] == "q\nx<|im_end|>"


def test_what_the_tokenizer_lacks_is_said_first(load: Load, tmp_path: Path) -> None:
    check_prompt_format(DataConfig(prompt_format="chat", inputs=tagged("internvl")), load(CHATML))
    check_prompt_format(DataConfig(prompt_format="nemotron6-moe"), load(None))
    check_prompt_format(DataConfig(inputs=tagged("internvl")), ByteTokenizer())
    with pytest.raises(ValueError, match="format chat: the tokenizer has no chat template"):
        check_prompt_format(DataConfig(prompt_format="chat"), load(None))
    with pytest.raises(ValueError, match="format nemotron6-moe needs <.im_start.> and <.im_end.>"):
        check_prompt_format(DataConfig(prompt_format="nemotron6-moe"), ByteTokenizer())
    bare = _word_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="type internvl needs .* has no <img> and no </img>: give"):
        check_prompt_format(DataConfig(inputs=tagged("internvl")), bare)


def _word_tokenizer(path: Path) -> HuggingFaceTokenizer:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    model = models.WordLevel({"[UNK]": 0, "<image>": 1, "</s>": 2}, unk_token="[UNK]")
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(model), eos_token="</s>", unk_token="[UNK]"
    ).save_pretrained(path)
    return HuggingFaceTokenizer(str(path), {"encoder": "<image>"})
