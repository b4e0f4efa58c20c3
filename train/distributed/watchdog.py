"""A thread in every rank that tells the others it is alive, and ends the process when one of them is not.

A collective whose partner is gone or stopped may wait for ever (NCCL) or fail without saying which one (gloo). The
ranks therefore keep a line each in the store that they met in: how far the main thread has come, written once a
second. Who finds a line unchanged for too long names its rank and leaves.
"""

import contextlib
import datetime
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch.distributed as dist

from charrnn.errors import EXIT_PEER_LOST, CharRNNError

# Each rank reads every rank's line: with many of them less often, for the store's sake.
_RANKS_A_SECOND = 32
# How long a rank may be silent before it is taken for dead: after a stop signal, which a launcher sends to those left
# when one has died, and after a collective has failed, when one surely has.
_PATIENCE_STOPPED_S = 10.0
_PATIENCE_FAILED_S = 3.0
_JOIN_S = 10.0
_LEFT = "left"


class Store(Protocol):
    """The part of torch's stores that is used."""

    def set(self, key: str, value: str) -> None: ...  # noqa: D102
    def multi_get(self, keys: list[str]) -> list[bytes]: ...  # noqa: D102


@dataclass(frozen=True)
class Loss:
    """What befell the run. teller: the rank that tells the user of it."""

    what: str
    teller: int


@dataclass
class _Peer:
    """What is known of a rank: its newest line and when that came, its parts, and when `moves` last grew."""

    line: str
    heard_at: float
    host: str
    moves: int
    mark: int
    moved_at: float


class Watchdog:
    """One rank's watch over the others; see the module."""

    def __init__(
        self,
        store: Store | None,
        rank: int,
        count: int,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
        exit_process: Callable[[int], object] = os._exit,
    ) -> None:
        """store: shared by the ranks, None for a run of one. timeout_s: how long a rank may be silent."""
        self._store, self._rank, self._count = store, rank, count
        self._timeout_s, self._clock, self._exit = timeout_s, clock, exit_process
        # What the user is told to do, besides of what happened.
        self.advice: Callable[[], str] = lambda: "run the same command again"
        self._period_s = max(min(1.0, timeout_s / 4), count / _RANKS_A_SECOND)
        self._moves = self._mark = self._ticks = 0
        self._training = self._awaited = False
        self._patience_s = timeout_s
        self._ended, self._found = threading.Event(), threading.Event()
        self._loss: Loss | None = None
        self._peers: dict[int, _Peer] = {}
        self.publish()

    def beat(self, mark: int | None = None) -> None:
        """The main thread's sign that it goes on. mark: how far it has come, in a count that all ranks share."""
        self._moves += 1
        if mark is not None:
            self._mark = mark

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """While the block runs, a main thread that stands still counts as hung too, not only a silent process."""
        self._training = True
        self.beat()
        try:
            yield
        finally:
            self._training = False

    def hurry(self, patience_s: float = _PATIENCE_STOPPED_S) -> None:
        """From now on a silent rank is given up after seconds: the run is about to end."""
        self._patience_s = min(self._patience_s, patience_s)

    def cause(self) -> Loss | None:
        """Which rank's loss made a collective fail on the main thread; None when all are there after some seconds."""
        if self._store is None:
            return None
        self._awaited = True
        self.hurry(_PATIENCE_FAILED_S)
        self._found.wait(_PATIENCE_FAILED_S + 5 * self._period_s)
        return self._loss

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Runs the thread while the block runs. Every rank's watchdog must have been made before.

        Errors that all ranks raise together are CharRNNErrors; after any other, this rank is lost to the rest.
        """
        thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        thread.start()
        meant = False
        try:
            yield
            meant = True
        except CharRNNError:
            meant = True
            raise
        finally:
            self._ended.set()
            thread.join(_JOIN_S)  # it may be waiting for a store that is gone
            if meant:
                self.sign_off()

    def leave(self, loss: Loss) -> None:
        """Ends this process, because others are lost. One rank of those left says so."""
        self.sign_off()
        if loss.teller == self._rank:
            print(f"error: {loss.what}; {self.advice()}", file=sys.stderr, flush=True)
        self._exit(EXIT_PEER_LOST)

    def sign_off(self) -> None:
        """Tells the others that this rank's silence from now on is meant."""
        with contextlib.suppress(RuntimeError):  # the process that kept the store may have left first
            self._write(_LEFT)

    def publish(self) -> None:
        """Writes this rank's line."""
        self._ticks += 1
        mark = self._mark if self._training else -1
        self._write(f"{self._ticks} {self._moves} {mark} {socket.gethostname()}")

    def _write(self, line: str) -> None:
        if self._store is not None:
            self._store.set(_key(self._rank), line)

    def look(self) -> Loss | None:
        """Reads all ranks' lines; returns what is wrong."""
        assert self._store is not None
        now = self._clock()
        for rank, line in enumerate(self._store.multi_get([_key(r) for r in range(self._count)])):
            self._hear(rank, line.decode(), now)
        return self._silent(now) or self._standing(now)

    def _run(self) -> None:
        # At once, and not after a first period: a rank can only be named once it was heard of.
        while not self._ended.is_set():
            try:
                self.publish()
                loss = self.look()
            except RuntimeError as error:
                loss = self._without_store(error)
            if loss:
                self._loss = loss
                self._found.set()
                if not self._awaited:
                    self.leave(loss)
                return
            self._ended.wait(self._period_s)

    def _without_store(self, error: RuntimeError) -> Loss:
        """The store is kept by torchrun's agent, where it says so, and otherwise by process 0."""
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "False" and self._rank and 0 in self._peers:
            return self._told([0], "died or stopped answering")
        reason = " ".join(str(error).split())[:120]
        return Loss(f"the store that the processes met in is gone ({reason})", self._rank)

    def _hear(self, rank: int, line: str, now: float) -> None:
        known = self._peers.get(rank)
        if known and known.line == line:
            return
        _, moves, mark, host = line.split(" ", 3) if line != _LEFT else ("", "-1", "-1", "")
        moved_at = known.moved_at if known and known.moves == int(moves) else now
        self._peers[rank] = _Peer(line, now, host, int(moves), int(mark), moved_at)

    def _silent(self, now: float) -> Loss | None:
        """The ranks whose process says nothing any more."""
        patience = max(self._patience_s, 3 * self._period_s)
        there = {r: p for r, p in self._peers.items() if p.line != _LEFT}
        gone = [r for r, p in there.items() if r != self._rank and now - p.heard_at > patience]
        return self._told(gone, "died or stopped answering") if gone else None

    def _standing(self, now: float) -> Loss | None:
        """The ranks that hold the others up: those that have come least far, when none has moved for the time-out."""
        marks = {r: p.mark for r, p in self._peers.items()}  # -1 outside `training`
        newest = max(p.moved_at for p in self._peers.values())
        least = min(marks.values())
        if least < 0 or now - newest <= self._timeout_s:
            return None
        return self._told([r for r, mark in marks.items() if mark == least], "did not go on")

    def _told(self, ranks: list[int], what: str) -> Loss:
        names = ", ".join(f"{r} (on {self._peers[r].host})" for r in ranks)
        rest = [r for r, p in self._peers.items() if r not in ranks and p.line != _LEFT]
        return Loss(f"process {names} {what}", min(rest, default=self._rank))


def _key(rank: int) -> str:
    return f"alive/{rank}"


def is_of_a_collective(error: RuntimeError) -> bool:
    """Whether it may come from a peer that is gone: gloo raises plain RuntimeErrors, which name its source file."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def shared_store(timeout_s: float, attempt: str) -> dist.Store:
    """A connection of its own to the store that the launcher's processes met in.

    attempt: the same on every rank, and another after a restart. (Launchers count restarts each for itself.)
    """
    server = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=datetime.timedelta(seconds=max(5.0, timeout_s)),
        wait_for_workers=False,
    )
    return dist.PrefixStore(f"charrnn/{attempt}", server)
