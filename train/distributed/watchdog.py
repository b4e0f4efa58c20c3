"""A heartbeat thread in every rank, which ends the process when a peer has failed.

A collective whose peer is dead or stopped may wait forever (NCCL) or fail without saying which rank (gloo). Each rank
therefore writes its progress once a second to a key of the rendezvous store. A rank whose key does not change for the
timeout is reported, and the others exit.
"""

import contextlib
import datetime
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch.distributed as dist

from charrnn.errors import EXIT_PEER_LOST, CharRNNError

logger = logging.getLogger(__name__)

# Each rank reads every rank's key: with many of them less often, to limit the load on the store.
_RANKS_PER_S = 32
# Timeouts after a stop signal, which a launcher sends to the ranks left when one has died, and after a collective has
# failed, when one surely has.
_STOPPING_TIMEOUT_S = 10.0
_FAILED_TIMEOUT_S = 3.0
_JOIN_S = 10.0
_LEFT = "left"


class Store(Protocol):
    """The part of torch's stores that is used."""

    def set(self, key: str, value: str) -> None: ...  # noqa: D102
    def multi_get(self, keys: list[str]) -> list[bytes]: ...  # noqa: D102


@dataclass(frozen=True)
class PeerFailure:
    """A failed peer, or a lost store. reporter: the rank that prints the message."""

    message: str
    reporter: int


@dataclass
class _Peer:
    """A rank's newest heartbeat, when it arrived, its fields, and when `beats` last increased. Times in seconds."""

    line: str
    received_at: float
    host: str
    beats: int
    progress: int
    progressed_at: float


class Watchdog:
    """One rank's watch over its peers; see the module."""

    def __init__(
        self,
        store: Store | None,
        rank: int,
        world_size: int,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
        exit_process: Callable[[int], object] = os._exit,
    ) -> None:
        """store: shared by the ranks, None for a single process. timeout_s: heartbeat timeout."""
        self._store, self._rank, self._world_size = store, rank, world_size
        self._timeout_s, self._clock, self._exit = timeout_s, clock, exit_process
        # What the user should do, appended to the error.
        self.advice: Callable[[], str] = lambda: "rerun the same command"
        self._period_s = max(min(1.0, timeout_s / 4), world_size / _RANKS_PER_S)
        self._beats = self._progress = self._sent = 0
        self._training = self._main_thread_reports = False
        self._silence_s = timeout_s
        self._ended, self._found = threading.Event(), threading.Event()
        self._failure: PeerFailure | None = None
        self._peers: dict[int, _Peer] = {}
        self.publish()

    def heartbeat(self, progress: int | None = None) -> None:
        """Record that the main thread is running. progress: a count that is comparable across ranks."""
        self._beats += 1
        if progress is not None:
            self._progress = progress

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Inside the block a main thread that makes no progress counts as hung too, not only a silent process."""
        self._training = True
        self.heartbeat()
        try:
            yield
        finally:
            self._training = False

    def shorten_timeout(self, timeout_s: float = _STOPPING_TIMEOUT_S) -> None:
        """Lower the timeout for silent ranks: the run is about to end."""
        self._silence_s = min(self._silence_s, timeout_s)

    def find_failure(self) -> PeerFailure | None:
        """The peer failure behind a failed collective; None if after some seconds all ranks still respond."""
        if self._store is None:
            return None
        self._main_thread_reports = True
        self.shorten_timeout(_FAILED_TIMEOUT_S)
        self._found.wait(_FAILED_TIMEOUT_S + 5 * self._period_s)
        return self._failure

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Run the thread inside the block. Every rank's watchdog must have been constructed before.

        A CharRNNError is raised by all ranks together; after any other exception the peers treat this rank as failed.
        """
        thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        thread.start()
        expected = False
        try:
            yield
            expected = True
        except CharRNNError:
            expected = True
            raise
        finally:
            self._ended.set()
            thread.join(_JOIN_S)  # it may be blocked on a lost store
            if expected:
                self.sign_off()

    def exit(self, failure: PeerFailure) -> None:
        """End this process after a peer failure, which one of the remaining ranks reports."""
        self.sign_off()
        if failure.reporter == self._rank:
            logger.error("%s; %s", failure.message, self.advice())
        self._exit(EXIT_PEER_LOST)

    def sign_off(self) -> None:
        """Announce that this rank exits on purpose."""
        with contextlib.suppress(RuntimeError):  # the process that hosts the store may have exited first
            self._write(_LEFT)

    def publish(self) -> None:
        """Write this rank's heartbeat."""
        self._sent += 1
        progress = self._progress if self._training else -1
        self._write(f"{self._sent} {self._beats} {progress} {socket.gethostname()}")

    def _write(self, line: str) -> None:
        if self._store is not None:
            self._store.set(_key(self._rank), line)

    def check_peers(self) -> PeerFailure | None:
        """Read all heartbeats. Returns the failure they show, if any."""
        assert self._store is not None
        now = self._clock()
        for rank, line in enumerate(self._store.multi_get([_key(r) for r in range(self._world_size)])):
            self._receive(rank, line.decode(), now)
        return self._silent_ranks(now) or self._stalled_ranks(now)

    def _run(self) -> None:
        # The first heartbeat is sent at once: only a rank that was heard of can be reported.
        while not self._ended.is_set():
            try:
                self.publish()
                failure = self.check_peers()
            except RuntimeError as error:
                failure = self._lost_store(error)
            if failure:
                self._failure = failure
                self._found.set()
                if not self._main_thread_reports:
                    self.exit(failure)
                return
            self._ended.wait(self._period_s)

    def _lost_store(self, error: RuntimeError) -> PeerFailure:
        """torchrun's agent hosts the store; rank 0 does where the environment says so."""
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "False" and self._rank and 0 in self._peers:
            return self._failure_of([0], "died or stopped responding")
        reason = " ".join(str(error).split())[:120]
        return PeerFailure(f"lost connection to the rendezvous store ({reason})", self._rank)

    def _receive(self, rank: int, line: str, now: float) -> None:
        known = self._peers.get(rank)
        if known and known.line == line:
            return
        _, beats, progress, host = line.split(" ", 3) if line != _LEFT else ("", "-1", "-1", "")
        progressed_at = known.progressed_at if known and known.beats == int(beats) else now
        self._peers[rank] = _Peer(line, now, host, int(beats), int(progress), progressed_at)

    def _silent_ranks(self, now: float) -> PeerFailure | None:
        """The ranks whose process sends no heartbeat."""
        timeout_s = max(self._silence_s, 3 * self._period_s)
        present = {r: p for r, p in self._peers.items() if p.line != _LEFT}
        silent = [r for r, p in present.items() if r != self._rank and now - p.received_at > timeout_s]
        return self._failure_of(silent, "died or stopped responding") if silent else None

    def _stalled_ranks(self, now: float) -> PeerFailure | None:
        """The ranks that block the others: those with the least progress, if no rank has made any for the timeout."""
        progress = {r: p.progress for r, p in self._peers.items()}  # -1 outside `training`
        newest = max(p.progressed_at for p in self._peers.values())
        least = min(progress.values())
        if least < 0 or now - newest <= self._timeout_s:
            return None
        return self._failure_of([r for r, value in progress.items() if value == least], "made no progress")

    def _failure_of(self, ranks: list[int], what: str) -> PeerFailure:
        names = ", ".join(f"{r} (on {self._peers[r].host})" for r in ranks)
        rest = [r for r, p in self._peers.items() if r not in ranks and p.line != _LEFT]
        return PeerFailure(f"rank {names} {what}", min(rest, default=self._rank))


def _key(rank: int) -> str:
    return f"heartbeat/{rank}"


def is_collective_error(error: RuntimeError) -> bool:
    """Whether a lost peer may be the cause: gloo raises plain RuntimeErrors, which contain its source file's name."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def connect_store(timeout_s: float, attempt: str) -> dist.Store:
    """Open a separate connection to the launcher's rendezvous store.

    Args:
        timeout_s: Timeout of its operations, at least 5 s.
        attempt: A key prefix, equal on all ranks and different after a restart (launchers count restarts differently).
    """
    server = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=datetime.timedelta(seconds=max(5.0, timeout_s)),
        wait_for_workers=False,
    )
    return dist.PrefixStore(f"charrnn/{attempt}", server)
