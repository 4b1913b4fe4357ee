"""Chat templates and small tokenizers of the kinds that models come with."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_mimo.data import DataConfig
from megatron_mimo.data.inputs import Layout
from megatron_mimo.media.images import EncodedImage

# Around what the assistant writes; a template is used with and without them.
_BEGIN, _END = "{% generation %}", "{% endgeneration %}"
OPENS = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
"""What a template of ChatML ends with that opens an answer where it is asked to."""
SPECIAL = (
    "<unk>", "<s>", "</s>", "<image>", "<tone>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]",
    "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>",
    "<think>", "</think>", "<|user|>", "<|assistant|>",
)  # fmt: skip

_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}BEGIN{{ m.content + '<|im_end|>' }}END"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)
_LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ ' ' }}BEGIN{{ m.content | trim + ' ' + eos_token }}END"
    "{% else %}{{ bos_token + '[INST] ' + m.content | trim + ' [/INST]' }}{% endif %}{% endfor %}"
)
_VICUNA = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ 'ASSISTANT: ' }}BEGIN{{ m.content + '</s>' }}END"
    "{% else %}{{ 'USER: ' + m.content + ' ' }}{% endif %}{% endfor %}"
)
_LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{% if m.role == 'assistant' %}BEGIN{{ m.content | trim + '<|eot_id|>' }}END"
    "{% else %}{{ m.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
)
_MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% if m.role == 'assistant' %}{{ ' ' }}BEGIN{{ m.content + eos_token }}END"
    "{% else %}{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}{% endfor %}"
)
_GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{% if m.role == 'assistant' %}BEGIN{{ m.content | trim + '<end_of_turn>' }}END"
    "{% else %}{{ m.content | trim + '<end_of_turn>' }}{% endif %}{{ '\n' }}{% endfor %}"
)
# The answer follows a token at once, and line breaks, not blanks, are stripped.
_PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}"
    "{% if m.role == 'assistant' %}BEGIN{{ m.content.lstrip('\n') + '</s>' }}END"
    "{% else %}{{ m.content + '</s>' }}{% endif %}{% endfor %}"
)
# Thoughts of earlier turns go, and the last answer has some, empty ones if need be: a beginning of
# the conversation is not written like the beginning of the whole.
_QWEN3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}"
    "{% set content = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% set thoughts = m.content.split('</think>')[0].rstrip('\n').split('<think>')[-1]"
    ".lstrip('\n') if '</think>' in m.content else '' %}"
    "{% if loop.last and thoughts %}"
    "BEGIN{{ '<think>\n' + thoughts + '\n</think>\n\n' + content + '<|im_end|>' }}END"
    "{% elif loop.last %}{{ '<think>\n\n</think>\n\n' }}BEGIN{{ content + '<|im_end|>' }}END"
    "{% else %}BEGIN{{ content + '<|im_end|>' }}END{% endif %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)

_TEMPLATES: Mapping[str, str] = {
    "chatml": _CHATML,
    "llama-2": _LLAMA2,
    "vicuna": _VICUNA,
    "llama-3": _LLAMA3,
    "mistral": _MISTRAL,
    "gemma": _GEMMA,
    "phi": _PHI,
    "qwen3": _QWEN3,
}
TEMPLATES = tuple(_TEMPLATES)


def template(name: str, *, marked: bool) -> str:
    """A template, with or without marks around what the assistant writes."""
    begin, end = (_BEGIN, _END) if marked else ("", "")
    return _TEMPLATES[name].replace("BEGIN", begin).replace("END", end)


_CORPUS = [
    "USER: Which colour is this card? ASSISTANT: Red. Green. Blue. user assistant model hello",
    "what is the answer to this question\n\n\nsystem\n",
] * 20
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _bytes() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


def _metaspace(scheme: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return _trained_pieces(tokenizer)


def _prepending() -> Any:
    from tokenizers import Tokenizer, models, normalizers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return _trained_pieces(tokenizer)


def _trained_pieces(tokenizer: Any) -> Any:
    from tokenizers import trainers

    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=[*SPECIAL, *_BYTES], show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


def _unigram() -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    pieces = [(token, 0.0) for token in (*SPECIAL, *_BYTES)]
    words = ["▁", "▁Re", "Re", "d", "▁a", "a", "b", "user", "▁user", "er", "s", "te", "n", "\n"]
    tokenizer = Tokenizer(
        models.Unigram([*pieces, *((word, -1.0 - len(word)) for word in words)], 0, True)
    )
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    return tokenizer


def _words() -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=list(SPECIAL), show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


_TOKENIZERS: Mapping[str, Callable[[], Any]] = {
    "byte-level": _bytes,
    "metaspace first": lambda: _metaspace("first"),
    "metaspace always": lambda: _metaspace("always"),
    "prepending": _prepending,
    "unigram": _unigram,
    "word pieces": _words,
}
TOKENIZERS = tuple(_TOKENIZERS)


def save_tokenizer(name: str, path: str) -> None:
    """Write a tokenizer as `save_pretrained` does."""
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(
        tokenizer_object=_TOKENIZERS[name](),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=list(SPECIAL[3:]),
    ).save_pretrained(path)


def laid_out(
    rows: Mapping[str, Sequence[int]], config: DataConfig | None = None
) -> dict[str, list[Layout]]:
    """How images with these numbers of rows are written."""
    inputs = (config or DataConfig()).inputs
    return {
        module: [inputs[module].layout(EncodedImage((), number, None)) for number in of_module]
        for module, of_module in rows.items()
    }
