"""Reads an offline W&B run back from its .wandb file: a LevelDB log of protobuf records, after a header of its own."""

import contextlib
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from training import fresh_accelerator

_HEADER_BYTES = 7
_BLOCK_BYTES = 32768
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


@contextlib.contextmanager
def nobody_logged_in(monkeypatch: pytest.MonkeyPatch, home: Path) -> Iterator[None]:
    """A machine on which nobody has logged in to W&B, for the tests inside the block."""
    import wandb

    for name in ("HOME", "USERPROFILE", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    fresh_accelerator()
    wandb.teardown()  # W&B reads the environment once, and then keeps what it read
    yield
    wandb.teardown()


def records_of(path: Path) -> list[Any]:
    """Every record of the run. Format: LevelDB's doc/log_format.md."""
    from wandb.proto import wandb_internal_pb2

    content = path.read_bytes()
    assert content[:4] == b":W&B"
    records, parts, at = [], [], _HEADER_BYTES
    while at + 7 <= len(content):
        if _BLOCK_BYTES - at % _BLOCK_BYTES < 7:
            at += _BLOCK_BYTES - at % _BLOCK_BYTES
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        parts.append(content[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (_FULL, _LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            records.append(record)
            parts = []
        else:
            assert kind in (_FIRST, _MIDDLE), f"unknown kind {kind} at {at}"
    return records


def _key(item: Any) -> str:
    return item.key or "/".join(item.nested_key)


def read_run(folder: Path) -> dict[str, Any]:
    """What one run tells: "run", "config", "metrics" (glob -> its x axis), "rows" (steps), "history" (step -> figures),
    "summary", "artifacts" and "exit_code".
    """
    import wandb

    wandb.teardown()  # waits for W&B's service, which writes the file's end after run.finish() has returned
    (path,) = folder.glob("run-*.wandb")
    told: dict[str, Any] = {"run": {}, "config": {}, "history": defaultdict(dict), "summary": {}, "artifacts": []}
    told |= {"metrics": {}, "exit_code": None}
    rows = []
    for record in records_of(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            told["run"] = {n: getattr(record.run, n) for n in ("project", "run_group", "display_name", "run_id")}
            told["config"] |= {_key(u): json.loads(u.value_json) for u in record.run.config.update}
        elif kind == "config":
            told["config"] |= {_key(u): json.loads(u.value_json) for u in record.config.update}
        elif kind == "history":
            row = {_key(i): json.loads(i.value_json) for i in record.history.item}
            rows.append(record.history.step.num)
            told["history"][record.history.step.num] |= row
        elif kind == "summary":
            told["summary"] |= {_key(u): json.loads(u.value_json) for u in record.summary.update}
        elif kind == "metric" and record.metric.glob_name:
            told["metrics"][record.metric.glob_name] = record.metric.step_metric
        elif kind == "exit":
            told["exit_code"] = record.exit.exit_code
        elif kind == "artifact":
            told["artifacts"].append(record.artifact)
        elif kind == "request" and record.request.WhichOneof("request_type") == "log_artifact":
            told["artifacts"].append(record.request.log_artifact.artifact)
    told["rows"] = rows
    return told
