"""Steps of a vision encoder and of a module that the package does not know."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.inputs import placeholders
from megatron_mimo.data.loader.batch import Microbatch, StepData
from megatron_mimo.data.loader.stream_loader import (
    build_eval_loader,
    build_list_loader,
    build_train_loader,
)
from megatron_mimo.data.loader.wire import WireTypes, decode_step, encode_step
from megatron_mimo.data.reading.webdataset import prepare, write_shard
from megatron_mimo.data.role import DataRole, data_role
from megatron_mimo.data.samples.sample import RawSample
from megatron_mimo.data.text.tokenizer import build_tokenizer
from megatron_mimo.media.images import ImageInput, PackedImages
from megatron_mimo.topology import Layout, ModuleGridSpec
from tests.properties import examples
from tests.unit_tests.data.loader.test_wire import assert_same
from tests.unit_tests.data.toy import PackedTones, Tone, ToneInput, tone

INPUTS = {"encoder": ImageInput(), "audio": ToneInput(gain=2.0)}
TOKENIZER = build_tokenizer(None, placeholders(INPUTS))
IMAGE = np.zeros((16, 16, 3), np.uint8)


def layout(encoder: int, audio: int, llm: int) -> Layout:
    return Layout.of(
        ModuleGridSpec(name="encoder", dp=encoder),
        ModuleGridSpec(name="audio", dp=audio, offset=encoder),
        ModuleGridSpec(name="llm", dp=llm, offset=encoder + audio),
        world_size=encoder + audio + llm,
    )


def roles(of: Layout) -> list[DataRole]:
    return [data_role(of, rank) for rank in range(of.world_size)]


def config(**fields: Any) -> DataConfig:
    return DataConfig(**{"inputs": INPUTS, "seq_length": 128} | fields)


def step(who: DataRole, samples: Sequence[RawSample], **fields: Any) -> StepData:
    """One step, of which each sample is a sequence."""
    settings = config(global_batch_size=len(samples), **fields)
    return build_list_loader(samples, settings, who, TOKENIZER).next_step()


def asked(key: str, question: str, *tones: bytes) -> RawSample:
    """An image for each placeholder, and the tones."""
    items: dict[str, tuple[Any, ...]] = {
        "encoder": (IMAGE,) * question.count("<image>"),
        "audio": tones,
    }
    return RawSample.asking(key=key, question=question, answer="a", items=items)


def entries(microbatch: Microbatch, *fields: str) -> list[tuple[Any, ...]]:
    return [tuple(getattr(entry, field) for field in fields) for entry in microbatch.manifest]


def test_the_manifest_goes_by_lane_sequence_and_position() -> None:
    samples = [
        asked("a", "<tone>,<image>", tone(2)),
        asked("b", "<image><tone>b<image>", tone(1)),
        asked("c", "<image>"),
        asked("d", "<tone>d", tone(3)),
    ]
    of = layout(1, 1, 2)
    audio = roles(of)[1]
    assert audio.lanes == (0, 1)
    (microbatch,) = step(audio, samples, micro_batch_size=2).microbatches
    assert entries(microbatch, "module", "lane", "sequence", "start", "rows") == [
        ("audio", 0, 0, 0, 2),
        ("encoder", 0, 0, 3, 1),
        ("encoder", 0, 1, 0, 1),
        ("audio", 0, 1, 1, 1),
        ("encoder", 0, 1, 3, 1),
        ("encoder", 1, 0, 0, 1),
        ("audio", 1, 1, 0, 3),
    ]
    assert list(microbatch.inputs) == ["audio"]
    packed = microbatch.inputs["audio"]
    assert isinstance(packed, PackedTones)
    assert packed.lengths == (6, 3, 9)


def test_items_of_each_module_are_dealt_by_its_own_count() -> None:
    # Two ranks of each source serve the lane; microbatch 1 begins with the second.
    samples = [
        asked("a", "<image><tone><image><image>", tone(1, 1)),
        asked("b", "<tone><image><tone>", tone(1, 2), tone(2, 0)),
    ]
    of = layout(2, 2, 1)
    shares = [step(who, samples) for who in roles(of)]
    for share in shares:
        first, second = share.microbatches
        assert entries(first, "module", "source_rank") == [
            ("encoder", 0), ("audio", 0), ("encoder", 0), ("encoder", 1)
        ]  # fmt: skip
        assert entries(second, "module", "source_rank") == [
            ("audio", 1), ("encoder", 1), ("audio", 0)
        ]  # fmt: skip
    assert [[list(m.inputs) for m in share.microbatches] for share in shares] == [
        [["encoder"], []],
        [["encoder"], ["encoder"]],
        [["audio"], ["audio"]],
        [[], ["audio"]],
        [[], []],
    ]
    heard: Any = [
        [m.inputs["audio"].names for m in share.microbatches if m.inputs]  # type: ignore[attr-defined]
        for share in shares[2:4]
    ]
    assert heard == [[("mid",), ("low",)], [("high",)]]


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 2))
@examples(15)
def test_all_readers_of_a_lane_describe_it_alike(
    encoder: int, audio: int, llm: int, batch: int
) -> None:
    of = layout(encoder, audio, llm)
    settings = config(micro_batch_size=batch, global_batch_size=2 * batch * llm)
    steps = [build_train_loader(settings, who, TOKENIZER).next_step() for who in roles(of)]
    for rank, (mine, who) in enumerate(zip(steps, roles(of), strict=True)):
        for lane in who.lanes:
            target = steps[encoder + audio + lane]
            assert mine.lane_digest[lane] == target.lane_digest[lane], rank
            for here, there in zip(mine.microbatches, target.microbatches, strict=True):
                assert [e for e in here.manifest if e.lane == lane] == list(there.manifest)
    for lane in range(llm):
        for microbatch in steps[encoder + audio + lane].microbatches:
            assert microbatch.text is not None
            for module, token in TOKENIZER.placeholder_ids.items():
                places = [
                    (entry.sequence, entry.start + row)
                    for entry in microbatch.manifest
                    if entry.module == module
                    for row in range(entry.rows)
                ]
                is_row = microbatch.text.input_ids == token
                assert places == [tuple(place) for place in is_row.nonzero().tolist()]
    # Nobody runs an item twice, and nobody leaves one out.
    for module in INPUTS:
        for index in range(2):
            ran = sum(
                len(inputs[module].lengths)
                for share in steps
                if module in (inputs := share.microbatches[index].inputs)
            )
            whole = [steps[encoder + audio + lane].microbatches[index] for lane in range(llm)]
            assert ran == sum(entry.module == module for m in whole for entry in m.manifest)


def test_digests_tell_where_the_rows_of_each_module_go() -> None:
    (_, _, target) = roles(layout(1, 1, 1))
    digests = {
        step(target, [asked("k", text, tone(1))]).lane_digest[0]
        for text in ("<image><tone>", "<tone><image>", "<tone>")
    }
    assert len(digests) == 3


def test_seeds_are_of_the_step_the_sample_the_module_and_the_item() -> None:
    def seed(name: str) -> int:
        return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")

    (_, audio, _) = roles(layout(1, 1, 1))
    samples = [asked("k", "<tone><image><tone>", tone(1), tone(1))]
    loader = build_list_loader(samples, config(seed=7), audio, TOKENIZER)
    for number in range(2):
        packed = loader.next_step().microbatches[0].inputs["audio"]
        assert isinstance(packed, PackedTones)
        assert packed.seeds == tuple((seed(f"7/{number}/k/audio/{i}"), True) for i in range(2))


def test_every_input_is_told_to_leave_augmentation_out_of_evaluation() -> None:
    (_, audio, _) = roles(layout(1, 1, 1))
    settings = config(inputs={**INPUTS, "audio": ToneInput(gain=2.0, mock_share=1.0)})
    gains: Any = [
        build(settings, audio, TOKENIZER).next_step().microbatches[0].inputs["audio"].gain  # type: ignore[attr-defined]
        for build in (build_train_loader, build_eval_loader)
    ]
    assert gains == [2.0, 1.0]


def test_a_module_of_the_layout_needs_an_input() -> None:
    (_, audio, _) = roles(layout(1, 1, 1))
    with pytest.raises(ValueError, match="module 'audio' feeds the language model, but the data"):
        build_train_loader(DataConfig(), audio, TOKENIZER)


@dataclass(frozen=True, slots=True)
class Chord(Tone):
    notes: int = 2


class ChordInput(ToneInput):
    def encode(self, source: bytes, shape: Any, *, with_content: bool) -> tuple[Tone, str | None]:
        encoded, flaw = ToneInput.encode(self, source, shape, with_content=with_content)
        return Chord(encoded.rows, encoded.wave), flaw


def test_a_field_that_an_input_does_not_know_is_named() -> None:
    (_, audio, _) = roles(layout(1, 1, 1))
    inputs = {**INPUTS, "audio": ChordInput()}
    with pytest.raises(
        TypeError,
        match=r"lane 0, sample 'k': merging does not know the field 'notes' of a Chord: expected "
        r"Tone with rows, wave",
    ):
        step(audio, [asked("k", "<tone>", tone(1))], inputs=inputs)


# -- between ranks ---------------------------------------------------------------------------------


def test_a_step_with_an_input_of_a_stranger_comes_out_as_it_went_in() -> None:
    of = Layout.of(
        *(ModuleGridSpec(name=name, tp=2) for name in ("encoder", "audio", "llm")), world_size=2
    )
    samples = [asked("a", "<tone><image>", tone(2, 1)), asked("b", "<image>"), asked("c", "?")]
    sent = step(data_role(of, 1), samples)
    assert [list(m.inputs) for m in sent.microbatches] == [["encoder", "audio"], ["encoder"], []]
    types = WireTypes.of(INPUTS)
    received = decode_step(encode_step(sent, types), types)
    assert_same(received, sent)
    inputs = received.microbatches[0].inputs
    assert isinstance(inputs["encoder"], PackedImages)
    assert isinstance(inputs["audio"], PackedTones)
    assert inputs["audio"].waves.dtype == torch.int16
    assert inputs["audio"].num_tokens == 6


def test_only_types_of_the_settings_travel() -> None:
    (_, audio, _) = roles(layout(1, 1, 1))
    sent = step(audio, [asked("k", "<tone>", tone(1))])
    with pytest.raises(TypeError, match=r"inputs\[audio\] is a PackedTones, which cannot be sent"):
        encode_step(sent, WireTypes.of({"encoder": ImageInput()}))
    message = encode_step(sent, WireTypes.of(INPUTS))
    with pytest.raises(TypeError, match=r"holds a tests\..*\.PackedTones: expected .*PackedImages"):
        decode_step(message, WireTypes.of({"encoder": ImageInput()}))


def test_a_name_in_a_message_is_never_imported() -> None:
    (_, audio, _) = roles(layout(1, 1, 1))
    types = WireTypes.of(INPUTS)
    message = encode_step(step(audio, [asked("k", "<tone>", tone(1))]), types)
    own, other = b"tests.unit_tests.data.toy.PackedTones", b"subprocess.Popen"
    data = message.numpy().tobytes()
    assert data.count(own) == 1
    forged = data.replace(own, other.ljust(len(own)))
    with pytest.raises(TypeError, match=r"holds a subprocess\.Popen"):
        decode_step(torch.frombuffer(bytearray(forged), dtype=torch.uint8), types)


def test_a_packed_input_that_fields_do_not_make_cannot_travel() -> None:
    @dataclass
    class Loose:
        lengths: tuple[int, ...]

    @dataclass(frozen=True)
    class PackedTones:
        lengths: tuple[int, ...]

    class Odd(ToneInput):
        packed: type[Any] = Loose

        @property
        def packed_type(self) -> type[Any]:
            return self.packed

    with pytest.raises(TypeError, match=r"Loose cannot travel: expected a frozen dataclass"):
        WireTypes.of({"audio": Odd()})
    Odd.packed = PackedTones
    PackedTones.__module__ = "tests.unit_tests.data.toy"
    PackedTones.__qualname__ = "PackedTones"
    with pytest.raises(TypeError, match=r"two packed inputs are named tests\..*toy\.PackedTones"):
        WireTypes.of({"audio": ToneInput(), "other": Odd()})


def test_tensors_of_a_dtype_that_is_not_known_are_refused() -> None:
    (_, audio, _) = roles(layout(1, 1, 1))
    sent = step(audio, [asked("k", "<tone>", tone(1))])
    packed: Any = sent.microbatches[0].inputs["audio"]
    strange = replace(packed, waves=packed.waves.to(torch.complex64))
    changed = replace(sent.microbatches[0], inputs={"audio": strange})
    with pytest.raises(TypeError, match=r"inputs\[audio\]\.waves is a torch\.complex64, which"):
        encode_step(replace(sent, microbatches=(changed,)), WireTypes.of(INPUTS))


# -- from disk -------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [None, 6])
def test_stored_samples_of_two_modules_cross_from_reader_processes(
    tmp_path: Path, packing: int | None
) -> None:
    (tmp_path / "train").mkdir()
    stored: list[tuple[str, Mapping[str, bytes]]] = [
        (
            f"{number:02d}",
            {
                "json": json.dumps({"question": "<tone>?<tone>", "answer": "a"}).encode(),
                "tone.2.wav": tone(1, 2),
                "tone.10.wav": tone(3, 0),
            },
        )
        for number in range(8)
    ]
    write_shard(tmp_path / "train/0.tar", stored)
    prepare(tmp_path, ["train/0.tar"])
    of = layout(1, 1, 1)
    found = []
    for workers in (0, 1):
        settings = config(
            provider="energon",
            path=str(tmp_path),
            num_workers=workers,
            loader_processes=1,
            packing_buffer_size=packing,
        )
        steps = [build_train_loader(settings, who, TOKENIZER).next_step() for who in roles(of)]
        assert len({tuple(share.lane_digest.items()) for share in steps}) == 1
        assert [list(share.microbatches[0].inputs) for share in steps] == [[], ["audio"], []]
        packed = steps[1].microbatches[0].inputs["audio"]
        assert isinstance(packed, PackedTones)
        assert packed.names[:2] == ("high", "low")
        assert packed.lengths[:2] == (3, 9)
        found.append(steps[1])
    assert_same(found[0], found[1])
