"""Runs that meet with faults: starts them, waits for them, commits faults from outside, and counts what was lost.

Letters: B batch_size, T seq_len. benchmarks/reliability/faults.py says what befalls them.
"""

import contextlib
import hashlib
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import free_port
from benchmarks.reliability.inject import INJECT, ROOT, Event, Fault, Injection, note, read_events

INSIDE = ROOT / "benchmarks" / "reliability" / "inject.py"
PROGRAM = ROOT / "train" / "main.py"
BATCH_SIZE, SEQ_LEN = 8, 16
SAVED_EVERY = 2
# dropout, a carried state, an LSTM and a decaying learning rate: whatever a resumed run could get wrong.
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
WORDS = "the quick brown fox jumps over lazy dogs"
# From this step on a checkpoint is another run's, copied in.
FOREIGN_STEP = 1000
# Longer than any launch takes; one that takes longer hangs, and is ended.
_LIMIT_S = 240.0
_RANKS_LIMIT_S = 30.0
_POLL_S = 0.002
_UNTIMED = ("time_s", "train/chars_per_s", "train/gflops", "train/mfu")
_LAUNCHERS_OWN = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "WANDB_API_KEY", "CHARRNN_DATA_MIRROR", INJECT)

# Each start after a restart needs a store of its own (docs/distributed.md).
_NEW_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


@dataclass(frozen=True)
class Outcome:
    """What a finished run leaves, without the clock: SHA-256 of its tensors' files, and every record of its log."""

    digests: dict[str, str]
    records: list[dict[str, Any]]


@dataclass(frozen=True)
class Damage:
    """What one fault cost.

    steps: updates made again. unfinished_bytes: of what was being written. passed_over_bytes: of checkpoints that the
    run did not go on from though they were its newest. ended_s: from the fault until every process that could end by
    itself had ended; None when none had to.
    """

    steps: int = 0
    unfinished_bytes: int = 0
    passed_over_bytes: int = 0
    ended_s: float | None = None

    @property
    def checkpoint_bytes(self) -> int:
        """All that was lost of checkpoints."""
        return self.unfinished_bytes + self.passed_over_bytes

    @property
    def chars(self) -> int:
        """Characters trained on again."""
        return self.steps * BATCH_SIZE * SEQ_LEN


class Launch:
    """A running launcher, or a training process without one, and what it says."""

    def __init__(
        self, command: Sequence[str], folder: Path, environment: dict[str, str], events: Path, run_dir: Path
    ) -> None:
        self.events, self.run_dir, self._log = events, run_dir, events.with_suffix(".stderr")
        self.since = time.time()
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    @property
    def said(self) -> str:
        """All that it has printed."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def happened(self, name: str = "") -> list[Event]:
        """What its processes have noted so far; `name`: only such events."""
        return [e for e in read_events(self.events, name) if e["t"] >= self.since]

    def codes(self) -> dict[int, int]:
        """The exit code of each rank that left by itself."""
        return {e["rank"]: e["code"] for e in self.happened("exit")}

    def wait_for(self, condition: Callable[[], bool], limit_s: float = _LIMIT_S) -> bool:
        """Returns when `condition` holds, or without it when the launcher has ended or the time is over."""
        end = time.monotonic() + limit_s
        while not condition():
            if self.process.poll() is not None or time.monotonic() > end:
                return condition()
            time.sleep(_POLL_S)
        return True

    def wait_for_ranks(self) -> None:
        """Returns when every rank has left by itself, or has had time for it, whatever the launcher did."""
        end = time.monotonic() + _RANKS_LIMIT_S
        while len(self.codes()) < len(self.happened("fit")) and time.monotonic() < end:
            time.sleep(_POLL_S)

    def wait(self) -> int:
        """The launcher's exit code. Raises: TimeoutExpired, with nothing left of it, when it does not end."""
        try:
            code = self.process.wait(_LIMIT_S)
        except subprocess.TimeoutExpired:
            self.clear()
            raise
        note(self.events, "ended", code=code, step=steps_logged(self.run_dir))
        return code

    def clear(self) -> None:
        """Ends whatever is left of it, stopped processes too."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pid in {e["pid"] for e in self.happened("start")}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


class Runs:
    """A folder with a text and a config; runs of it, each in a run folder named after it."""

    def __init__(self, folder: Path, config: str = CONFIG, words: str = WORDS) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "words.txt").write_text(text_of(words), encoding="utf-8")
        (folder / "small.yaml").write_text(config)
        self._unharmed: dict[int, Outcome] = {}

    def command(
        self, run: str, processes: int = 1, restarts: int = 0, program: Path = PROGRAM, launcher: str = "torchrun"
    ) -> list[str]:
        """What a user types. launcher: of several processes: torchrun, accelerate or machines (a torchrun on each)."""
        arguments = [str(program), "--config", "small.yaml", "--run-dir", run]
        if processes == 1:
            return [sys.executable, *arguments]
        port = free_port()
        if launcher == "accelerate":  # its --cpu starts one process (accelerate#2741)
            accelerate = ["accelerate.commands.launch", "--multi_gpu", f"--num_processes={processes}"]
            accelerate += ["--num_machines=1", f"--max_restarts={restarts}", "--rdzv_backend=c10d"]
            accelerate += [f"--main_process_port={port}"]
            return [sys.executable, "-m", *accelerate, *arguments]
        torchrun = [sys.executable, "-m", "torch.distributed.run", f"--max-restarts={restarts}"]
        if launcher == "torchrun":
            return [*torchrun, "--standalone", f"--nproc-per-node={processes}", *arguments]
        torchrun += [f"--nnodes={processes}", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=run"]
        torchrun += [f"--rdzv-endpoint=127.0.0.1:{port}"]
        lines = [shlex.join([*torchrun, f"--rdzv-conf=is_host={int(i == 0)}", *arguments]) for i in range(processes)]
        return ["bash", "-c", f"{' & '.join(lines)}; code=$?; wait; exit $code"]

    def start(
        self,
        run: str,
        faults: Sequence[Fault] = (),
        processes: int = 1,
        restarts: int = 0,
        launcher: str = "torchrun",
        extra: Sequence[str] = (),
    ) -> Launch:
        """Launches a run, with its faults from inside. extra: options after the command's."""
        events = self.events(run)
        before = len(read_events(events, "fault"))
        injection = Injection(str(events), str(self.run_dir(run)), tuple(faults), before)
        environment = {**self.environment(), INJECT: injection.to_json()}
        if restarts:
            environment |= _NEW_STORE
        command = [*self.command(run, processes, restarts, INSIDE, launcher), *extra]
        return Launch(command, self.folder, environment, events, self.run_dir(run))

    def environment(self) -> dict[str, str]:
        """Of a process that is to train on the CPU."""
        kept = {k: v for k, v in os.environ.items() if k not in _LAUNCHERS_OWN}
        return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}

    def run_dir(self, run: str) -> Path:
        """Where a run's checkpoints are."""
        return self.folder / run

    def events(self, run: str) -> Path:
        """Where a run's processes note what happens."""
        return self.folder / f"{run.replace('/', '-')}.jsonl"

    def unharmed(self, processes: int) -> Outcome:
        """What the run leaves that no fault befell; made once. Raises: RuntimeError when that fails by itself."""
        if processes not in self._unharmed:
            launch = self.start(f"unharmed-{processes}", processes=processes)
            if launch.wait():
                raise RuntimeError(launch.said)
            self._unharmed[processes] = outcome(self.run_dir(f"unharmed-{processes}"))
        return self._unharmed[processes]


# ---- what a run leaves


def outcome(run_dir: Path) -> Outcome:
    """The newest step checkpoint, the best one and the log, for a comparison bit by bit."""
    newest = newest_checkpoint(run_dir)
    assert newest is not None
    files = [newest / f"{name}.safetensors" for name in ("model", "optimizer", "state")]
    files.append(run_dir / "best" / "model.safetensors")
    digests = {f"{f.parent.name}/{f.name}": hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return Outcome(digests, [{k: v for k, v in json.loads(line).items() if k not in _UNTIMED} for line in lines])


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The run's own step folder of the highest step, whole or not."""
    return max((p for p in run_dir.glob("step-*") if step_of(p) < FOREIGN_STEP), default=None)


def step_of(folder: Path) -> int:
    """The step of a checkpoint folder."""
    return int(folder.name.removeprefix("step-"))


def steps_logged(run_dir: Path) -> int:
    """Updates that the log knows of, which has a line for each."""
    with contextlib.suppress(FileNotFoundError):
        return (run_dir / "metrics.jsonl").read_bytes().count(b'"train/loss"')
    return 0


def damages(events: Sequence[Event]) -> list[Damage]:
    """What each fault among a run's events cost; the run must have ended well at last."""
    faults = [i for i, e in enumerate(events) if e["event"] == "fault"]
    return [_damage(events[i], events[i + 1 :]) for i in faults]


def _damage(fault: Event, later: Sequence[Event]) -> Damage:
    again = next((k for k, e in enumerate(later) if e["event"] == "start"), len(later))
    before, after = later[:again], later[again:]
    reached = max([fault["step"], *(e["step"] for e in before if e["event"] == "ended")])
    begun = next((e["step"] for e in after if e["event"] == "fit"), reached)
    folders: dict[str, int] = next((e["checkpoints"] for e in after if e["event"] == "start" and e["rank"] == 0), {})
    unfinished = sum(size for name, size in folders.items() if not name.startswith("step-"))
    if fault["action"] == "tamper":
        unfinished = 0  # it was there before
    passed_over = sum(size for name, size in folders.items() if _is_passed_over(name, begun, reached))
    ends = [e["t"] for e in before if e["event"] == "exit"] or [e["t"] for e in before if e["event"] == "ended"]
    ended_s = max(ends) - fault["t"] if ends else None
    return Damage(max(0, reached - begun), unfinished, passed_over, ended_s)


def _is_passed_over(name: str, begun: int, reached: int) -> bool:
    """Whether it is a checkpoint of this run that it did not go on from, though it was newer."""
    return name.startswith("step-") and begun < int(name.removeprefix("step-")) <= reached


# ---- faults from outside


def strike(launch: Launch, number: int, rank: int | None, draw: random.Random) -> None:
    """Sends a signal to a rank, or to the launcher (None), at a random moment of training."""
    launch.wait_for(lambda: bool(launch.happened("fit")))
    enough = steps_logged(launch.run_dir) + draw.randrange(2, 10)
    launch.wait_for(lambda: steps_logged(launch.run_dir) >= enough)
    time.sleep(draw.uniform(0, 0.01))
    pids = {e["rank"]: e["pid"] for e in launch.happened("fit")}
    _send(launch, number, launch.process.pid if rank is None else pids[rank])


def strike_start(launch: Launch, within_s: float, draw: random.Random) -> None:
    """SIGKILLs a run of one process at a random moment of its first seconds, when training begins at the latest."""
    launch.wait_for(lambda: bool(launch.happened("fit")), limit_s=draw.uniform(0, within_s))
    _send(launch, signal.SIGKILL, launch.process.pid)


def interrupt_twice(launch: Launch) -> None:
    """Ctrl-C on a run that hangs, and again once it has said that it heard."""
    launch.wait_for(lambda: bool(launch.happened("fault")))
    launch.process.send_signal(signal.SIGINT)
    launch.wait_for(lambda: "again exits immediately" in launch.said)
    launch.process.send_signal(signal.SIGINT)


def _send(launch: Launch, number: int, pid: int) -> None:
    phase = "training" if launch.happened("fit") else "start"
    where = f"{signal.Signals(number).name} to {pid} from outside"
    note(launch.events, "fault", step=steps_logged(launch.run_dir), action="signal", phase=phase, where=where)
    os.kill(pid, number)


def end_stopped(launch: Launch) -> None:
    """Once the others of a rank that was stopped have ended, ends that one, as the launcher would after 30 s."""
    launch.wait_for(lambda: bool(launch.happened("fault")))
    stopped = {e["pid"] for e in launch.happened("fault")}
    ranks = {e["rank"] for e in launch.happened("fit")}
    launch.wait_for(lambda: len(launch.codes()) >= len(ranks) - len(stopped), limit_s=60)
    for pid in stopped:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


# ---- small things


def text_of(words: str, num_chars: int = 6000, seed: int = 0) -> str:
    """`words` in a random order, again and again."""
    draw = random.Random(seed)
    return " ".join(draw.choice(words.split()) for _ in range(num_chars))[:num_chars]
