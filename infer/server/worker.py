"""Worker process: reads jobs from stdin and writes events to stdout, both as JSON lines.

`python -m infer.server.worker FILE THREADS MAX_STREAMS`, started by infer.server.pool. It exits at the end of its
input, so it never outlives the server.
"""

import base64
import contextlib
import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any, BinaryIO

import numpy as np

from charrnn.errors import CharRNNError
from charrnn.sampling import SamplingOptions
from infer import sandbox
from infer.engine import Engine
from infer.model_file.loader import DEFAULT_MODELS
from infer.server.batch import Job
from infer.server.scheduler import Scheduler
from infer.server.states import StateError, TextState


class Pipe:
    """Thread-safe JSON lines to the server. model: SHA-256 of the model file."""

    def __init__(self, file: BinaryIO, model: bytes = b"") -> None:
        self._file, self.model, self._lock = file, model, Lock()

    def send(self, message: dict[str, Any]) -> None:
        """Write one line and flush it."""
        line = json.dumps(message).encode() + b"\n"
        with self._lock:
            self._file.write(line)
            self._file.flush()

    def send_events(self, events: list[dict[str, Any]], counts: dict[str, Any]) -> None:
        """Send a scheduler's report."""
        for event in events:
            if "state" in event:
                event["state"] = event["state"].encode(self.model)
        self.send({"events": events, "counts": counts})


def job_of(message: dict[str, Any], engine: Engine, model: bytes) -> Job:
    """Build the job that a message describes. Raises: StateError for an invalid state."""
    ids = np.frombuffer(base64.b64decode(message["ids"]), "<u4").astype(np.int64)  # (N,)
    streams, state = [(seed, 0) for seed in message["seeds"]], engine.zero_state(1)
    recent: tuple[int, ...] = ()
    if message["state"] is not None:
        text = TextState.decode(message["state"], model, engine)
        ids = np.concatenate([np.array(text.recent[-1:], np.int64), ids])
        state, recent, streams = text.state, text.recent[:-1], streams or [(text.seed, text.drawn)]
    return Job(
        message["id"], ids, state, message["length"], SamplingOptions(**message["options"]), streams,
        tuple(message["stop"]), recent, lead=message["lead"], continued=message["state"] is not None,
        logprobs=message["logprobs"], score_prompt=message["score_prompt"], return_state=message["return_state"],
    )  # fmt: skip


def _receive(file: BinaryIO, engine: Engine, pipe: Pipe, inbox: "SimpleQueue[Job | int | None]") -> None:
    """Put incoming jobs and cancellations into the inbox until the end of the file."""
    try:
        for line in file:
            message = json.loads(line)
            if "cancel" in message:
                inbox.put(message["cancel"])
                continue
            try:
                inbox.put(job_of(message, engine, pipe.model))
            except StateError as error:
                refusal = {"id": message["id"], "error": str(error), "status": 422, "param": "state"}
                pipe.send({"events": [refusal], "counts": {}})
    finally:  # whatever ends this thread ends the worker, which the server restarts
        inbox.put(None)


def facts(engine: Engine, model: bytes) -> dict[str, Any]:
    """Return what the server needs to know about a model."""
    return {
        "sha256": model.hex(),
        "vocab": engine.vocab.to_json(),
        # The fields validated by the loader; others of an untrusted config may not be JSON.
        "shape": {name: engine.config["model"][name] for name in ("rnn", "num_layers", "hidden_dim")},
        "precision": engine.metadata.get("charrnn.precision", "fp32"),
        "created": int(engine.path.stat().st_mtime),
    }


def main() -> None:
    """Run until the end of stdin."""
    # The server decides when to stop; a terminal and systemd signal its workers too.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    path, threads, max_streams = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    # Keep what libraries print out of the events.
    pipe = Pipe(os.fdopen(os.dup(1), "wb"))
    os.dup2(2, 1)
    try:
        if path not in DEFAULT_MODELS:
            sandbox.try_file(path)
        engine = Engine(path, threads)
    except CharRNNError as error:
        pipe.send({"failed": str(error)})
        return
    pipe.model = hashlib.sha256(path.read_bytes()).digest()
    inbox: SimpleQueue[Job | int | None] = SimpleQueue()
    Thread(target=_receive, args=(sys.stdin.buffer, engine, pipe, inbox), daemon=True).start()
    pipe.send({"ready": facts(engine, pipe.model)})
    with contextlib.suppress(BrokenPipeError):  # the server has exited
        Scheduler(engine, inbox, pipe.send_events, max_streams).run()


if __name__ == "__main__":
    main()
