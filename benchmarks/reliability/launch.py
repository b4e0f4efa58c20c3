"""A launcher, or a training process without one, and the signals that it gets from outside."""

import contextlib
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.reliability.inject import Event, read_events, record
from benchmarks.reliability.targets import message

SAVED_EVERY = 2
# Longer than any launch takes; one that takes longer hangs, and is ended.
_LIMIT_S = 240.0
_RANKS_LIMIT_S = 30.0
_POLL_S = 0.002


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

    def wait_for(self, condition: Callable[[], object], limit_s: float = _LIMIT_S) -> None:
        """Returns when `condition` holds, when the launcher has ended, or after `limit_s`."""
        end = time.monotonic() + limit_s
        while not condition() and self.process.poll() is None and time.monotonic() < end:
            time.sleep(_POLL_S)

    def wait_for_steps(self, count: int) -> None:
        """Returns when training has begun, and that many steps more than now are logged."""
        self.wait_for(lambda: self.events("fit"))
        enough = steps_logged(self.run_dir) + count
        self.wait_for(lambda: steps_logged(self.run_dir) >= enough)

    def wait_for_ranks(self) -> None:
        """Returns when every rank has left by itself, or after some seconds, whatever the launcher did."""
        end = time.monotonic() + _RANKS_LIMIT_S
        while len(self.codes()) < len(self.events("fit")) and time.monotonic() < end:
            time.sleep(_POLL_S)

    def wait(self) -> int:
        """Returns the launcher's exit code. Raises: TimeoutExpired, after killing all of it, when it does not end."""
        try:
            code = self.process.wait(_LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.kill({e["pid"] for e in self.events("start")})
            raise
        record(self.path, "ended", code=code, step=steps_logged(self.run_dir))
        return code

    def signal(self, number: int, pid: int) -> None:
        """Records a fault from outside, and sends the signal."""
        phase = "training" if self.events("fit") else "start"
        where = f"{signal.Signals(number).name} to {pid} from outside"
        record(self.path, "fault", step=steps_logged(self.run_dir), action="signal", phase=phase, where=where)
        os.kill(pid, number)

    def signal_training(self, number: int, rank: int | None, draw: random.Random) -> None:
        """Sends a signal to a rank, or to the launcher (None), at a random moment of training."""
        self.wait_for_steps(draw.randrange(2, 10))
        time.sleep(draw.uniform(0, 0.01))
        pids = {e["rank"]: e["pid"] for e in self.events("fit")}
        self.signal(number, self.process.pid if rank is None else pids[rank])

    def kill_start(self, within_s: float, draw: random.Random) -> None:
        """SIGKILLs a run of one process at a random moment of its first seconds, when training begins at the latest."""
        self.wait_for(lambda: self.events("fit"), limit_s=draw.uniform(0, within_s))
        self.signal(signal.SIGKILL, self.process.pid)

    def kill_later(self) -> None:
        """SIGKILLs a run of one process, uncounted as a fault, when it has written some checkpoints."""
        self.wait_for(lambda: self.events("fit"))
        begun = self.events("fit")[-1]["step"]
        self.wait_for(lambda: steps_logged(self.run_dir) >= begun + 4 * SAVED_EVERY)
        self.process.kill()

    def interrupt_twice(self) -> None:
        """Sends Ctrl-C to a run that hangs, and again once it has answered."""
        self.wait_for(lambda: self.events("fault"))
        self.process.send_signal(signal.SIGINT)
        self.wait_for(lambda: re.search(message("again"), self.output))
        self.process.send_signal(signal.SIGINT)

    def kill_stopped(self) -> None:
        """SIGKILLs a stopped rank once the others have ended, as the launcher would after 30 s."""
        self.wait_for(lambda: self.events("fault"))
        stopped = {e["pid"] for e in self.events("fault")}
        ranks = {e["rank"] for e in self.events("fit")}
        self.wait_for(lambda: len(self.codes()) >= len(ranks) - len(stopped), limit_s=60)
        self.kill(stopped)

    def kill(self, pids: set[int]) -> None:
        """SIGKILLs processes that may have ended."""
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def step_of(name: str) -> int:
    """Returns the step of a checkpoint folder's name."""
    return int(name.removeprefix("step-"))


def steps_logged(run_dir: Path) -> int:
    """Returns the number of steps in the log, which has a line for each."""
    with contextlib.suppress(FileNotFoundError):
        return (run_dir / "metrics.jsonl").read_bytes().count(b'"train/loss"')
    return 0
