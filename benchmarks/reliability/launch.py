"""Runs that faults are injected into: what they are, how they are started, and the signals that they get."""

import contextlib
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.common import ROOT, free_port
from benchmarks.reliability.inject import INJECT, Event, ProcessFault, read_events, record

BATCH_SIZE, SEQ_LEN, SAVED_EVERY = 8, 16, 2
# Dropout, a carried state, an LSTM and a decaying learning rate: whatever a resumed run could get wrong.
CONFIG = f"""
data: {{source: words.txt, cache_dir: data, batch_size: {BATCH_SIZE}, seq_len: {SEQ_LEN}, windows: carry}}
model: {{rnn: LSTM, embedding_dim: 8, hidden_dim: 16, num_layers: 2, dropout: 0.2}}
optim: {{lr: 0.005, warmup_steps: 5}}
train: {{epochs: 0, max_steps: 300, threads: 1, peer_timeout: 4s}}
eval: {{every: 3, stream_lanes: 4, stream_warmup: 32}}
log: {{every: 1}}
checkpoint: {{every: {SAVED_EVERY}, keep: 2}}
sample: {{length: 5, prompt: "the "}}
"""
_WORDS = "the quick brown fox jumps over lazy dogs"
_NOT_INHERITED = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "WANDB_API_KEY", "CHARRNN_DATA_MIRROR", INJECT)
# Each start after a restart needs a store of its own (docs/distributed.md).
_NEW_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
# Longer than any launch takes; one that takes longer hangs, and is ended.
_LIMIT_S = 240.0
_RANKS_LIMIT_S = 30.0
_POLL_S = 0.002

# {} stands for what a message is filled with. A test finds each in the sources.
MESSAGES = {
    "stopped": "stopped by {} after step {}; {}",
    "resume": "rerun the same command to resume from {}",
    "died": "rank {} {} died or stopped responding",
    "hung": "rank {} {} made no progress",
    "store lost": "lost connection to the rendezvous store {}; {}",
}


def message(name: str, *values: str) -> str:
    """Returns a regular expression of a message; `values`, themselves expressions, fill the first placeholders."""
    first, *others = map(re.escape, MESSAGES[name].split("{}"))
    filled = [*values, *[r"[^\n]*"] * (len(others) - len(values))]
    return first + "".join(value + text for value, text in zip(filled, others, strict=True))


class Workspace:
    """A folder with a text and a config; runs of it, each in a run folder named after it."""

    def __init__(self, folder: Path, config: str = CONFIG) -> None:
        self.folder = folder
        draw = random.Random(0)
        text = " ".join(draw.choice(_WORDS.split()) for _ in range(6000))[:6000]
        (folder / "words.txt").write_text(text, encoding="utf-8")
        (folder / "small.yaml").write_text(config)

    def start(
        self,
        run: str,
        faults: Sequence[ProcessFault] = (),
        processes: int = 1,
        restarts: int = 0,
        launcher: str = "torchrun",
    ) -> "Launch":
        """Launches a run with the faults that its processes trigger themselves.

        Args:
            run: Its name.
            faults: Of each start of the processes.
            processes: Of the run.
            restarts: Times that the launcher starts them again.
            launcher: torchrun, accelerate or machines (a torchrun for each process).
        """
        events, run_dir = self.events(run), self.folder / run
        before = len(read_events(events, "fault"))
        plan = {"events": str(events), "run_dir": str(run_dir), "before": before}
        kept = {k: v for k, v in os.environ.items() if k not in _NOT_INHERITED}
        environment = {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        environment |= {INJECT: json.dumps(plan | {"faults": [asdict(fault) for fault in faults]})}
        command = _command(run, processes, restarts, launcher)
        return Launch(command, self.folder, environment | (_NEW_STORE if restarts else {}), events, run_dir)

    def events(self, run: str) -> Path:
        """Returns the file of a run's events."""
        return self.folder / f"{run}.jsonl"


def _command(run: str, processes: int, restarts: int, launcher: str) -> list[str]:
    """What a user types."""
    program = ROOT / "benchmarks" / "reliability" / "inject.py"
    arguments = [str(program), "--config", "small.yaml", "--run-dir", run]
    if processes == 1:
        return [sys.executable, *arguments]
    port = free_port()
    if launcher == "accelerate":  # its --cpu starts one process (accelerate#2741)
        accelerate = ["accelerate.commands.launch", "--multi_gpu", f"--num_processes={processes}"]
        accelerate += ["--num_machines=1", f"--max_restarts={restarts}", "--rdzv_backend=c10d"]
        return [sys.executable, "-m", *accelerate, f"--main_process_port={port}", *arguments]
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--max-restarts={restarts}"]
    if launcher == "torchrun":
        return [*torchrun, "--standalone", f"--nproc-per-node={processes}", *arguments]
    torchrun += [f"--nnodes={processes}", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=run"]
    torchrun += [f"--rdzv-endpoint=127.0.0.1:{port}"]
    lines = [shlex.join([*torchrun, f"--rdzv-conf=is_host={int(i == 0)}", *arguments]) for i in range(processes)]
    return ["bash", "-c", f"{' & '.join(lines)}; code=$?; wait; exit $code"]


class Launch:
    """A running launcher, or a training process without one, and its output."""

    def __init__(
        self, command: Sequence[str], folder: Path, environment: dict[str, str], events: Path, run_dir: Path
    ) -> None:
        self.path, self.run_dir, self._log = events, run_dir, events.with_suffix(".stderr")
        self.since = time.time()
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    @property
    def output(self) -> str:
        """All that it has printed."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def events(self, name: str = "") -> list[Event]:
        """Returns what its processes have recorded so far, or only the events of that name."""
        return [e for e in read_events(self.path, name) if e["t"] >= self.since]

    def codes(self) -> dict[int, int]:
        """Returns the exit code of each rank that left by itself."""
        return {e["rank"]: e["code"] for e in self.events("exit")}

    def ranks(self) -> set[int]:
        """Returns those that have started."""
        return {e["rank"] for e in self.events("start")}

    def steps(self) -> int:
        """Returns the number of steps in the log, which has a line for each."""
        with contextlib.suppress(FileNotFoundError):
            return (self.run_dir / "metrics.jsonl").read_bytes().count(b'"train/loss"')
        return 0

    def wait_for(self, condition: Callable[[], object], limit_s: float = _LIMIT_S) -> None:
        """Returns when `condition` holds, when the launcher has ended, or after `limit_s`."""
        end = time.monotonic() + limit_s
        while not condition() and self.process.poll() is None and time.monotonic() < end:
            time.sleep(_POLL_S)

    def wait_for_ranks(self) -> None:
        """Returns when every rank has left by itself, or after some seconds, whatever the launcher did."""
        end = time.monotonic() + _RANKS_LIMIT_S
        while len(self.codes()) < len(self.ranks()) and time.monotonic() < end:
            time.sleep(_POLL_S)

    def wait(self) -> int:
        """Returns the launcher's exit code. Raises: TimeoutExpired, after killing all of it, when it does not end."""
        try:
            code = self.process.wait(_LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            _send(signal.SIGKILL, *(e["pid"] for e in self.events("start")))
            raise
        record(self.path, "ended", code=code, step=self.steps())
        return code

    def signal(self, number: int, pid: int) -> None:
        """Records a fault from outside, and sends the signal."""
        where = f"{signal.Signals(number).name} to {pid} from outside"
        record(self.path, "fault", step=self.steps(), phase="", where=where)
        _send(number, pid)

    def signal_training(self, number: int, rank: int | None, draw: random.Random) -> None:
        """Sends a signal to a rank, or to the launcher (None), at a random moment of training."""
        self.wait_for(lambda: self.events("fit"))
        enough = self.steps() + draw.randrange(2, 10)
        self.wait_for(lambda: self.steps() >= enough)
        time.sleep(draw.uniform(0, 0.01))
        pids = {e["rank"]: e["pid"] for e in self.events("fit")}
        self.signal(number, self.process.pid if rank is None else pids[rank])

    def kill_start(self, within_s: float, draw: random.Random) -> None:
        """SIGKILLs a run of one process at a random moment of its first seconds, when training begins at the latest."""
        self.wait_for(lambda: self.events("fit"), limit_s=draw.uniform(0, within_s))
        self.signal(signal.SIGKILL, self.process.pid)

    def kill_stopped(self) -> None:
        """SIGKILLs a stopped rank once the others have ended, as the launcher would after 30 s."""
        self.wait_for(lambda: self.events("fault"))
        stopped = {e["pid"] for e in self.events("fault")}
        self.wait_for(lambda: len(self.codes()) >= len(self.ranks()) - len(stopped), limit_s=60)
        _send(signal.SIGKILL, *stopped)


def _send(number: int, *pids: int) -> None:
    """Sends a signal to processes that may have ended."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
