"""Datasets that name Python: refused before it runs, unless the user trusts them."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_mimo.cli import main
from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.reading.energon import open_split
from megatron_mimo.data.text.tokenizer import ByteTokenizer

CRUDE = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
GENERIC = "__module__: megatron.energon\n__class__: StandardWebdatasetFactory\n"
SAMPLE = "sample_type:\n  __module__: megatron.energon\n  __class__: TextSample\n"


@pytest.fixture
def path(digits_path: Path, tmp_path: Path) -> Path:
    """A dataset whose files a test may change, with Python that leaves a mark."""
    path = tmp_path / "dataset"
    shutil.copytree(digits_path, path)
    (path / ".nv-meta" / "evil.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\n"
        "def sample_loader(raw): return raw\n"
        "def part_filter(part): return True\n"
    )
    return path


def opened(path: Path, **settings: Any) -> Any:
    config = DataConfig(provider="energon", path=str(path), shuffle_buffer_size=0, **settings)
    return open_split(config, "train", ByteTokenizer(), content=())


def of_dataset(text: str) -> Callable[[Path], Path]:
    """A dataset whose own file says this."""

    def write(path: Path) -> Path:
        (path / ".nv-meta" / "dataset.yaml").write_text(text)
        return path

    return write


def of_metadataset(text: str) -> Callable[[Path], Path]:
    """A metadataset beside the dataset."""

    def write(path: Path) -> Path:
        metadataset = path.parent / "meta.yaml"
        metadataset.write_text(text)
        return metadataset

    return write


@pytest.mark.parametrize(
    ("write", "named"),
    [
        (of_dataset("__module__: evil_module\n__class__: Any\n"), "evil_module.Any"),
        (of_dataset("__module__: os\n__function__: system\ncommand: touch ran\n"), "os.system"),
        (of_dataset("__module__: megatron.energon\n__function__: get_train_dataset\n"),
         "megatron.energon.get_train_dataset"),
        (of_dataset(f"{CRUDE}part_filter: evil.py\n"), "the Python file .*evil.py"),
        (of_dataset(f"{GENERIC}{SAMPLE}sample_loader: evil.py:sample_loader\npart_filter: [txt]\n"),
         "the Python file .*evil.py"),
        (of_dataset(f"{GENERIC}sample_type:\n  __module__: evil_module\n  __class__: X\n"
                    "field_map:\n  text: txt\n"), "evil_module.X"),
        (of_metadataset("__module__: evil_module\n__class__: Any\n"), "evil_module.Any"),
        (of_metadataset("__module__: megatron.energon\n__class__: MetadatasetV2\nsplits:\n"
                        "  train:\n    blend:\n      - path: dataset\n        weight: 1\n"
                        "        subflavors:\n          a: {__module__: os, __class__: x}\n"),
         "os.x"),
    ],
)  # fmt: skip
def test_python_that_a_dataset_names_is_refused(
    write: Callable[[Path], Path], named: str, path: Path, tmp_path: Path
) -> None:
    (tmp_path / "evil_module.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    target = write(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        with pytest.raises(
            ValueError,
            match=f"--data-path {target}: its dataset.yaml, or a metadataset, names {named}, wh",
        ):
            opened(target)
    assert not (tmp_path / "ran").exists()


def test_trusted_python_runs(path: Path, tmp_path: Path) -> None:
    of_dataset(f"{CRUDE}part_filter: evil.py\n")(path)
    assert opened(path, trust_dataset_code=True).num_samples == (60,)
    assert (tmp_path / "ran").exists()


def test_energons_own_classes_need_no_trust(path: Path) -> None:
    assert opened(of_dataset(f"{CRUDE}part_filter: [png, json]\n")(path)).num_samples == (60,)
    blend = "__module__: megatron.energon\n__class__: MetadatasetV2\nsplits:\n  train:\n"
    blend += "    blend:\n      - {path: dataset, weight: 1}\n"
    assert opened(of_metadataset(blend)(path)).num_samples == (60,)


def test_inspect_runs_nothing_either(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of_dataset(f"{CRUDE}part_filter: evil.py\n")(path)
    assert main(["data", "inspect", str(path)]) == 2
    assert "evil.py, which opening it would run" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert main(["data", "inspect", str(path), "--trust-dataset-code", "--limit", "3"]) == 0
    assert (tmp_path / "ran").exists()
