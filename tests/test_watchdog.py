"""The watchdog: which ranks are reported, when, by whom, and which are not."""

import os
import socket
import threading
from contextlib import suppress
from unittest import mock

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from charrnn.errors import EXIT_PEER_LOST, CheckpointError
from train.distributed import watchdog
from train.distributed.watchdog import PeerFailure, Watchdog, is_collective_error

TIMEOUT = 60.0  # seconds; a heartbeat is then due once a second
DIED = "died or stopped responding"


class MemoryStore:
    """The part of a torch store that a watchdog uses, without a server."""

    def __init__(self):
        self.lines, self.lost = {}, False

    def set(self, key, value):
        self._check()
        self.lines[key] = value.encode()

    def multi_get(self, keys):
        self._check()
        return [self.lines[key] for key in keys]

    def _check(self):
        if self.lost:
            raise dist.DistNetworkError("Connection was\nreset by peer")


class Fleet:
    """The watchdogs of all ranks, on hosts of their own, under one clock; `second` does what their threads do."""

    def __init__(self, count, timeout_s=TIMEOUT, training=False):
        self.store, self.now, self.exits, self.dogs = MemoryStore(), 0.0, [], []
        for rank in range(count):
            with mock.patch.object(socket, "gethostname", return_value=f"host{rank}"):
                self.dogs.append(Watchdog(self.store, rank, count, timeout_s, lambda: self.now, self.exits.append))
        self.blocks = [dog.training() for dog in self.dogs] if training else []
        for block in self.blocks:
            block.__enter__()
        self.second()

    def second(self, alive=None, seconds=1.0):
        """Each rank in `alive` sends a heartbeat, then reads all; rank -> the failure it finds."""
        self.now += seconds
        alive = range(len(self.dogs)) if alive is None else alive
        with mock.patch.object(socket, "gethostname", side_effect=[f"host{rank}" for rank in alive]):
            for rank in alive:
                self.dogs[rank].publish()
        return {rank: self.dogs[rank].check_peers() for rank in alive}

    def seconds(self, count, alive=None):
        """`second` repeatedly; the last result, of which only the last may show a failure."""
        for _ in range(count - 1):
            assert set(self.second(alive).values()) == {None}
        return self.second(alive)


def failure(ranks, reporter, what=DIED):
    return PeerFailure(f"rank {', '.join(f'{r} (on host{r})' for r in ranks)} {what}", reporter)


def test_a_rank_that_signed_off_is_neither_reported_nor_reporter():
    fleet = Fleet(3)
    fleet.dogs[0].sign_off()
    assert set(fleet.seconds(200, alive=[1, 2]).values()) == {None}
    assert fleet.seconds(61, alive=[2])[2] == failure([1], 2)


def test_the_timeout_is_shortened_and_never_lengthened():
    fleet = Fleet(2)
    fleet.dogs[0].shorten_timeout()  # to ten seconds, as after a stop signal
    fleet.dogs[0].shorten_timeout(30)
    assert set(fleet.seconds(10, alive=[0]).values()) == {None}
    assert fleet.second(alive=[0])[0] == failure([1], 0)


def test_a_short_timeout_still_waits_for_three_heartbeats():
    """256 ranks send one every 8 seconds."""
    fleet = Fleet(256)
    fleet.dogs[0].shorten_timeout(3)
    assert fleet.second(alive=[0], seconds=8)[0] is None
    assert fleet.second(alive=[0], seconds=8)[0] is None
    fleet.second(seconds=8)
    assert fleet.second(alive=[0], seconds=25)[0].message.startswith("rank 1 (on host1), 2 (on host2)")


@pytest.mark.parametrize("behind", [[0], [2], [0, 1]])
def test_of_stalled_ranks_those_with_least_progress_are_reported(behind):
    fleet, rest = Fleet(3, training=True), sorted({0, 1, 2} - set(behind))
    for rank, dog in enumerate(fleet.dogs):
        dog.heartbeat(8 if rank in behind else 9)  # the others wait for those behind
    assert fleet.seconds(62) == dict.fromkeys(range(3), failure(behind, rest[0], "made no progress"))


def test_one_rank_with_a_heartbeat_clears_all_of_stalling():
    fleet = Fleet(2, training=True)
    for _ in range(4):
        fleet.dogs[1].heartbeat()  # an evaluation: it runs, without progress
        assert set(fleet.seconds(60).values()) == {None}
    assert fleet.seconds(2)[0].message == "rank 0 (on host0), 1 (on host1) made no progress"


def test_outside_training_no_rank_counts_as_stalled():
    fleet = Fleet(2, training=True)
    fleet.blocks[0].__exit__(None, None, None)
    assert set(fleet.seconds(300).values()) == {None}


def test_ranks_waiting_for_one_that_signed_off_are_not_reported():
    fleet = Fleet(2, training=True)
    fleet.dogs[0].sign_off()
    assert set(fleet.seconds(300, alive=[1]).values()) == {None}


@settings(max_examples=30)
@given(
    count=st.integers(2, 6),
    timeout_s=st.sampled_from([8.0, 20.0]),
    data=st.data(),
    draw=st.randoms(use_true_random=False),
)
def test_exactly_the_dead_ranks_are_reported_by_all_others(count, timeout_s, data, draw):
    """The dead fall silent at different moments; the rest progress or not, and are late at times, but not that late."""
    dead = data.draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=count - 1))
    died_at = {rank: data.draw(st.integers(2, 12), label=f"second in which rank {rank} dies") for rank in sorted(dead)}
    fleet, sent_at = Fleet(count, timeout_s), dict.fromkeys(range(count), 1)
    for second in range(2, 13 + int(timeout_s) + 1):
        alive = [r for r in range(count) if r not in dead or second < died_at[r]]
        sending = [r for r in alive if second % 4 == 0 or draw.random() < 0.8]
        for rank in sending:
            fleet.dogs[rank].heartbeat(second if draw.random() < 0.5 else None)
            sent_at[rank] = second
        for found in filter(None, fleet.second(sending).values()):
            reported = ranks_in(found, count)
            assert reported <= dead
            assert all(second - sent_at[r] > timeout_s for r in reported)
            assert found.reporter == min(set(range(count)) - reported)
    rest = set(range(count)) - dead
    found = fleet.second(sorted(rest), seconds=5)
    assert {rank: ranks_in(f, count) for rank, f in found.items()} == dict.fromkeys(rest, dead)


def ranks_in(found, count):
    assert found.message.endswith(DIED)
    return {rank for rank in range(count) if f"{rank} (on host{rank})" in found.message}


def test_only_the_reporter_prints_and_every_rank_exits_with_69(capsys):
    fleet, found = Fleet(3), failure([1], 0)
    fleet.dogs[0].advice = lambda: "resume from step 5"
    fleet.dogs[2].exit(found)
    assert capsys.readouterr().err == ""
    fleet.dogs[0].exit(found)
    assert capsys.readouterr().err == f"error: {found.message}; resume from step 5\n"
    assert fleet.exits == [EXIT_PEER_LOST, EXIT_PEER_LOST]
    assert set(fleet.seconds(100, alive=[1]).values()) == {None}  # they signed off


def test_exiting_works_without_the_store(capsys):
    fleet = Fleet(2)
    fleet.store.lost = True
    fleet.dogs[0].exit(PeerFailure("what", reporter=0))
    assert fleet.exits == [EXIT_PEER_LOST]
    assert "error: what; rerun the same command" in capsys.readouterr().err


def test_a_single_process_has_nothing_to_watch():
    dog = Watchdog(None, 0, 1, TIMEOUT)
    dog.heartbeat(3)
    with dog.training():
        dog.shorten_timeout()
    dog.sign_off()
    assert dog.find_failure() is None
    assert dog._exit is os._exit


class Thread:
    """A watchdog of rank 0 of 2 with its thread, on a clock that advances by `step_s` a reading."""

    def __init__(self, timeout_s=0.04, step_s=1.0):
        self.store, self.left = MemoryStore(), threading.Event()
        self.codes, self.now, self._step_s = [], 0.0, step_s
        Watchdog(self.store, 1, 2, timeout_s)
        self.dog = Watchdog(self.store, 0, 2, timeout_s, self._clock, self._exit)

    def _clock(self):
        self.now += self._step_s
        return self.now

    def _exit(self, code):
        self.codes.append(code)
        self.left.set()


def test_the_thread_ends_the_process_of_a_waiting_main_thread(capsys):
    rank = Thread()
    with rank.dog.running():
        assert rank.left.wait(30)
    assert rank.codes == [EXIT_PEER_LOST]
    assert f"error: rank 1 (on {socket.gethostname()}) {DIED}" in capsys.readouterr().err


def test_the_thread_ends_with_the_block_and_signs_off():
    rank, before = Thread(step_s=0), threading.active_count()
    with rank.dog.running():
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
    assert rank.store.lines["heartbeat/0"] == b"left"
    assert rank.codes == []


@pytest.mark.parametrize(("error", "signs_off"), [(CheckpointError("disk"), True), (ZeroDivisionError(), False)])
def test_a_rank_signs_off_after_a_user_error_and_not_a_defect(error, signs_off):
    rank = Thread(step_s=0)
    with suppress(type(error)), rank.dog.running():
        raise error
    assert (rank.store.lines["heartbeat/0"] == b"left") == signs_off


@pytest.mark.parametrize("number", [0, 1])
def test_a_lost_store_is_reported_by_any_rank_and_ends_it(number, capsys):
    rank = Thread(step_s=0)
    rank.dog._rank = number
    rank.store.lost = True
    with rank.dog.running():
        assert rank.left.wait(30)
    assert rank.codes == [EXIT_PEER_LOST]
    printed = capsys.readouterr().err
    assert "error: lost connection to the rendezvous store (Connection was reset by peer)" in printed
    assert printed.count("\n") == 1


def test_after_a_failed_collective_the_main_thread_finds_the_cause(monkeypatch):
    monkeypatch.setattr(watchdog, "_FAILED_TIMEOUT_S", 0.4)
    rank = Thread(timeout_s=1.6, step_s=0)
    rank.dog.check_peers()
    rank.now = 1.4  # below the timeout, if no collective had failed
    with rank.dog.running():
        assert rank.dog.find_failure() == PeerFailure(f"rank 1 (on {socket.gethostname()}) {DIED}", reporter=0)
    assert rank.codes == []


def test_a_failed_collective_with_all_ranks_alive_has_no_cause(monkeypatch):
    monkeypatch.setattr(watchdog, "_FAILED_TIMEOUT_S", 0.01)
    rank = Thread(step_s=0)
    with rank.dog.running():
        assert rank.dog.find_failure() is None
    assert rank.codes == []


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (dist.DistBackendError("NCCL error"), True),
        (RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer"), True),
        (RuntimeError("shape mismatch"), False),
    ],
)
def test_a_failed_collective_is_distinguished_from_a_defect(error, expected):
    assert is_collective_error(error) is expected
