"""What befalls a run of benchmarks/reliability/runs.py, and how it must take it.

A run is a chain of launches: each meets one blow and ends, the next is the same command again, and the last goes on to
the end, which must be that of a run without any.
"""

import json
import os
import random
import re
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from benchmarks.reliability.inject import Fault, free_disk, note, read_events
from benchmarks.reliability.runs import (
    CONFIG,
    FOREIGN_STEP,
    SAVED_EVERY,
    WORDS,
    Damage,
    Launch,
    Runs,
    damages,
    end_stopped,
    interrupt_twice,
    newest_checkpoint,
    outcome,
    step_of,
    steps_logged,
    strike,
    strike_start,
)
from charrnn.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_PEER_LOST, EXIT_USER_ERROR
from train.checkpoint.format import load_newest, save_step

# About what a run takes to begin training.
_START_S = 4.0
# The bounds of a call that a fault befalls; 2 steps between checkpoints, 3 between evaluations.
_CALLS = {"step": (2, 9), "write": (2, 6), "replacement": (2, 3), "evaluation": (2, 3), "pruning": (2, 4)}

Draw = random.Random


@dataclass(frozen=True)
class Blow:
    """A fault that befalls one launch of a run, and what must come of it.

    inside: the fault that a process commits itself. prepare: done before the launch, while nobody trains there; it
    returns what went wrong. outside: done while it runs. judge: the launch and its exit code -> what it did wrong, or
    "". most_steps: updates that may be lost. damages: whether it spoils checkpoints; else each that bears its name must
    be whole. within_s: seconds after which all must have ended.
    """

    inside: Fault | None = None
    prepare: Callable[[Runs, str], str] = lambda runs, run: ""
    outside: Callable[[Launch], None] = lambda launch: None
    judge: Callable[[Launch, int], str] = lambda launch, code: ""
    most_steps: int = 2 * SAVED_EVERY
    damages: bool = False
    within_s: float = 20.0


@dataclass(frozen=True)
class Trial:
    """One fault met. wrong: what was not as it should be, or ""."""

    damage: Damage
    wrong: str

    @property
    def survived(self) -> bool:
        """Whether all was as it should be."""
        return not self.wrong


def chain(runs: Runs, run: str, blows: Sequence[Blow], processes: int = 1) -> list[Trial]:
    """One run, struck by a blow a launch, launched once more to its end, and compared with the one that never was."""
    wrongs = []
    for blow in blows:
        wrong = blow.prepare(runs, run)
        launch = runs.start(run, [blow.inside] if blow.inside else [], processes=processes)
        blow.outside(launch)
        code = launch.wait()
        wrongs.append(wrong or ("" if code else "the run ended before the fault") or blow.judge(launch, code))
    last = runs.start(run, processes=processes)
    last.wait()
    return verdict(runs, run, last, blows, wrongs, processes)


def chain_of_restarts(runs: Runs, run: str, blows: Sequence[Blow], launcher: str = "torchrun") -> list[Trial]:
    """The same in one launch of two processes: after each blow, a rank's death from inside, they are started again."""
    faults = [blow.inside for blow in blows if blow.inside]
    launch = runs.start(run, faults, processes=2, restarts=len(blows), launcher=launcher)
    launch.wait()
    told = [int(rank) for rank in re.findall(r"error: rank (\d+) \(on [^)]+\) died", launch.said)]
    codes = [e["code"] for e in launch.happened("exit")]
    wrong = ""
    if told != [fault.rank for fault in faults]:
        wrong = f"killed were {[f.rank for f in faults]}, told was of {told}"
    elif codes != [EXIT_PEER_LOST] * len(blows) + [EXIT_DONE] * 2:
        wrong = f"the ranks left with {codes}"
    return verdict(runs, run, launch, blows, [wrong] * len(blows), 2)


def verdict(
    runs: Runs, run: str, last: Launch, blows: Sequence[Blow], wrongs: Sequence[str], processes: int
) -> list[Trial]:
    """Judges each blow by what was `wrong` with it, what it cost, and how the run ended in its `last` launch."""
    whole = ""
    if last.process.returncode:
        whole = f"the run did not go on to its end: {last.said[-2000:]}"
    elif outcome(runs.run_dir(run)) != runs.unharmed(processes):
        whole = "the run's end is not that of the run that never was harmed"
    found = damages(read_events(runs.events(run)))
    if len(found) != len(blows):
        raise RuntimeError(f"{len(blows)} faults were meant and {len(found)} happened: {last.said[-2000:]}")
    return [
        Trial(damage, wrong or whole or _too_much(damage, blow))
        for damage, wrong, blow in zip(found, wrongs, blows, strict=True)
    ]


def _too_much(damage: Damage, blow: Blow) -> str:
    if damage.steps > blow.most_steps:
        return f"{damage.steps} updates were lost, more than {blow.most_steps}"
    if damage.passed_over_bytes and not blow.damages:
        return "a checkpoint that bore its name was not whole"
    if damage.ended_s is not None and damage.ended_s > blow.within_s:
        return f"the processes took {damage.ended_s:.0f} s to end, more than {blow.within_s:.0f}"
    return ""


# ---- what must come of a launch


def ended_with(code: int, words: str, launch: Launch, launcher_code: int) -> str:
    """Every process must have left with `code`, and `words`, a regular expression, must have been said."""
    codes = launch.codes()
    ranks = {e["rank"] for e in launch.happened("start")}
    if code == EXIT_USER_ERROR:  # rank 0 tells it and leaves; the others wait for that, and torchrun ends them
        ranks = {0} | set(codes)
    if codes != dict.fromkeys(ranks, code):
        return f"the processes left with {codes}, the launcher with {launcher_code}: {launch.said[-1000:]}"
    return "" if re.search(words, launch.said) else f"it did not say {words!r}: {launch.said[-1000:]}"


def was_killed(launch: Launch, code: int) -> str:
    """A process alone must have died by SIGKILL."""
    return "" if code == -signal.SIGKILL else f"it left with {code}: {launch.said[-1000:]}"


def passed_over(words: str, launch: Launch, code: int) -> str:
    """A launch that then was killed must have told of a checkpoint that it left out."""
    return was_killed(launch, code) or ("" if words in launch.said else f"it did not say {words!r}: {launch.said}")


def lost_peer(rank: int, launch: Launch, code: int) -> str:
    """The others of `rank` must have left, and told of it."""
    codes, others = launch.codes(), {e["rank"] for e in launch.happened("start")} - {rank}
    if codes != dict.fromkeys(others, EXIT_PEER_LOST) or not code:
        return f"the ranks left with {codes}, the launcher with {code}"
    if not re.search(rf"error: rank {rank} \(on [^)]+\) (died or stopped responding|made no progress); ", launch.said):
        return f"process {rank} is not named: {launch.said[-1000:]}"
    return "" if re.search(rf"exitcode *: {EXIT_PEER_LOST}", launch.said) else "torchrun's report lacks the exit code"


# ---- blows


def kill_in(phase: str, draw: Draw) -> Blow:
    """SIGKILL at a random line of a random call."""
    return Blow(drawn_fault("kill", phase, draw), judge=was_killed)


def drawn_fault(action: str, phase: str, draw: Draw, rank: int = 0) -> Fault:
    """A fault at a random line of a random call."""
    return Fault(action, phase, draw.randint(*_CALLS[phase]), draw.random(), rank)


def kill_between_renames() -> Blow:
    """SIGKILL when the old best checkpoint has stepped aside, and the new one has not taken its place."""
    return Blow(Fault("kill", "replacement", 1, "temporary.rename(folder)"), judge=was_killed)


def kill_from_outside(draw: Draw) -> Blow:
    """SIGKILL at a random moment of training."""
    return Blow(outside=lambda launch: strike(launch, signal.SIGKILL, 0, draw), judge=was_killed)


def kill_at_start(draw: Draw) -> Blow:
    """SIGKILL at a random moment after the launch, while the run starts."""
    return Blow(outside=lambda launch: strike_start(launch, _START_S, draw), judge=was_killed)


def kill_anywhere(draw: Draw) -> Blow:
    """One of the two before."""
    return draw.choice([kill_from_outside, kill_at_start])(draw)


def kill_rank(draw: Draw) -> Blow:
    """SIGKILL of one rank of two, in whatever it does."""
    rank = draw.randrange(2)
    phases = ["step", "evaluation"] if rank else ["step", "evaluation", "write", "pruning"]
    return kill_rank_in(draw.choice(phases), rank, draw)


def kill_rank_in(phase: str, rank: int, draw: Draw) -> Blow:
    """SIGKILL of a rank at a random line of a random call; for `chain_of_restarts`."""
    return Blow(drawn_fault("kill", phase, draw, rank))


def kill_launcher(draw: Draw) -> Blow:
    """SIGKILL of torchrun, which keeps the store that its two ranks met in."""

    def outside(launch: Launch) -> None:
        strike(launch, signal.SIGKILL, None, draw)
        launch.wait_for_ranks()

    words = "error: lost connection to the rendezvous store .*; the same command again goes on from step"
    return Blow(outside=outside, judge=partial(ended_with, EXIT_PEER_LOST, words))


def stop_rank(draw: Draw) -> Blow:
    """SIGSTOP of one rank of two."""
    return stop_in(draw.choice(["step", "evaluation"]), draw.randrange(2), draw)


def stop_in(phase: str, rank: int, draw: Draw) -> Blow:
    """SIGSTOP of a rank at a random line of a random call."""
    return Blow(drawn_fault("stop", phase, draw, rank), outside=end_stopped, judge=partial(lost_peer, rank))


def stop_signal(number: int, code: int, target: str, draw: Draw) -> Blow:
    """A signal that asks to stop, to a rank or to the launcher."""
    rank = {"process": 0, "rank": draw.randrange(2), "launcher": None}[target]
    name = signal.Signals(number).name
    words = rf"stopped by {name} after step (\d+); the same command again goes on from step \1\n"
    judge = partial(ended_with, code, words)
    return Blow(outside=lambda launch: strike(launch, number, rank, draw), judge=judge, most_steps=0)


def second_interrupt(draw: Draw) -> Blow:
    """Ctrl-C twice on a step that never ends."""
    judge = partial(ended_with, EXIT_INTERRUPTED, "Ctrl-C again exits immediately")
    return Blow(drawn_fault("sleep", "step", draw), outside=interrupt_twice, judge=judge)


def full_disk(draw: Draw) -> Blow:
    """No space is left in the middle of a checkpoint; there is some again before the next launch."""

    def judge(launch: Launch, code: int) -> str:
        free_disk(launch.run_dir)
        return refused_by_disk(launch, code)

    return Blow(drawn_fault("fill", "write", draw), judge=judge)


def file_limit(draw: Draw) -> Blow:
    """Files may not grow any more, in the middle of a checkpoint."""
    return Blow(drawn_fault("limit", "write", draw), judge=refused_by_disk)


def refused_by_disk(launch: Launch, code: int) -> str:
    """The run must have ended, and named its folder."""
    words = rf"error: cannot write [^\n]*{re.escape(launch.run_dir.name)}[^\n]*; free space"
    return ended_with(EXIT_USER_ERROR, words, launch, code)


def wrong_number(action: str, words: str, draw: Draw) -> Blow:
    """A wrong number on one rank of two; all must end, with the same words."""
    judge = partial(ended_with, EXIT_USER_ERROR, words)
    return Blow(Fault(action, call=draw.randint(2, 9), rank=draw.randrange(2)), judge=judge)


def wrong_batch(draw: Draw) -> Blow:
    """A window that lies outside of the text, or only elsewhere than the other rank has it."""
    action, words = draw.choice([("outside", "an index is corrupted"), ("odd", "would train on different windows")])
    return wrong_number(action, words, draw)


# ---- what is done to a run folder in which nobody trains. Each blow is then a kill, from which the next goes on.


def tampered(change: Callable[[Draw, Runs, Path], str], words: str, draw: Draw) -> Blow:
    """`change` of the newest checkpoint, which the launch must tell of in `words`; it is killed in its turn."""

    def prepare(runs: Runs, run: str) -> str:
        if newest_checkpoint(runs.run_dir(run)) is None:
            launch = runs.start(run)
            kill_later(launch)
            launch.wait()
        newest = newest_checkpoint(runs.run_dir(run))
        assert newest is not None
        note(runs.events(run), "fault", step=step_of(newest), action="tamper", phase="", where=newest.name)
        return change(draw, runs, newest)

    return Blow(prepare=prepare, outside=kill_later, judge=partial(passed_over, words), damages=True)


def kill_later(launch: Launch) -> None:
    """SIGKILL that is not counted as a fault, when two more checkpoints are whole."""
    launch.wait_for(lambda: bool(launch.happened("fit")))
    begun = launch.happened("fit")[-1:]
    launch.wait_for(lambda: steps_logged(launch.run_dir) >= begun[0]["step"] + 4 * SAVED_EVERY)
    launch.process.kill()


def truncate(draw: Draw, runs: Runs, newest: Path) -> str:
    """Cuts a file of the newest checkpoint short."""
    path = draw.choice(sorted(newest.iterdir()))
    with path.open("r+b") as file:
        file.truncate(draw.randrange(path.stat().st_size))
    return ""


def flip(draw: Draw, runs: Runs, newest: Path) -> str:
    """Changes a byte of a file of the newest checkpoint."""
    path = draw.choice(sorted(newest.iterdir()))
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= draw.randrange(1, 256)
    path.write_bytes(content)
    return ""


def remove_file(draw: Draw, runs: Runs, newest: Path) -> str:
    """Deletes a file of the newest checkpoint."""
    draw.choice(sorted(newest.iterdir())).unlink()
    return ""


def spoil_all(draw: Draw, runs: Runs, newest: Path) -> str:
    """Damages every step checkpoint, sees the run refused, and brings them back."""
    run_dir, copies = newest.parent, runs.folder / "copies"
    folders = sorted(run_dir.glob("step-*"))
    for folder in folders:
        shutil.copytree(folder, copies / folder.name)
        draw.choice([truncate, flip, remove_file])(draw, runs, folder)
    launch = runs.start(run_dir.name)
    code = launch.wait()
    for folder in folders:
        shutil.rmtree(folder)
        shutil.move(copies / folder.name, folder)
    return ended_with(EXIT_USER_ERROR, f"none of the {len(folders)} checkpoint", launch, code)


def claim_lock(draw: Draw, runs: Runs, newest: Path) -> str:
    """The lock that a killed process left, whose number another process bears by now."""
    lock, holder = newest.parent / ".lock", newest.parent / ".lock.json"
    if not (lock.exists() and holder.exists()):
        return "the killed process left no lock"
    them = json.loads(holder.read_text())
    holder.write_text(json.dumps({**them, "process": os.getpid()}))
    return ""


def donate(donor: str, draw: Draw, runs: Runs, newest: Path) -> str:
    """Puts in a checkpoint of another run, whole and of a higher step than any of this run's, where it stays."""
    there = [step_of(p) for p in newest.parent.glob("step-*")]
    theirs = load_newest(donor_of(runs, donor).parent, print)
    assert theirs
    record = theirs.trainer | {"step": max(FOREIGN_STEP, *there) + 1}
    save_step(newest.parent, replace(theirs, trainer=record), keep=len(there) + 1)
    return ""


def donor_of(runs: Runs, donor: str) -> Path:
    """A checkpoint of a run that differs in its model, its vocabulary or its text; made once."""
    config = CONFIG.replace("hidden_dim: 16", "hidden_dim: 24") if donor == "model" else CONFIG
    words = {"vocabulary": "zebras jog", "corpus": "dogs jumps fox the lazy brown quick over"}.get(donor, WORDS)
    others = Runs(runs.folder / donor, config, words)
    if newest_checkpoint(others.run_dir("donor")) is None:
        launch = others.start("donor", extra=["--max-steps", "4"])
        if launch.wait():
            raise RuntimeError(launch.said)
    found = newest_checkpoint(others.run_dir("donor"))
    assert found is not None
    return found
