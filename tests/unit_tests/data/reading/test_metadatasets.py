"""YAML of datasets, as people write it and as it breaks: opened, or refused with file and line."""

import gc
import json
import random
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.reading.energon import OpenedSplit, open_split
from megatron_mimo.data.reading.webdataset import prepare, write_shard
from megatron_mimo.data.samples.sample import Drawn
from megatron_mimo.data.text.tokenizer import ByteTokenizer
from tests.properties import examples

HEAD = "__module__: megatron.energon\n__class__: MetadatasetV2\nsplits:\n  train:\n"
BLEND = HEAD + "    blend:\n      - {{weight: 1, path: ds}}\n      - {{weight: {}, path: ds}}\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small dataset, ds."""
    folder = tmp_path_factory.mktemp("meta")
    (folder / "ds/train").mkdir(parents=True)
    notes = [(f"n{i}", {"json": json.dumps({"text": f"note {i}"}).encode()}) for i in range(20)]
    write_shard(folder / "ds/train/0.tar", notes)
    prepare(folder / "ds", ["train/0.tar"])
    return folder


def opened(path: Path) -> OpenedSplit:
    config = DataConfig(provider="energon", path=str(path))
    return open_split(config, "train", ByteTokenizer(), content=())


def draw(split: OpenedSplit) -> object:
    return split.build(0, 1).draw()


def test_a_blend_is_read(folder: Path) -> None:
    (folder / "m.yaml").write_text(BLEND.format("0.5"))
    assert isinstance(draw(opened(folder / "m.yaml")), Drawn)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BLEND.format("0"), r"m.yaml:7: weight is '0': expected a number above 0; leave the"),
        (BLEND.format("-1"), r"m.yaml:7: weight is '-1'"),
        (BLEND.format(".inf"), r"m.yaml:7: weight is '.inf'"),
        (BLEND.format("much"), r"m.yaml:7: weight is 'much'"),
        (BLEND.format("1").replace("weight: 1", "repetitions: -2", 1), "m.yaml:6: repetitions"),
        ("splits: [\n", r"m.yaml:2 is not YAML: "),
        (HEAD + "    blend: [{weight: 1, path: ds}\n", r"m.yaml:6 is not YAML: "),
        (HEAD + "    path: me.yaml\n", r"me.yaml cannot be read: No such file"),
        (HEAD + "    path: m.yaml\n", r"m.yaml is a part of itself"),
        (HEAD + "    path: gone\n", r"m.yaml: the train split cannot be opened \(.*\): expected a"),
        (HEAD.replace("train", "val") + "    path: ds\n", r"m.yaml: the train split cannot be"),
        (HEAD.replace("V2", "V9") + "    path: ds\n", r"m.yaml: the train split cannot be opened"),
        ("", r"m.yaml is empty"),
        ("- a\n- b\n", r"m.yaml: the train split cannot be opened"),
        ("a: " + "[" * 100_000, r"m.yaml:1: more than 50 levels"),
        ("a: " + "{b: " * 100_000, r"m.yaml:1: more than 50 levels"),
        ("x: \0", r"m.yaml.* is not YAML: "),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_with_the_file(folder: Path, text: str, message: str) -> None:
    (folder / "m.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        draw(opened(folder / "m.yaml"))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "dataset.yaml is empty"),
        ("a: [", r"dataset.yaml:\d is not YAML"),
        ("__module__: my_project.data\n__class__: MyWebdataset\n", "dataset.yaml"),
        ("sample_type:\n  __module__: megatron.energon\n  __class__: Gone\n", "dataset.yaml"),
    ],
)
def test_metadata_of_a_folder(folder: Path, text: str, message: str) -> None:
    file = folder / "ds/.nv-meta/dataset.yaml"
    before = file.read_text()
    file.write_text(text)
    try:
        with pytest.raises(ValueError, match=message) as caught:
            draw(opened(folder / "ds"))
    finally:
        file.write_text(before)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("given", ["x" * 300, "a\0b", "/dev/null", "/dev/zero"])
def test_paths_that_are_no_datasets(given: str) -> None:
    with pytest.raises(ValueError, match="--data-path"):
        opened(Path(given))


WORDS = (
    "weight", "path", "blend", "train", "splits", ":", "-", "{", "}", "[", "]", "ds", "1", "-1",
    "\n", "\n  ", "  ", "\t", "!", "!!python/object:os.system", "&a", "*a", "<<", "|", ">", "'",
    '"', "#", "---", "...", "%", "@", "\\", "\0", "\ud800", "null", "~", "1e999", "__class__",
    "__module__", "MetadatasetV2", "Metadataset", "os", "blend_epochized", "repetitions", ",",
)  # fmt: skip


def damaged(rng: random.Random) -> str:
    """A metadataset with a few words put in, taken out or exchanged."""
    text = BLEND.format("2")
    for _ in range(rng.randrange(1, 5)):
        at, length = rng.randrange(len(text) + 1), rng.randrange(12)
        put = rng.choice(WORDS) if rng.random() < 0.7 else ""
        text = text[:at] + put + text[at + length * (rng.random() < 0.6) :]
    return text


@settings(examples(100), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**63).map(random.Random))
def test_any_yaml_opens_or_is_refused(folder: Path, rng: random.Random) -> None:
    path = folder / "any.yaml"
    path.write_text(damaged(rng), encoding="utf-8", errors="surrogatepass")
    try:
        found = draw(opened(path))
    except ValueError as error:
        assert "any.yaml" in str(error)
        assert len(str(error).splitlines()) == 1
    else:
        assert isinstance(found, Drawn)


def test_readers_keep_no_record_of_the_files_they_have_read(folder: Path) -> None:
    worker = opened(folder / "ds").build(0, 1)
    for _ in range(300):
        assert isinstance(worker.draw(), Drawn)
    gc.collect()
    assert sum(isinstance(one, tarfile.TarInfo) for one in gc.get_objects()) < 20
