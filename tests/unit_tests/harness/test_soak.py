"""The soak tool sees what grows in any process of a run, and nothing where nothing does."""

import sys

import pytest

from tests.soak import Bounds, Record, Usage, growths, read_options, table, watch

GROWING = {
    "memory": "kept.append(bytearray(b'x') * 2**20)",
    "files": "kept.append(open('/dev/null'))",
    "threads": "t = threading.Thread(target=time.sleep, args=(9,), daemon=True); t.start()",
    "": "pass",
}


@pytest.mark.parametrize("grows", GROWING)
def test_growth_of_a_process_below_is_seen(grows: str) -> None:
    loop = f"import threading, time\nkept = []\nfor _ in range(100):\n  {GROWING[grows]}\n"
    child = f"{loop}  time.sleep(0.05)\n"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    record, code = watch([sys.executable, "-c", parent], 4.0, 0.1)
    assert code is None
    bounds = Bounds(memory=8, files=4, threads=4)
    # A busy machine starts processes late.
    begin = max(usages[0][0] for usages in record.usages.values()) + 0.2
    found = growths(record, begin, 4.0)
    assert len(found) == 2
    beyond = [what.split()[0] for each in found for what in each.beyond(bounds)]
    assert beyond == ([grows] if grows else [])
    assert ("GROWS" in table(found, bounds)) == bool(grows)


def test_a_run_that_ends_early_is_told() -> None:
    record, code = watch([sys.executable, "-c", "raise SystemExit(3)"], 9.0, 0.05)
    assert code == 3
    assert growths(record, 0, 9) == []


def test_bounds_are_numbers() -> None:
    options = read_options(["--most-files", "7"])
    assert (options.most_mib, options.most_files, options.most_threads) == (24, 7, 2)


def test_processes_that_come_and_go_are_not_judged() -> None:
    record = Record()
    for at in range(100):
        record.add(at, 1, Usage(100.0, 9, 2))
    record.add(30, 2, Usage(1.0, 1, 1))
    assert [each.beyond(Bounds()) for each in growths(record, 20, 100)] == [[]]
