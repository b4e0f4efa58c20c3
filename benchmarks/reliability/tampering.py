"""Changes of a run folder in which nobody trains; the launch after it is killed, uncounted, and the next resumes."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks.reliability.chains import Injection
from benchmarks.reliability.harness import CONFIG, FOREIGN_STEP, WORDS, Workspace, newest_checkpoint
from benchmarks.reliability.inject import record
from benchmarks.reliability.injections import Draw, ended_with, warned
from benchmarks.reliability.launch import Launch, step_of
from benchmarks.reliability.targets import message
from charrnn.errors import EXIT_USER_ERROR
from train.checkpoint.format import load_newest, save_step


def tampered(change: Callable[[Draw, Workspace, Path], str], expected: str) -> Callable[[Draw], Injection]:
    """`change` of the newest checkpoint, which the launch must report by the message `expected`."""

    def prepare(draw: Draw, workspace: Workspace, run: str) -> str:
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

    def drawn(draw: Draw) -> Injection:
        outside = Launch.kill_later
        return Injection(prepare=partial(prepare, draw), outside=outside, check=check, corrupts=True)

    return drawn


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
