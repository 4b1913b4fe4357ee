"""From --encoder-…, --llm-… and --grid to the grids of any number of modules."""

import re
from typing import Any

import pytest

from megatron_mimo.config.layout import grids, with_layout
from megatron_mimo.config.sections import GridSection
from megatron_mimo.topology import Layout

THREE = ("encoder", "audio", "llm")


def layout(world_size: int | None = None, modules: tuple[str, ...] = THREE, **flags: Any) -> Layout:
    return grids(GridSection(**flags), modules, world_size)


def spans(found: Layout) -> dict[str, tuple[int, int]]:
    return {name: (spec.ranks.start, spec.ranks.stop) for name, spec in found.modules.items()}


def test_grids_stand_one_behind_the_other() -> None:
    found = layout(encoder_dp=2, grid=("audio.tp=2", "audio.pp=2"), llm_dp=3)
    assert spans(found) == {"encoder": (0, 2), "audio": (2, 6), "llm": (6, 9)}
    assert found.world_size == 9
    assert [edge.source for edge in found.edges] == ["encoder", "audio"]
    assert found.target.name == "llm"


def test_one_rank_holds_all_modules() -> None:
    assert set(spans(layout(1)).values()) == {(0, 1)}


def test_an_offset_lays_grids_over_each_other() -> None:
    found = layout(3, grid=("audio.offset=0", "llm.dp=2", "llm.offset=1"))
    assert spans(found) == {"encoder": (0, 1), "audio": (0, 1), "llm": (1, 3)}
    assert found.stages_of(0) == (("encoder", 0), ("audio", 0))


def test_grid_and_a_modules_own_flags_are_one() -> None:
    assert layout(grid=("encoder.dp=2", "llm.expt-tp=2", "llm.tp=2")) == layout(
        encoder_dp=2, llm_expt_tp=2, llm_tp=2
    )
    assert layout(encoder_dp=2, grid=("encoder.dp=2",)) == layout(encoder_dp=2)


def test_the_last_grid_wins() -> None:
    assert layout(grid=("audio.tp=2", "audio.tp=3")) == layout(grid=("audio.tp=3",))


def test_errors_name_the_flag_of_the_module() -> None:
    with pytest.raises(ValueError, match=r"^--grid audio\.tp is 0: expected 1 to 1,000,000"):
        layout(grid=("audio.tp=0",))
    with pytest.raises(ValueError, match=r"^--llm-tp is 0: expected 1 to 1,000,000"):
        layout(grid=("llm.tp=0",))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"grid": ("video.tp=2",)}, "no module 'video', the model has encoder, audio, llm"),
        ({"grid": ("audio.expert-tp=2",)}, "no axis 'expert-tp', the nearest is 'expt_tp'"),
        ({"grid": ("audio.tp=two",)}, "expected a whole number, not 'two'"),
        ({"grid": ("audio.tp",)}, "expected MODULE.AXIS=NUMBER, as in audio.tp=2"),
        ({"grid": ("tp=2",)}, "expected MODULE.AXIS=NUMBER, as in audio.tp=2"),
        (
            {"encoder_tp": 4, "grid": ("encoder.tp=2",)},
            "--grid encoder.tp=2 contradicts --encoder-tp 4: give one of them",
        ),
        ({"llm_only": True, "grid": ("audio.tp=2",)}, "trains no audio: leave --grid audio.… out"),
        ({"llm_only": True, "encoder_tp": 2}, "trains no encoder: leave the --encoder-… flags"),
    ],
)
def test_what_cannot_be_is_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        layout(**flags)


def test_the_language_model_alone() -> None:
    found = layout(llm_only=True, llm_dp=2)
    assert spans(found) == {"llm": (0, 2)}
    assert not found.edges


def test_filled_in_offsets_give_the_same_layout() -> None:
    section = GridSection(encoder_dp=2, grid=("audio.tp=2",), llm_tp=2)
    found = grids(section, THREE, None)
    filled = with_layout(section, found)
    assert filled.grid == ("audio.tp=2", "audio.offset=2")
    assert (filled.encoder_offset, filled.llm_offset) == (0, 4)
    assert grids(filled, THREE, None) == found
