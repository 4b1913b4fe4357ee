"""Program that prints a recorded run as JSON; it runs where the packages of services are.

W&B 0.31 reads its files in its compiled part only, to show or to send them, so here is a reader of
the format, which is LevelDB's log: records in blocks of 32 KiB. What they hold is read by W&B's
own message classes.
"""

import json
import struct
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, HEADER, HEAD = 1 << 15, struct.Struct("<IHB"), 7
FULL, FIRST, LAST = 1, 2, 4


def records(content: bytes) -> Iterator[bytes]:
    """Records of a log; a file that is cut off ends before the cut."""
    assert content[:4] == b":W&B"
    place, record = HEAD, b""
    while place + HEADER.size <= len(content):
        left = BLOCK - place % BLOCK
        if left < HEADER.size:
            place += left
            continue
        _, size, kind = HEADER.unpack_from(content, place)
        place += HEADER.size
        part = content[place : place + size]
        if len(part) < size:
            return
        place += size
        record = part if kind in (FULL, FIRST) else record + part
        if kind in (FULL, LAST):
            yield record


def wandb_run(path: str) -> dict[str, Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    curves: dict[str, dict[int, float]] = defaultdict(dict)
    config: dict[str, str] = {}
    state = None
    for content in records(Path(path).read_bytes()):
        record = Record.FromString(content)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            row = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
            step = int(json.loads(row["_step"]))
            for tag, value in row.items():
                # Of a row that was not whole, W&B keeps the later value.
                if not tag.startswith("_"):
                    curves[tag][step] = float(json.loads(value))
        elif kind == "run":
            config = {
                item.key or item.nested_key[0]: str(json.loads(item.value_json))
                for item in record.run.config.update
            }
        elif kind == "exit":
            state = record.exit.exit_code
    return {"curves": curves, "config": config, "state": state}


def mlflow_run(uri: str, run_id: str) -> dict[str, Any]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    run = client.get_run(run_id)
    curves = {}
    for tag in run.data.metrics:
        points = client.get_metric_history(run_id, tag)
        assert len({point.step for point in points}) == len(points), f"{tag}: a step comes twice"
        curves[tag] = {point.step: point.value for point in points}
    return {
        "curves": curves,
        "config": dict(run.data.params) | dict(run.data.tags),
        "state": run.info.status,
    }


if __name__ == "__main__":
    service, *argv = sys.argv[1:]
    print(json.dumps({"wandb": wandb_run, "mlflow": mlflow_run}[service](*argv)))
