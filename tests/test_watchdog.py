"""The watch that ranks keep over each other: who is blamed, when, who says so, and who is left in peace."""

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

TIMEOUT = 60.0  # seconds; a line is then due once a second


class MemoryStore:
    """The part of a torch store that a watchdog uses, without a server."""

    def __init__(self):
        self.lines = {}
        self.gone = False

    def set(self, key, value):
        self._check()
        self.lines[key] = value.encode()

    def multi_get(self, keys):
        self._check()
        return [self.lines[key] for key in keys]

    def _check(self):
        if self.gone:
            raise dist.DistNetworkError("Connection was\nreset by peer")


class Fleet:
    """The watchdogs of all ranks, on hosts of their own, under one clock; `second` is what their threads do."""

    def __init__(self, count, timeout_s=TIMEOUT):
        self.store, self.now, self.exits = MemoryStore(), 0.0, []
        self.dogs, self._blocks = [], {}
        for rank in range(count):
            with mock.patch.object(socket, "gethostname", return_value=f"host{rank}"):
                dog = Watchdog(self.store, rank, count, timeout_s, lambda: self.now, self.exits.append)
            self.dogs.append(dog)

    def enter_training(self, *ranks):
        for rank in ranks:
            self._blocks[rank] = self.dogs[rank].training()
            self._blocks[rank].__enter__()

    def leave_training(self, rank):
        self._blocks.pop(rank).__exit__(None, None, None)

    def second(self, alive=None, seconds=1.0):
        """Each of the ranks `alive` writes its line, and then reads all; rank -> what it finds wrong."""
        self.now += seconds
        alive = range(len(self.dogs)) if alive is None else alive
        hosts = [f"host{rank}" for rank in alive]
        with mock.patch.object(socket, "gethostname", side_effect=hosts):
            for rank in alive:
                self.dogs[rank].publish()
        return {rank: self.dogs[rank].check_peers() for rank in alive}

    def seconds(self, count, alive=None):
        """`second` again and again; the last findings, of seconds in which nothing was wrong but the last."""
        for _ in range(count - 1):
            assert set(self.second(alive).values()) == {None}
        return self.second(alive)


def test_a_rank_that_falls_silent_is_named_with_its_host_after_the_time_out_and_no_sooner():
    fleet = Fleet(3)
    fleet.second()
    found = fleet.seconds(61, alive=[0, 2])
    assert found == dict.fromkeys([0, 2], PeerFailure("rank 1 (on host1) died or stopped responding", reporter=0))


def test_the_lowest_rank_left_tells():
    fleet = Fleet(4)
    fleet.second()
    found = fleet.seconds(61, alive=[2, 3])
    what = "rank 0 (on host0), 1 (on host1) died or stopped responding"
    assert found == dict.fromkeys([2, 3], PeerFailure(what, reporter=2))


def test_a_rank_that_signed_off_is_never_blamed_and_does_not_tell():
    fleet = Fleet(3)
    fleet.second()
    fleet.dogs[0].sign_off()
    assert set(fleet.seconds(200, alive=[1, 2]).values()) == {None}
    found = fleet.seconds(61, alive=[2])
    assert found[2] == PeerFailure("rank 1 (on host1) died or stopped responding", reporter=2)


def test_a_rank_that_answers_again_in_time_is_not_blamed():
    fleet = Fleet(2)
    fleet.second()
    for _ in range(3):
        assert set(fleet.seconds(59, alive=[0]).values()) == {None}
        fleet.second()


def test_hurry_shortens_the_patience_and_nothing_lengthens_it_again():
    fleet = Fleet(2)
    fleet.second()
    fleet.dogs[0].shorten_timeout(10)
    fleet.dogs[0].shorten_timeout(30)
    assert fleet.seconds(11, alive=[0])[0].message.startswith("rank 1 (on host1)")


def test_in_a_hurry_a_stop_signal_leaves_ten_seconds():
    fleet = Fleet(2)
    fleet.second()
    fleet.dogs[0].shorten_timeout()
    assert set(fleet.seconds(10, alive=[0]).values()) == {None}
    assert fleet.second(alive=[0])[0]


def test_with_many_ranks_a_hurry_still_waits_for_three_lines():
    """256 ranks write every 8 seconds."""
    fleet = Fleet(256)
    fleet.second(seconds=8)
    fleet.dogs[0].shorten_timeout(3)
    assert fleet.second(alive=[0], seconds=8)[0] is None
    assert fleet.second(alive=[0], seconds=8)[0] is None
    fleet.second(seconds=8)
    assert fleet.second(alive=[0], seconds=25)[0].message.startswith("rank 1 (on host1), 2 (on host2)")


@pytest.mark.parametrize("behind", [(0,), (2,), (0, 1)])
def test_of_main_threads_that_stand_still_those_that_came_least_far_are_named(behind):
    fleet = Fleet(3)
    fleet.enter_training(0, 1, 2)
    for dog in fleet.dogs:
        dog.heartbeat(8)
    fleet.second()
    for rank in set(range(3)) - set(behind):
        fleet.dogs[rank].heartbeat(9)  # these wait for the others
    found = fleet.seconds(62)
    names = ", ".join(f"{rank} (on host{rank})" for rank in behind)
    teller = min(set(range(3)) - set(behind))
    assert found == dict.fromkeys(range(3), PeerFailure(f"rank {names} made no progress", teller))


def test_one_main_thread_that_moves_clears_all_of_standing_still():
    fleet = Fleet(2)
    fleet.enter_training(0, 1)
    fleet.second()
    for _ in range(4):
        fleet.dogs[1].heartbeat()  # an evaluation: it moves, and comes no further
        assert set(fleet.seconds(60).values()) == {None}
    found = fleet.seconds(2)
    assert found[0].message == "rank 0 (on host0), 1 (on host1) made no progress"


def test_a_rank_that_is_busy_outside_training_is_not_blamed_nor_are_those_that_wait_for_it():
    fleet = Fleet(2)
    fleet.enter_training(0, 1)
    fleet.second()
    fleet.leave_training(0)
    assert set(fleet.seconds(300).values()) == {None}


def test_main_threads_that_wait_for_one_that_signed_off_are_left_to_their_collective():
    fleet = Fleet(2)
    fleet.enter_training(0, 1)
    fleet.second()
    fleet.dogs[0].sign_off()
    assert set(fleet.seconds(300, alive=[1]).values()) == {None}


@settings(max_examples=30)
@given(
    count=st.integers(2, 6),
    timeout_s=st.sampled_from([8.0, 20.0]),
    data=st.data(),
    draw=st.randoms(use_true_random=False),
)
def test_whoever_dies_is_blamed_by_all_the_rest_and_nobody_else_ever_is(count, timeout_s, data, draw):
    """The dead fall silent at moments of their own; the rest go on or not, and are late at times, but not that late."""
    dead = data.draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=count - 1))
    died_at = {rank: data.draw(st.integers(2, 12), label=f"second in which rank {rank} dies") for rank in sorted(dead)}
    fleet = Fleet(count, timeout_s)
    fleet.second()
    spoke_at = dict.fromkeys(range(count), 1)
    for second in range(2, 13 + int(timeout_s) + 1):
        alive = [r for r in range(count) if r not in dead or second < died_at[r]]
        speaking = [r for r in alive if second % 4 == 0 or draw.random() < 0.8]
        for rank in speaking:
            fleet.dogs[rank].heartbeat(second if draw.random() < 0.5 else None)
            spoke_at[rank] = second
        for loss in filter(None, fleet.second(speaking).values()):
            blamed = blamed_by(loss, count)
            assert blamed <= dead
            assert all(second - spoke_at[r] > timeout_s for r in blamed)
            assert loss.reporter == min(set(range(count)) - blamed)
    rest = set(range(count)) - dead
    found = fleet.second(sorted(rest), seconds=5)
    assert {rank: blamed_by(loss, count) for rank, loss in found.items()} == dict.fromkeys(rest, dead)


def blamed_by(loss, count):
    assert loss.message.endswith("died or stopped responding")
    return {rank for rank in range(count) if f"{rank} (on host{rank})" in loss.message}


def test_only_the_teller_speaks_and_each_leaves_with_the_code_of_a_lost_peer(capsys):
    fleet = Fleet(3)
    loss = PeerFailure("rank 1 (on host1) died or stopped responding", reporter=0)
    fleet.dogs[0].advice = lambda: "resume from step 5"
    fleet.dogs[2].exit(loss)
    assert capsys.readouterr().err == ""
    fleet.dogs[0].exit(loss)
    assert capsys.readouterr().err == f"error: {loss.message}; resume from step 5\n"
    assert fleet.exits == [EXIT_PEER_LOST, EXIT_PEER_LOST]
    fleet.second(alive=[1])
    assert set(fleet.seconds(100, alive=[1]).values()) == {None}  # they signed off


def test_leaving_does_not_fail_when_the_store_is_gone(capsys):
    fleet = Fleet(2)
    fleet.store.gone = True
    fleet.dogs[0].exit(PeerFailure("what", reporter=0))
    assert fleet.exits == [EXIT_PEER_LOST]
    assert "error: what; rerun the same command" in capsys.readouterr().err


def test_a_run_of_one_process_watches_nobody():
    dog = Watchdog(None, 0, 1, TIMEOUT)
    dog.heartbeat(3)
    with dog.training():
        dog.shorten_timeout()
    dog.sign_off()
    assert dog.find_failure() is None


class Thread:
    """A watchdog of rank 0 of 2 with its thread, on a clock that goes on by `seconds_a_reading`."""

    def __init__(self, timeout_s=0.04, seconds_a_reading=1.0):
        self.store, self.left = MemoryStore(), threading.Event()
        self.codes, self.now, self._pace = [], 0.0, seconds_a_reading
        Watchdog(self.store, 1, 2, timeout_s)
        self.dog = Watchdog(self.store, 0, 2, timeout_s, self._clock, self._exit)

    def _clock(self):
        self.now += self._pace
        return self.now

    def _exit(self, code):
        self.codes.append(code)
        self.left.set()


def test_the_thread_ends_the_process_of_the_main_thread_that_waits(capsys):
    rank = Thread()
    with rank.dog.running():
        assert rank.left.wait(30)
    assert rank.codes == [EXIT_PEER_LOST]
    assert f"error: rank 1 (on {socket.gethostname()}) died or stopped responding" in capsys.readouterr().err


def test_the_thread_ends_with_the_block_and_says_that_its_silence_is_meant():
    rank = Thread(seconds_a_reading=0)
    before = threading.active_count()
    with rank.dog.running():
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
    assert rank.store.lines["heartbeat/0"] == b"left"
    assert rank.codes == []


@pytest.mark.parametrize(("error", "meant"), [(CheckpointError("disk"), True), (ZeroDivisionError(), False)])
def test_after_an_error_that_all_ranks_share_a_rank_signs_off_and_after_a_defect_it_counts_as_lost(error, meant):
    rank = Thread(seconds_a_reading=0)
    with suppress(type(error)), rank.dog.running():
        raise error
    assert (rank.store.lines["heartbeat/0"] == b"left") == meant


def test_a_store_that_is_gone_ends_the_process(capsys):
    rank = Thread(seconds_a_reading=0)
    rank.store.gone = True
    with rank.dog.running():
        assert rank.left.wait(30)
    assert rank.codes == [EXIT_PEER_LOST]
    told = capsys.readouterr().err
    assert "error: lost connection to the rendezvous store (Connection was reset by peer)" in told
    assert told.count("\n") == 1


def test_whoever_finds_the_store_gone_says_so(capsys):
    rank = Thread()
    rank.dog._rank = 1
    rank.store.gone = True
    with rank.dog.running():
        assert rank.left.wait(30)
    assert "lost connection to the rendezvous store" in capsys.readouterr().err


def test_after_a_failed_collective_the_cause_is_found_in_a_hurry_and_the_main_thread_ends_the_process(monkeypatch):
    monkeypatch.setattr(watchdog, "_FAILED_TIMEOUT_S", 0.4)
    rank = Thread(timeout_s=1.6, seconds_a_reading=0)
    rank.dog.check_peers()
    rank.now = 1.4  # too soon to take rank 1 for dead, if no collective had failed
    with rank.dog.running():
        loss = rank.dog.find_failure()
    assert loss == PeerFailure(f"rank 1 (on {socket.gethostname()}) died or stopped responding", reporter=0)
    assert rank.codes == []


def test_a_collective_that_failed_with_all_ranks_there_has_no_cause(monkeypatch):
    monkeypatch.setattr(watchdog, "_FAILED_TIMEOUT_S", 0.01)
    rank = Thread(seconds_a_reading=0)
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
def test_a_failed_collective_is_told_from_a_defect(error, expected):
    assert is_collective_error(error) is expected


def test_the_process_really_exits_unless_told_otherwise():
    assert Watchdog(None, 0, 1, TIMEOUT)._exit is os._exit
