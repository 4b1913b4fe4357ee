import logging

import numpy as np
import pytest

from megatron_mimo.data.samples.sample import (
    Drawn,
    EncodedSample,
    SkippedSample,
    name_source,
)
from megatron_mimo.data.samples.skips import SkipReport


def bad(key: str, dataset: str = "/d", kind: str = "broken image") -> SkippedSample:
    source = name_source(dataset, f"{key}.tar")
    return SkippedSample(key=key, source=source, kind=kind, reason=f"reason {key}")


def good(flaw: SkippedSample | None = None) -> EncodedSample:
    return EncodedSample(
        key="good", tokens=np.array([1, 2]), targets=np.array([False, True]), items={}, flaw=flaw
    )


def drawn(*skipped: SkippedSample, documents: int = 1) -> Drawn:
    return Drawn(documents=(good(),) * documents, skipped=skipped)


def test_counts_go_by_dataset_and_kind_with_the_first_key_of_each() -> None:
    report = SkipReport(0.5)
    report.add(0, drawn(bad("a"), bad("b"), bad("c", kind="too long")))
    report.add(3, drawn(bad("d", dataset="/e"), bad("e"), documents=4))
    assert report.num_skipped == 5
    assert [report.skipped_of(lane) for lane in (0, 1, 3)] == [3, 0, 2]
    assert report.summary() == (
        "3 of dataset /d (broken image, such as 'a'); 1 of dataset /d (too long, such as 'c'); "
        "1 of dataset /e (broken image, such as 'd')"
    )


def test_a_blank_counts_as_bad_and_as_used(caplog: pytest.LogCaptureFixture) -> None:
    report = SkipReport(0.5)
    with caplog.at_level(logging.WARNING):
        report.add(0, Drawn(documents=(good(bad("a", kind="blank for an image")),)))
    assert (report.num_skipped, report.num_replaced) == (0, 1)
    assert "lane 0 keeps sample 'a' of dataset /d, shard a.tar: reason a" in caplog.text


def test_few_are_logged_each_and_many_are_summed_up(caplog: pytest.LogCaptureFixture) -> None:
    report = SkipReport(1.0)
    with caplog.at_level(logging.WARNING):
        for number in range(250):
            report.add(0, drawn(bad(str(number))))
    assert len(caplog.records) == 12
    assert caplog.records[9].getMessage().startswith("lane 0 skips sample '9' of")
    assert caplog.records[11].getMessage() == (
        "200 bad samples so far: 200 of dataset /d (broken image, such as '0')"
    )


def test_the_fraction_is_judged_from_the_thousandth_sample_on() -> None:
    report = SkipReport(0.05)
    for number in range(99):
        report.add(0, drawn(bad(str(number)), documents=9))
    report.add(0, drawn(documents=9))
    with pytest.raises(ValueError) as caught:
        report.add(0, drawn(documents=1))
    assert str(caught.value).startswith(
        "lane 0: 99 of 1000 samples cannot be used, more than --max-bad-sample-fraction 0.05 "
        "allows: repair the dataset, or allow more. So far: 99 of dataset /d (broken image"
    )


def test_too_long_samples_ask_for_a_longer_sequence() -> None:
    report = SkipReport(0.05)
    skips = [bad(str(number), kind="too long") for number in range(60)]
    with pytest.raises(ValueError, match=r"0\.05 allows: raise --seq-length, or allow more\. So"):
        report.add(0, drawn(*skips, documents=940))


@pytest.mark.parametrize(("spoilt", "stops"), [(50, False), (51, True)])
def test_the_fraction_itself_is_allowed(spoilt: int, stops: bool) -> None:
    report = SkipReport(0.05)
    skips = [bad(str(number)) for number in range(spoilt)]
    if stops:
        with pytest.raises(ValueError, match="51 of 1000 samples"):
            report.add(0, drawn(*skips, documents=1000 - spoilt))
    else:
        report.add(0, drawn(*skips, documents=1000 - spoilt))


def test_each_lane_is_judged_by_itself() -> None:
    report = SkipReport(0.05)
    report.add(0, drawn(documents=5000))
    with pytest.raises(ValueError, match="lane 1: 60 of 1000"):
        report.add(1, drawn(*(bad(str(number)) for number in range(60)), documents=940))
