"""Upstream noise is dropped, everything else is not."""

import logging
import warnings

import pytest

from megatron_mimo.runtime.quiet import quiet_upstream


@pytest.fixture(autouse=True)
def quiet() -> None:
    quiet_upstream()
    quiet_upstream()


def test_known_log_lines_are_dropped(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("megatron.core.models.gpt.gpt_model")
    logger.warning("GPTModel IS DEPRECATED. GPTModel is only accepting critical bug fixes")
    logger.warning("vocabulary is padded")
    assert [record.message for record in caplog.records] == ["vocabulary is padded"]
    assert len(logger.filters) == 1


def test_known_warnings_are_dropped() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet_upstream()
        warnings.warn("Apex is not installed. Falling back to Torch Norm", stacklevel=1)
        warnings.warn("loss is not finite", stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["loss is not finite"]
