"""Architectures described in YAML."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_mimo.config.model_file import read_architecture, table_size
from megatron_mimo.config.presets import model_config
from megatron_mimo.data import ByteTokenizer
from megatron_mimo.model.omni.config import OmniConfig


def test_a_file_describes_a_model_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "model.yaml"
    file.write_text(
        "language:\n  pattern: M*E-\n  num_moe_experts: 4\n  init_method_std: 2e-2\n"
        "vision:\n  pixel_mean: [0.5, 0.25, 0]\n  pixel_shuffle: false\n"
    )
    changed = read_architecture("nemotron-moe-vlm-tiny", str(file), ["language.num_moe_experts=16"])
    preset = model_config("nemotron-moe-vlm-tiny")
    language, vision = preset.part("language"), preset.part("vision")
    assert changed == preset.with_parts(
        language=replace(language, pattern="M*E-", num_moe_experts=16, init_method_std=0.02),
        vision=replace(vision, pixel_mean=(0.5, 0.25, 0.0), pixel_shuffle=False),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("langauge: {pattern: M}", "model.yaml: langauge: unknown 'langauge'; did you"),
        ("language: {patern: M}", "language.patern: unknown 'patern'; did you mean 'pattern'?"),
        ("language: {pattern: MX}", "language of the model: pattern 'MX': expected letters"),
        (
            "language: {num_moe_experts: many}",
            "expected a whole number, 1 to 1,000,000, not 'many'",
        ),
        ("language: M*", "model.yaml: language: expected fields and values"),
        ("language: {pattern: }", "language.pattern: expected a value or a list, not None"),
        ("language: {pattern: M, pattern: E}", "key 'pattern' is given twice"),
        ("- language", "expected keys and values"),
    ],
)
def test_a_wrong_file_says_where(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "model.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_architecture("nemotron-moe-vlm-tiny", str(file), ())


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ValueError, match=r"--model-config no/such\.yaml cannot be read"):
        read_architecture("mock", "no/such.yaml", ())


def test_the_example_is_a_model() -> None:
    example = Path(__file__).parents[3] / "examples" / "mimo" / "models" / "small-hybrid.yaml"
    found = read_architecture("nemotron-moe-vlm-tiny", str(example), ())
    assert found.part("language").layers == "ME*-ME*-"
    assert found.part("vision").num_layers == 4


def test_a_folder_says_how_large_the_table_is() -> None:
    """Whether or not it is padded as ours would be."""
    assert table_size(ByteTokenizer(), None) == 384

    def folder(vocab_size: int) -> OmniConfig:
        model = model_config("nemotron-moe-vlm-tiny")
        return OmniConfig(model=model, vocab_size=vocab_size, seq_length=64, image_token_id=7)

    # 256 bytes and three special tokens.
    assert table_size(ByteTokenizer(), folder(259)) == 259
    with pytest.raises(
        ValueError, match="the tokenizer has 259 tokens, the model of --load-hf 258"
    ):
        table_size(ByteTokenizer(), folder(258))
