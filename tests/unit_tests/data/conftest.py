"""A small digits dataset on disk, written once."""

from pathlib import Path

import pytest

from megatron_mimo.data.samples.digits import DigitsConfig, write_digits_dataset


@pytest.fixture(scope="session")
def digits_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 train and 30 val samples, 14 handwritten digits held out."""
    out = tmp_path_factory.mktemp("data") / "digits"
    config = DigitsConfig(num_train=60, num_val=30, val_fraction=14 / 1797, seed=5)
    return write_digits_dataset(out, config)
