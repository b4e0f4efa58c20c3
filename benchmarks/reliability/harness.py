"""Runs that faults are injected into: what they are, how they are started, what they leave, and what was lost."""

import hashlib
import json
import os
import random
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import free_port
from benchmarks.reliability.inject import INJECT, Event, read_events
from benchmarks.reliability.launch import SAVED_EVERY, Launch, step_of
from benchmarks.reliability.points import ROOT, ProcessFault

BATCH_SIZE, SEQ_LEN = 8, 16
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
WORDS = "the quick brown fox jumps over lazy dogs"
# From this step on a checkpoint is another run's, copied in.
FOREIGN_STEP = 1000
_UNTIMED = ("time_s", "train/chars_per_s", "train/gflops", "train/mfu")
_NOT_INHERITED = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "WANDB_API_KEY", "CHARRNN_DATA_MIRROR", INJECT)
# Each start after a restart needs a store of its own (docs/distributed.md).
_NEW_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


@dataclass(frozen=True)
class Outcome:
    """What a finished run leaves, without the clock: SHA-256 of its tensors' files, and every record of its log."""

    digests: dict[str, str]
    records: list[dict[str, Any]]


@dataclass(frozen=True)
class Cost:
    """What one fault cost.

    Attributes:
        steps: Trained again.
        unfinished_bytes: Of the checkpoint that was being written.
        passed_over_bytes: Of the run's newest checkpoints, from which it did not resume.
        ended_s: From the fault until every process that could end by itself had ended; None when none had to.
    """

    steps: int = 0
    unfinished_bytes: int = 0
    passed_over_bytes: int = 0
    ended_s: float | None = None

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes lost of checkpoints."""
        return self.unfinished_bytes + self.passed_over_bytes

    @property
    def chars(self) -> int:
        """Characters trained on again."""
        return self.steps * BATCH_SIZE * SEQ_LEN


class Workspace:
    """A folder with a text and a config; runs of it, each in a run folder named after it."""

    def __init__(self, folder: Path, config: str = CONFIG, words: str = WORDS) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        draw = random.Random(0)
        text = " ".join(draw.choice(words.split()) for _ in range(6000))[:6000]
        (folder / "words.txt").write_text(text, encoding="utf-8")
        (folder / "small.yaml").write_text(config)
        self._references: dict[int, Outcome] = {}

    def command(
        self, run: str, processes: int = 1, restarts: int = 0, launcher: str = "torchrun", file: str = "train/main.py"
    ) -> list[str]:
        """Returns what a user types. launcher: torchrun, accelerate or machines (a torchrun for each process)."""
        arguments = [str(ROOT / file), "--config", "small.yaml", "--run-dir", run]
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

    def start(
        self,
        run: str,
        faults: Sequence[ProcessFault] = (),
        processes: int = 1,
        restarts: int = 0,
        launcher: str = "torchrun",
        extra: Sequence[str] = (),
    ) -> Launch:
        """Launches a run with the faults that its processes trigger themselves. extra: options after the command's."""
        events, run_dir = self.events(run), self.run_dir(run)
        plan: dict[str, Any] = {"events": str(events), "run_dir": str(run_dir)}
        plan |= {"faults": [asdict(fault) for fault in faults], "before": len(read_events(events, "fault"))}
        environment = {**self.environment(), INJECT: json.dumps(plan), **(_NEW_STORE if restarts else {})}
        command = self.command(run, processes, restarts, launcher, "benchmarks/reliability/inject.py")
        return Launch([*command, *extra], self.folder, environment, events, run_dir)

    def environment(self) -> dict[str, str]:
        """Returns the environment of a process that is to train on the CPU."""
        kept = {k: v for k, v in os.environ.items() if k not in _NOT_INHERITED}
        return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}

    def run_dir(self, run: str) -> Path:
        """Returns the folder of a run's checkpoints."""
        return self.folder / run

    def events(self, run: str) -> Path:
        """Returns the file of a run's events."""
        return self.folder / f"{run.replace('/', '-')}.jsonl"

    def reference(self, processes: int) -> Outcome:
        """Returns the outcome of the run without faults, made once. Raises: RuntimeError when that run fails."""
        if processes not in self._references:
            launch = self.start(f"reference-{processes}", processes=processes)
            if launch.wait():
                raise RuntimeError(launch.output)
            self._references[processes] = outcome(self.run_dir(f"reference-{processes}"))
        return self._references[processes]


# ---- what a run leaves


def outcome(run_dir: Path) -> Outcome:
    """Returns the newest step checkpoint, the best one and the log, for a comparison bit by bit."""
    newest = newest_checkpoint(run_dir)
    assert newest is not None
    files = [newest / f"{name}.safetensors" for name in ("model", "optimizer", "state")]
    files.append(run_dir / "best" / "model.safetensors")
    digests = {f"{f.parent.name}/{f.name}": hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return Outcome(digests, [{k: v for k, v in json.loads(line).items() if k not in _UNTIMED} for line in lines])


def newest_checkpoint(run_dir: Path) -> Path | None:
    """Returns the run's own step folder of the highest step, complete or not."""
    return max((p for p in run_dir.glob("step-*") if step_of(p.name) < FOREIGN_STEP), default=None)


def costs(events: Sequence[Event]) -> list[Cost]:
    """Returns what each fault among a run's events cost; the run must have ended well at last."""
    return [_cost(e, events[i + 1 :]) for i, e in enumerate(events) if e["event"] == "fault"]


def _cost(fault: Event, later: Sequence[Event]) -> Cost:
    restart = next((k for k, e in enumerate(later) if e["event"] == "start"), len(later))
    before, after = later[:restart], later[restart:]
    reached = max([fault["step"], *(e["step"] for e in before if e["event"] == "ended")])
    resumed = next((e["step"] for e in after if e["event"] == "fit"), reached)
    folders: dict[str, int] = next((e["checkpoints"] for e in after if e["event"] == "start" and e["rank"] == 0), {})
    unfinished = sum(size for name, size in folders.items() if not name.startswith("step-"))
    if fault["action"] == "tamper":
        unfinished = 0  # it was there before
    steps = {step_of(name): size for name, size in folders.items() if name.startswith("step-")}
    passed_over = sum(size for step, size in steps.items() if resumed < step <= reached)
    ends = [e["t"] for e in before if e["event"] == "exit"] or [e["t"] for e in before if e["event"] == "ended"]
    return Cost(max(0, reached - resumed), unfinished, passed_over, max(ends) - fault["t"] if ends else None)
