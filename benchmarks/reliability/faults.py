"""The faults: how each is injected into a run of harness.py, and what must come of it."""

import json
import os
import random
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from benchmarks.reliability.chains import (
    DISK_MIB,
    Injection,
    Run,
    Trial,
    chain,
    chain_of_restarts,
    on_small_disk,
    second_runs,
)
from benchmarks.reliability.harness import CONFIG, FOREIGN_STEP, WORDS, Launch, Workspace, newest_checkpoint, step_of
from benchmarks.reliability.inject import ProcessFault, free_disk, record
from benchmarks.reliability.targets import BETWEEN_RENAMES, message
from charrnn.errors import EXIT_INTERRUPTED, EXIT_PEER_LOST, EXIT_PREEMPTED, EXIT_USER_ERROR
from train.checkpoint.format import load_newest, save_step

INJECTIONS_A_RUN = 12
# About what a run takes to begin training.
_START_S = 4.0
# The bounds of a call in which a fault strikes; 2 steps between checkpoints, 3 between evaluations.
_CALLS = {"step": (2, 9), "write": (2, 6), "replacement": (2, 3), "evaluation": (2, 3), "pruning": (2, 4)}

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
    return ProcessFault(action, phase, draw.randint(*_CALLS[phase]), draw.random(), rank)


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


# ---- changes of a run folder in which nobody trains; the launch after it is killed, uncounted, and the next resumes


def tampered(change: Callable[[Draw, Workspace, Path], str], expected: str, draw: Draw) -> Injection:
    """`change` of the newest checkpoint, which the launch must report by the message `expected`."""

    def prepare(workspace: Workspace, run: str) -> str:
        if newest_checkpoint(workspace.run_dir(run)) is None:
            launch = workspace.start(run)
            launch.kill_later()
            launch.wait()
        newest = newest_checkpoint(workspace.run_dir(run))
        assert newest is not None
        step = step_of(newest.name)
        record(workspace.events(run), "fault", step=step, action="tamper", phase="", where=newest.name)
        return change(draw, workspace, newest)

    check = partial(warned, message(expected) if expected else "")
    return Injection(prepare=prepare, outside=lambda launch: launch.kill_later(), check=check, corrupts=True)


def truncate(draw: Draw, workspace: Workspace, newest: Path) -> str:
    """Cuts a file of the newest checkpoint short."""
    path = draw.choice(sorted(newest.iterdir()))
    with path.open("r+b") as file:
        file.truncate(draw.randrange(path.stat().st_size))
    return ""


def flip(draw: Draw, workspace: Workspace, newest: Path) -> str:
    """Changes a byte of a file of the newest checkpoint."""
    path = draw.choice(sorted(newest.iterdir()))
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= draw.randrange(1, 256)
    path.write_bytes(content)
    return ""


def remove_file(draw: Draw, workspace: Workspace, newest: Path) -> str:
    """Deletes a file of the newest checkpoint."""
    draw.choice(sorted(newest.iterdir())).unlink()
    return ""


def corrupt_all(draw: Draw, workspace: Workspace, newest: Path) -> str:
    """Damages every step checkpoint, sees the run refused, and restores them."""
    copies, folders = workspace.folder / "copies", sorted(newest.parent.glob("step-*"))
    for folder in folders:
        shutil.copytree(folder, copies / folder.name)
        draw.choice([truncate, flip, remove_file])(draw, workspace, folder)
    launch = workspace.start(newest.parent.name)
    code = launch.wait()
    for folder in folders:
        shutil.rmtree(folder)
        shutil.move(copies / folder.name, folder)
    return ended_with(EXIT_USER_ERROR, message("none whole", str(len(folders))), launch, code)


def claim_lock(draw: Draw, workspace: Workspace, newest: Path) -> str:
    """Has the lock that a killed process left name a process that lives."""
    lock, holder = newest.parent / ".lock", newest.parent / ".lock.json"
    if not (lock.exists() and holder.exists()):
        return "the killed process left no lock"
    holder.write_text(json.dumps(json.loads(holder.read_text()) | {"process": os.getpid()}))
    return ""


def donate(donor: str, draw: Draw, workspace: Workspace, newest: Path) -> str:
    """Adds a checkpoint of another run, complete and of a higher step than any of this run's."""
    there = [step_of(p.name) for p in newest.parent.glob("step-*")]
    theirs = load_newest(donor_of(workspace, donor))
    assert theirs
    newer = theirs.trainer | {"step": max(FOREIGN_STEP, *there) + 1}
    save_step(newest.parent, replace(theirs, trainer=newer), keep=len(there) + 1)
    return ""


def donor_of(workspace: Workspace, donor: str) -> Path:
    """Returns the folder of a run that differs in its model, its vocabulary or its text; made once."""
    config = CONFIG.replace("hidden_dim: 16", "hidden_dim: 24") if donor == "model" else CONFIG
    words = {"vocabulary": "zebras jog", "corpus": "dogs jumps fox the lazy brown quick over"}.get(donor, WORDS)
    others = Workspace(workspace.folder / donor, config, words)
    if newest_checkpoint(others.run_dir("donor")) is None:
        launch = others.start("donor", extra=["--max-steps", "4"])
        if launch.wait():
            raise RuntimeError(launch.output)
    return others.run_dir("donor")


# ---- the table


@dataclass(frozen=True)
class Fault:
    """A row of the table.

    Attributes:
        name: Of the fault.
        how: It is injected.
        survived_if: What must come of it, besides the end that all share.
        draw: Draws an injection.
        processes: Of the run.
        run: Runs several injections.
    """

    name: str
    how: str
    survived_if: str
    draw: Callable[[Draw], Injection]
    processes: int = 1
    run: Run = chain

    def trials(self, workspace: Workspace, times: int, draw: Draw) -> list[Trial]:
        """Injects it `times` times, INJECTIONS_A_RUN a run; returns nothing where this machine doesn't permit it."""
        name, found = re.sub(r"[^a-z0-9]+", "-", self.name.lower()), []
        for first in range(0, times, INJECTIONS_A_RUN):
            injections = [self.draw(draw) for _ in range(min(INJECTIONS_A_RUN, times - first))]
            found += self.run(workspace, f"{name}-{first}", injections, self.processes)
        return found


_SELF = "the process sends it to itself, at a random point of"
_MOMENT = "from outside, at a random moment of training"
_WRITE = "from a random point of `write_folder` on"
_RESUMES = "resumes from the newest complete checkpoint"
_SPACE = "exits with 2 and names the folder; resumes once there is space"
_PREVIOUS = "one line names the file; resumes from the checkpoint before"

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
_DAMAGES = {
    "truncated checkpoint": (truncate, "a random file of the newest, cut at a random place"),
    "flipped byte": (flip, "a random byte of a random file of the newest"),
    "missing file": (remove_file, "a random file of the newest, deleted"),
}
_DONORS = {"model": "width", "vocabulary": "alphabet", "corpus": "order of the same words"}


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
    yield Fault("SIGSTOP of a rank of 2", how, "the other exits with 69 and reports the stopped rank", stop_rank, 2)
    for name, (number, code, targets) in _SIGNALS.items():
        for target in targets:
            processes, where, ranks = _TARGETS[target]
            meant = f"the step is finished and in a checkpoint; exits with {code}{ranks}"
            yield Fault(name + where, _MOMENT, meant, partial(stop_signal, number, code, target), processes)
    how = "a step sleeps for an hour in C, from a random point on; the second once the first was answered"
    meant = "exits with 130 at once, without a checkpoint"
    yield Fault("Ctrl-C twice in a hung step", how, meant, second_interrupt)
    how = f"the run folder is on a tmpfs of {DISK_MIB} MiB; no byte of it is left {_WRITE}"
    yield Fault("full disk", how, _SPACE, full_disk, run=on_small_disk)
    how = f"RLIMIT_FSIZE, less than an optimizer's state takes, {_WRITE}"
    yield Fault("limit on the size of files", how, _SPACE, file_limit)
    for name, (change, how) in _DAMAGES.items():
        yield Fault(name, how, _PREVIOUS, partial(tampered, change, "damaged"))
    how, meant = "one of the three above to each", "refused with 2; resumes once they are back"
    yield Fault("every checkpoint damaged", how, meant, partial(tampered, corrupt_all, ""))
    meant = "one line reports the other run; resumes from the newest of its own"
    for donor, what in _DONORS.items():
        how = f"copied in as the newest, and left there: from a run with another {what}"
        yield Fault(f"checkpoint of another {donor}", how, meant, partial(tampered, partial(donate, donor), "foreign"))
    how, meant = "the same command while the first trains", "the second is refused with 2, which names the first"
    yield Fault("two runs on one folder", how, meant, pause_in_step, run=second_runs)
    how = "left by a SIGKILL; its .lock.json names a process that lives"
    yield Fault("stale lock", how, "resumes", partial(tampered, claim_lock, "resumed"))
    how, meant = "the loss times NaN, at a random step", "both end, rank 0 with 2; the step is reported"
    yield Fault("NaN loss on a rank of 2", how, meant, partial(wrong_number, {"nan": "diverged"}), 2)
    how = "one bit of a window's start flips, at a random step: it lies outside of the text, or elsewhere"
    reports = {"outside": "corrupted", "elsewhere": "different"}
    meant = "both end, rank 0 with 2; it is reported"
    yield Fault("corrupted index on a rank of 2", how, meant, partial(wrong_number, reports), 2)


FAULTS = tuple(_faults())
