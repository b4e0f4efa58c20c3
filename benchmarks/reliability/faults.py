"""The table of faults: how each is injected, and what must come of it."""

import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from benchmarks.reliability import injections, tampering
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
from benchmarks.reliability.harness import Workspace
from benchmarks.reliability.injections import Draw
from benchmarks.reliability.tampering import tampered
from charrnn.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED

INJECTIONS_A_RUN = 12


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
    "truncated checkpoint": (tampering.truncate, "a random file of the newest, cut at a random place"),
    "flipped byte": (tampering.flip, "a random byte of a random file of the newest"),
    "missing file": (tampering.remove_file, "a random file of the newest, deleted"),
}
_DONORS = {"model": "width", "vocabulary": "alphabet", "corpus": "order of the same words"}


def _faults() -> Iterator[Fault]:
    for place, (phase, function) in _PHASES.items():
        yield Fault(f"SIGKILL in {place}", f"{_SELF} {function}", _RESUMES, partial(injections.kill_in, phase))
    yield Fault("SIGKILL at any moment", f"{_MOMENT} or of the seconds before", _RESUMES, injections.kill_anywhere)
    meant = "the other exits with 69 and reports the killed rank; the launcher restarts both"
    for name, (launcher, command) in _LAUNCHERS.items():
        how = f"{_SELF} a step, evaluation, checkpoint write or pruning, under {command}"
        restarts = partial(chain_of_restarts, launcher=launcher)
        yield Fault(f"SIGKILL of a rank of 2{name}", how, meant, injections.kill_rank, 2, restarts)
    meant = "both ranks exit with 69 and report the lost rendezvous store"
    yield Fault("SIGKILL of torchrun of 2", _MOMENT, meant, injections.kill_launcher, 2)
    how = f"{_SELF} a step or evaluation; `train.peer_timeout` is 4 s"
    meant = "the other exits with 69 and reports the stopped rank"
    yield Fault("SIGSTOP of a rank of 2", how, meant, injections.stop_rank, 2)
    for name, (number, code, targets) in _SIGNALS.items():
        for target in targets:
            processes, where, ranks = _TARGETS[target]
            meant = f"the step is finished and in a checkpoint; exits with {code}{ranks}"
            yield Fault(name + where, _MOMENT, meant, partial(injections.stop_signal, number, code, target), processes)
    how = "a step sleeps for an hour in C, from a random point on; the second once the first was answered"
    meant = "exits with 130 at once, without a checkpoint"
    yield Fault("Ctrl-C twice in a hung step", how, meant, injections.second_interrupt)
    how = f"the run folder is on a tmpfs of {DISK_MIB} MiB; no byte of it is left {_WRITE}"
    yield Fault("full disk", how, _SPACE, injections.full_disk, run=on_small_disk)
    how = f"RLIMIT_FSIZE, less than an optimizer's state takes, {_WRITE}"
    yield Fault("limit on the size of files", how, _SPACE, injections.file_limit)
    for name, (change, how) in _DAMAGES.items():
        yield Fault(name, how, _PREVIOUS, tampered(change, "damaged"))
    how, meant = "one of the three above to each", "refused with 2; resumes once they are back"
    yield Fault("every checkpoint damaged", how, meant, tampered(tampering.corrupt_all, ""))
    meant = "one line reports the other run; resumes from the newest of its own"
    for donor, what in _DONORS.items():
        how = f"copied in as the newest, and left there: from a run with another {what}"
        donate = partial(tampering.donate, donor)
        yield Fault(f"checkpoint of another {donor}", how, meant, tampered(donate, "foreign"))
    how, meant = "the same command while the first trains", "the second is refused with 2, which names the first"
    yield Fault("two runs on one folder", how, meant, injections.pause_in_step, run=second_runs)
    how = "left by a SIGKILL; its .lock.json names a process that lives"
    yield Fault("stale lock", how, "resumes", tampered(tampering.claim_lock, "resumed"))
    how, meant = "the loss times NaN, at a random step", "both end, rank 0 with 2; the step is reported"
    yield Fault("NaN loss on a rank of 2", how, meant, partial(injections.wrong_number, {"nan": "diverged"}), 2)
    how = "one bit of a window's start flips, at a random step: it lies outside of the text, or elsewhere"
    reports = {"outside": "corrupted", "elsewhere": "different"}
    meant = "both end, rank 0 with 2; it is reported"
    yield Fault("corrupted index on a rank of 2", how, meant, partial(injections.wrong_number, reports), 2)


FAULTS = tuple(_faults())
