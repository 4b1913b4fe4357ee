"""`megatron-mimo plan --params` against counts written down by hand."""

import re
import subprocess
import sys

import pytest

H, V = 2688, 131072


def mamba(tp: int) -> int:
    inner, groups_state, heads = 64 * 64, 8 * 128, 64
    channels = inner + 2 * groups_state
    sharded = H * (inner + channels + heads) + channels * (4 + 1) + 3 * heads + inner + inner * H
    return sharded // tp + H


def attention(tp: int) -> int:
    return (H * (32 + 2 * 8) * 128 + 32 * 128 * H) // tp + H


def experts(tp: int, ep: int, met: int = 128) -> int:
    return met // ep * 2 * H * 1856 + 2 * H * 3712 // tp + 128 * H + H


def language(pattern: str, tp: int = 1, ep: int = 1, met: int = 128) -> int:
    layers = {"M": mamba(tp), "*": attention(tp), "E": experts(tp, ep, met)}
    return 2 * V * H // tp + sum(layers[letter] for letter in pattern) + H


def plan(*argv: str) -> dict[str, list[int]]:
    """Numbers of each row; in a process of its own, as it prepares the engine for a host."""
    done = subprocess.run(
        [sys.executable, "-m", "megatron_mimo.cli", "plan", "--params", *argv],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    rows = re.findall(r"│ ([a-z ]+?) +│(.*)│", done.stdout)
    return {
        name: [int(number.replace(",", "")) for number in re.findall(r"[\d,]+", numbers)]
        for name, numbers in rows
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "pattern", "ep"),
    [
        ("nemotron-moe-vlm-20l", "MEMEM*EMEMEM*EMEMEM*", 8),
        (
            "nemotron-moe-vlm-54l",
            "MEMEM*EMEM*EMEM*EMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEME",
            16,
        ),
    ],
)
def test_large_presets_on_a_production_layout(preset: str, pattern: str, ep: int) -> None:
    grids = f"--encoder-dp 8 --llm-tp 2 --llm-dp {ep // 2} --llm-ep {ep}".split()
    found = plan("--model-provider", preset, *grids)
    assert found["language model"] == [
        language(pattern),
        language(pattern, met=6),
        language(pattern, tp=2, ep=ep),
    ]
    width, ffn = 1280, 5120
    layer = 3 * width * width + 3 * width + width * width + width + 2 * ffn * width + ffn + width
    vision = 32 * (layer + 4 * width) + 2 * width + 768 * width + 128 * 128 * width + 10 * width
    assert found["vision encoder"] == [vision] * 3
    assert found["projector"] == [5120 + 5120 * 20480 + 20480 * H] * 3


def test_stages_share_the_layers() -> None:
    found = plan("--model-provider", "nemotron-moe-vlm-20l", "--llm-pp", "2")
    total, _, first, last = found["language model"]
    assert first + last == total
    assert first == V * H + 5 * mamba(1) + 4 * experts(1, 1) + attention(1)


def test_bars_say_where_stages_begin() -> None:
    bars = ("--override", "language.pattern=MEM|E*", "--llm-pp", "2")
    total, _, first, last = plan("--model-provider", "nemotron-moe-vlm-20l", *bars)[
        "language model"
    ]
    assert first + last == total
    assert first == V * H + 2 * mamba(1) + experts(1, 1)


def test_impossible_shards_are_refused() -> None:
    for argv, message in (
        ("--llm-dp 3 --llm-ep 3", "--llm-ep 3 does not divide the model's language.num_moe_exp"),
        ("--llm-tp 3", "--llm-tp 3 does not divide the model's language."),
        ("--llm-pp 3", "--llm-pp 3 does not divide the 20 layers of pattern"),
        ("--vocab-size 7 --llm-tp 2", "--vocab-size is 7: expected a multiple of --llm-tp 2"),
    ):
        done = subprocess.run(
            [
                *(sys.executable, "-m", "megatron_mimo.cli", "plan", "--params"),
                *("--model-provider", "nemotron-moe-vlm-20l", *argv.split()),
            ],
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 2
        assert message in done.stderr
