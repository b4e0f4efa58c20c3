"""Faults of one launch each, drawn at random: how they are injected, and the check of what came of them."""

import random
import re
import signal
from functools import partial

from benchmarks.reliability.chains import Injection
from benchmarks.reliability.inject import free_disk
from benchmarks.reliability.launch import Launch
from benchmarks.reliability.points import ProcessFault
from benchmarks.reliability.targets import BETWEEN_RENAMES, message
from charrnn.errors import EXIT_INTERRUPTED, EXIT_PEER_LOST, EXIT_USER_ERROR

# About what a run takes to begin training.
_START_S = 4.0
# The bounds of a call in which a fault strikes; 2 steps between checkpoints, 3 between evaluations.
CALLS = {"step": (2, 9), "write": (2, 6), "replacement": (2, 3), "evaluation": (2, 3), "pruning": (2, 4)}

Draw = random.Random


# ---- checks of a launch


def ended_with(code: int, expected: str, launch: Launch, launcher_code: int) -> str:
    """Every process must have left with `code`, and the regular expression `expected` must match the output."""
    codes = launch.codes()
    ranks = {e["rank"] for e in launch.events("start")}
    if code == EXIT_USER_ERROR:  # rank 0 reports and leaves; the others wait for that, and torchrun ends them
        ranks = {0} | set(codes)
    if codes != dict.fromkeys(ranks, code):
        return f"the processes left with {codes}, the launcher with {launcher_code}: {launch.output[-1000:]}"
    return "" if re.search(expected, launch.output) else f"no {expected!r} in its output: {launch.output[-1000:]}"


def was_killed(launch: Launch, code: int) -> str:
    """A process without a launcher must have died by SIGKILL."""
    return "" if code == -signal.SIGKILL else f"it left with {code}: {launch.output[-1000:]}"


def warned(expected: str, launch: Launch, code: int) -> str:
    """A launch that was killed must have reported a checkpoint that it passed over."""
    matched = re.search(expected, launch.output)
    return was_killed(launch, code) or ("" if matched else f"no {expected!r} in its output: {launch.output}")


def lost_peer(rank: int, launch: Launch, code: int) -> str:
    """The others of `rank` must have left, and reported it."""
    codes, others = launch.codes(), {e["rank"] for e in launch.events("start")} - {rank}
    if codes != dict.fromkeys(others, EXIT_PEER_LOST) or not code:
        return f"the ranks left with {codes}, the launcher with {code}"
    reports = "|".join(message(name, str(rank), r"\(on [^)]+\)") for name in ("died", "hung"))
    if not re.search(f"error: ({reports}); ", launch.output):
        return f"rank {rank} is not reported: {launch.output[-1000:]}"
    return "" if re.search(rf"exitcode *: {EXIT_PEER_LOST}", launch.output) else "torchrun's report lacks the exit code"


def refused_by_disk(launch: Launch, code: int) -> str:
    """The run must have ended, and named its folder."""
    expected = "error: " + message("cannot write", rf"[^\n]*{re.escape(launch.run_dir.name)}[^\n]*")
    return ended_with(EXIT_USER_ERROR, expected, launch, code)


# ---- injections, drawn at random


def drawn(action: str, phase: str, draw: Draw, rank: int = 0) -> ProcessFault:
    """Draws a line of a call of a phase."""
    return ProcessFault(action, phase, draw.randint(*CALLS[phase]), draw.random(), rank)


def kill_in(phase: str, draw: Draw) -> Injection:
    """SIGKILL at a random line of a random call."""
    return Injection(drawn("kill", phase, draw), check=was_killed)


def kill_between_renames() -> Injection:
    """SIGKILL when the old best checkpoint was renamed, and the new one has not taken its place."""
    return Injection(ProcessFault("kill", "replacement", 1, BETWEEN_RENAMES), check=was_killed)


def kill_from_outside(draw: Draw) -> Injection:
    """SIGKILL at a random moment of training."""
    return Injection(outside=lambda launch: launch.signal_training(signal.SIGKILL, 0, draw), check=was_killed)


def kill_at_start(draw: Draw) -> Injection:
    """SIGKILL at a random moment after the launch, while the run starts."""
    return Injection(outside=lambda launch: launch.kill_start(_START_S, draw), check=was_killed)


def kill_anywhere(draw: Draw) -> Injection:
    """One of the two before."""
    return draw.choice([kill_from_outside, kill_at_start])(draw)


def kill_rank(draw: Draw) -> Injection:
    """SIGKILL of one rank of two, in any phase of its own; for `chain_of_restarts`."""
    rank = draw.randrange(2)
    phases = ["step", "evaluation"] if rank else ["step", "evaluation", "write", "pruning"]
    return Injection(drawn("kill", draw.choice(phases), draw, rank))


def kill_launcher(draw: Draw) -> Injection:
    """SIGKILL of torchrun, which hosts the rendezvous store of its two ranks."""

    def outside(launch: Launch) -> None:
        launch.signal_training(signal.SIGKILL, None, draw)
        launch.wait_for_ranks()

    expected = "error: " + message("store lost", r"[^\n]*", message("resume", "step"))
    return Injection(outside=outside, check=partial(ended_with, EXIT_PEER_LOST, expected))


def stop_in(phase: str, rank: int, draw: Draw) -> Injection:
    """SIGSTOP of a rank at a random line of a random call."""
    fault = drawn("stop", phase, draw, rank)
    return Injection(fault, outside=lambda launch: launch.kill_stopped(), check=partial(lost_peer, rank))


def stop_rank(draw: Draw) -> Injection:
    """SIGSTOP of one rank of two."""
    return stop_in(draw.choice(["step", "evaluation"]), draw.randrange(2), draw)


def stop_signal(number: int, code: int, target: str, draw: Draw) -> Injection:
    """A signal that asks to stop, to a rank or to the launcher."""
    rank = {"process": 0, "rank": draw.randrange(2), "launcher": None}[target]
    expected = message("stopped", signal.Signals(number).name, r"(\d+)", message("resume", r"step \1\n"))
    return Injection(
        outside=lambda launch: launch.signal_training(number, rank, draw),
        check=partial(ended_with, code, expected),
        max_steps=0,
    )


def second_interrupt(draw: Draw) -> Injection:
    """Ctrl-C twice on a step that never ends."""
    check = partial(ended_with, EXIT_INTERRUPTED, message("again"))
    return Injection(drawn("sleep", "step", draw), outside=lambda launch: launch.interrupt_twice(), check=check)


def full_disk(draw: Draw) -> Injection:
    """No space is left in the middle of a checkpoint; there is some again before the next launch."""

    def check(launch: Launch, code: int) -> str:
        free_disk(launch.run_dir)
        return refused_by_disk(launch, code)

    return Injection(drawn("fill", "write", draw), check=check)


def file_limit(draw: Draw) -> Injection:
    """Files may not grow any more, in the middle of a checkpoint."""
    return Injection(drawn("limit", "write", draw), check=refused_by_disk)


def wrong_number(expected: dict[str, str], draw: Draw) -> Injection:
    """A wrong number on one rank of two; all must end. expected: action to the message that reports it."""
    action = draw.choice(sorted(expected))
    fault = ProcessFault(action, call=draw.randint(2, 9), rank=draw.randrange(2))
    return Injection(fault, check=partial(ended_with, EXIT_USER_ERROR, message(expected[action])))


def pause_in_step(draw: Draw) -> Injection:
    return Injection(drawn("pause", "step", draw))
