"""The table of faults: how each is injected, and what must come of it."""

import random
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from benchmarks.reliability.chains import Injection, Trial, chain, chain_of_restarts
from benchmarks.reliability.inject import PHASES, ProcessFault
from benchmarks.reliability.launch import Launch, Workspace, message
from charrnn.errors import EXIT_INTERRUPTED, EXIT_PEER_LOST, EXIT_PREEMPTED

INJECTIONS_A_RUN = 12
# About what a run takes to begin training.
_START_S = 4.0

Draw = random.Random


@dataclass(frozen=True)
class Fault:
    """A row of the table.

    Attributes:
        name: Of the fault.
        how: It is injected.
        survived_if: What must come of it, besides the end that all share.
        draw: Draws an injection.
        processes: Of the run.
        run: Runs several injections; `chain` or one of its like.
    """

    name: str
    how: str
    survived_if: str
    draw: Callable[[Draw], Injection]
    processes: int = 1
    run: Callable[..., list[Trial]] = chain

    def trials(self, workspace: Workspace, times: int, draw: Draw) -> list[Trial]:
        """Injects it `times` times, INJECTIONS_A_RUN a run."""
        name, found = re.sub(r"[^a-z0-9]+", "-", self.name.lower()), []
        for first in range(0, times, INJECTIONS_A_RUN):
            injections = [self.draw(draw) for _ in range(min(INJECTIONS_A_RUN, times - first))]
            found += self.run(workspace, f"{name}-{first}", injections, self.processes)
        return found


# ---- checks of a launch


def _ended_with(code: int, expected: str, launch: Launch, launcher_code: int) -> str:
    """Every process must have left with `code`, and the regular expression `expected` must match the output."""
    codes = launch.codes()
    if codes != dict.fromkeys(launch.ranks(), code):
        return f"the processes left with {codes}, the launcher with {launcher_code}: {launch.output[-1000:]}"
    return "" if re.search(expected, launch.output) else f"no {expected!r} in its output: {launch.output[-1000:]}"


def _was_killed(launch: Launch, code: int) -> str:
    """A process without a launcher must have died by SIGKILL."""
    return "" if code == -signal.SIGKILL else f"it left with {code}: {launch.output[-1000:]}"


def _lost_peer(rank: int, launch: Launch, code: int) -> str:
    """The others of `rank` must have left, and reported it."""
    codes = launch.codes()
    if codes != dict.fromkeys(launch.ranks() - {rank}, EXIT_PEER_LOST) or not code:
        return f"the ranks left with {codes}, the launcher with {code}"
    reports = "|".join(message(name, str(rank), r"\(on [^)]+\)") for name in ("died", "hung"))
    if not re.search(f"error: ({reports}); ", launch.output):
        return f"rank {rank} is not reported: {launch.output[-1000:]}"
    return "" if re.search(rf"exitcode *: {EXIT_PEER_LOST}", launch.output) else "torchrun's report lacks the exit code"


# ---- injections, drawn at random


def struck(number: int, phase: str, draw: Draw, rank: int = 0) -> ProcessFault:
    """Draws a line of a call of a phase."""
    return ProcessFault(number, phase, draw.randint(*PHASES[phase].calls), draw.random(), rank)


def kill_in(phase: str, draw: Draw) -> Injection:
    """SIGKILL at a random line of a random call."""
    return Injection(struck(signal.SIGKILL, phase, draw), check=_was_killed)


def kill_anywhere(draw: Draw) -> Injection:
    """SIGKILL at a random moment after the launch, while the run starts, or of training."""

    def at_start(launch: Launch) -> None:
        launch.kill_start(_START_S, draw)

    def in_training(launch: Launch) -> None:
        launch.signal_training(signal.SIGKILL, 0, draw)

    return Injection(outside=draw.choice([at_start, in_training]), check=_was_killed)


def kill_rank(draw: Draw) -> Injection:
    """SIGKILL of one rank of two, in any phase of its own; for `chain_of_restarts`."""
    rank = draw.randrange(2)
    phases = ["step", "evaluation"] if rank else ["step", "evaluation", "write", "pruning"]
    return Injection(struck(signal.SIGKILL, draw.choice(phases), draw, rank))


def kill_launcher(draw: Draw) -> Injection:
    """SIGKILL of torchrun, which hosts the rendezvous store of its two ranks."""

    def outside(launch: Launch) -> None:
        launch.signal_training(signal.SIGKILL, None, draw)
        launch.wait_for_ranks()

    expected = "error: " + message("store lost", r"[^\n]*", message("resume", "step"))
    return Injection(outside=outside, check=partial(_ended_with, EXIT_PEER_LOST, expected))


def stop_rank(draw: Draw) -> Injection:
    """SIGSTOP of one rank of two at a random line of a random call."""
    rank = draw.randrange(2)
    fault = struck(signal.SIGSTOP, draw.choice(["step", "evaluation"]), draw, rank)
    return Injection(fault, outside=Launch.kill_stopped, check=partial(_lost_peer, rank))


def stop_signal(number: int, code: int, target: str, draw: Draw) -> Injection:
    """A signal that asks to stop, to a rank or to the launcher."""
    rank = {"process": 0, "rank": draw.randrange(2), "launcher": None}[target]
    expected = message("stopped", signal.Signals(number).name, r"(\d+)", message("resume", r"step \1\n"))
    return Injection(
        outside=lambda launch: launch.signal_training(number, rank, draw),
        check=partial(_ended_with, code, expected),
        max_steps=0,
    )


# ---- the table


_SELF = "the process sends it to itself, at a random point of"
_MOMENT = "from outside, at a random moment of training"
_RESUMES = "resumes from the newest complete checkpoint"

_PHASES = {
    "a step": ("step", "`Trainer.train_step`"),
    "a checkpoint write": ("write", "`write_folder`, in the writing thread"),
    "the replacement of best/": ("replacement", "`_replace`, which renames"),
    "evaluation": ("evaluation", "`Trainer.evaluate`, the sample included"),
    "pruning": ("pruning", "`remove` of an old checkpoint"),
}
_LAUNCHERS = {
    "": ("torchrun", "`torchrun --standalone --max-restarts`"),
    ", Accelerate": ("accelerate", "`accelerate launch --rdzv_backend c10d --max_restarts`"),
    " machines": ("machines", "a `torchrun --nnodes 2 --max-restarts` for each, c10d on loopback"),
}
_SIGNALS = {  # torchrun itself dies of SIGUSR1
    "SIGTERM": (signal.SIGTERM, EXIT_PREEMPTED, ("process", "rank", "launcher")),
    "SIGUSR1": (signal.SIGUSR1, EXIT_PREEMPTED, ("process", "rank")),
    "Ctrl-C": (signal.SIGINT, EXIT_INTERRUPTED, ("process", "rank", "launcher")),
}
_TARGETS = {
    "process": (1, "", ""),
    "rank": (2, " to a rank of 2", " on both ranks"),
    "launcher": (2, " to torchrun of 2", " on both ranks"),
}


def _faults() -> Iterator[Fault]:
    for place, (phase, function) in _PHASES.items():
        yield Fault(f"SIGKILL in {place}", f"{_SELF} {function}", _RESUMES, partial(kill_in, phase))
    yield Fault("SIGKILL at any moment", f"{_MOMENT} or of the seconds before", _RESUMES, kill_anywhere)
    meant = "the other exits with 69 and reports the killed rank; the launcher restarts both"
    for name, (launcher, command) in _LAUNCHERS.items():
        how = f"{_SELF} a step, evaluation, checkpoint write or pruning, under {command}"
        restarts = partial(chain_of_restarts, launcher=launcher)
        yield Fault(f"SIGKILL of a rank of 2{name}", how, meant, kill_rank, 2, restarts)
    meant = "both ranks exit with 69 and report the lost rendezvous store"
    yield Fault("SIGKILL of torchrun of 2", _MOMENT, meant, kill_launcher, 2)
    how = f"{_SELF} a step or evaluation; `train.peer_timeout` is 4 s"
    meant = "the other exits with 69 and reports the stopped rank"
    yield Fault("SIGSTOP of a rank of 2", how, meant, stop_rank, 2)
    for name, (number, code, targets) in _SIGNALS.items():
        for target in targets:
            processes, where, ranks = _TARGETS[target]
            meant = f"the step is finished and in a checkpoint; exits with {code}{ranks}"
            yield Fault(name + where, _MOMENT, meant, partial(stop_signal, number, code, target), processes)


FAULTS = tuple(_faults())
