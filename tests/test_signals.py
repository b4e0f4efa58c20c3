"""Stop signals: noted once, without an exception in anybody's code, and the second Ctrl-C ends the process at once."""

import logging
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from charrnn.errors import EXIT_INTERRUPTED
from charrnn.log import configure_logging
from train.distributed.signals import StopSignals

ROOT = Path(__file__).parent.parent
STOPS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT]

# Sent two signals, one after the other. What it waits in is given as PROGRAM's text.
PROGRAM = """
import ctypes, sys, threading, time
from train.distributed.signals import StopSignals

libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
locked = threading.Lock()
locked.acquire()
libc.pthread_mutex_lock(mutex)
with StopSignals(lambda: print("noted", flush=True)).handled():
    print("ready", flush=True)
    {wait}
"""
WAITS = {
    "in C code that never returns": "libc.pthread_mutex_lock(mutex)",
    "for a lock": "locked.acquire()",
    "asleep": "time.sleep(60)",
    "in Python code": "while True: pass",
}


@pytest.fixture
def noted():
    """Set once a signal was noted; its `count` says how often."""

    class Noted(threading.Event):
        count = 0

        def __call__(self):
            self.count += 1
            self.set()

    return Noted()


@pytest.mark.parametrize("number", STOPS)
def test_a_stop_signal_is_recorded_and_raises_nothing(noted, capsys, number):
    signals = StopSignals(noted)
    with signals.handled():
        assert signals.received == 0
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            pytest.fail("Ctrl-C cut off what was running")
        assert noted.wait(30)
        assert signals.received == number
    assert noted.count == 1
    again = " (Ctrl-C again exits immediately)" if number == signal.SIGINT else ""
    expected = f"warning: {number.name} received: stopping after this step and its checkpoint{again}\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(("first", "second"), [(signal.SIGUSR1, signal.SIGTERM), (signal.SIGINT, signal.SIGTERM)])
def test_the_first_signal_decides_and_later_ones_change_nothing(noted, capsys, first, second):
    signals = StopSignals(noted)
    with signals.handled():
        for number in (first, second, second):
            os.kill(os.getpid(), number)
    assert (signals.received, noted.count) == (first, 1)
    assert capsys.readouterr().err.count("\n") == 1


def test_a_signal_during_installation_is_recorded(noted, monkeypatch):
    install, sent = signal.signal, []

    def installing(number, handler):
        before = install(number, handler)
        if number == signal.SIGTERM and not sent:
            sent.append(number)
            signal.raise_signal(number)
        return before

    monkeypatch.setattr(signal, "signal", installing)
    signals = StopSignals(noted)
    with signals.handled():
        pass
    assert signals.received == signal.SIGTERM


def test_other_signals_keep_their_handlers(noted):
    seen = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: seen.append(number))
    signals = StopSignals(noted)
    try:
        with signals.handled():
            signal.raise_signal(signal.SIGUSR2)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert seen == [signal.SIGUSR2]
    assert (signals.received, noted.count) == (0, 0)


@pytest.mark.parametrize("error", [None, ZeroDivisionError])
def test_everything_is_restored_after_the_block(error):
    def present():
        descriptor = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(descriptor)
        descriptors = len(list(Path("/dev/fd").iterdir()))
        return [signal.getsignal(number) for number in STOPS], threading.active_count(), descriptors, descriptor

    before = present()
    with suppress(ZeroDivisionError), StopSignals().handled():
        assert all(during != now for during, now in zip(present(), before, strict=True))
        if error:
            raise error
    assert present() == before


def test_in_other_threads_nothing_is_installed(noted):
    handlers = [signal.getsignal(number) for number in STOPS]
    seen = []

    def watch():
        with StopSignals(noted).handled():
            seen.append([signal.getsignal(number) for number in STOPS])

    thread = threading.Thread(target=watch)
    thread.start()
    thread.join()
    assert seen == [handlers]


def test_ranks_other_than_the_main_log_errors_only(noted, capsys):
    configure_logging(logging.ERROR)
    with StopSignals(noted).handled():
        signal.raise_signal(signal.SIGTERM)
    assert noted.count == 1
    assert capsys.readouterr().err == ""


class Waiting:
    """A process that waits as PROGRAM says, until it is sent signals."""

    def __init__(self, wait):
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM.format(wait=wait)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        self.says("ready")

    def says(self, line):
        assert self.process.stdout.readline() == f"{line}\n"

    def end(self):
        """Its exit code and all that it wrote to stderr."""
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors


@pytest.mark.parametrize("wait", WAITS)
def test_a_second_ctrl_c_ends_the_process_immediately(wait):
    waiting = Waiting(WAITS[wait])
    try:
        waiting.process.send_signal(signal.SIGINT)
        waiting.says("noted")
        assert waiting.process.poll() is None
        waiting.process.send_signal(signal.SIGINT)
        code, errors = waiting.end()
    finally:
        waiting.process.kill()
    assert code == EXIT_INTERRUPTED
    assert "SIGINT received: stopping after this step and its checkpoint (Ctrl-C again exits immediately)" in errors
    assert errors.count("\n") == 1


def test_ctrl_c_twice_ends_a_process_after_sigterm():
    waiting = Waiting(WAITS["asleep"])
    try:
        waiting.process.send_signal(signal.SIGTERM)
        waiting.says("noted")
        waiting.process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            waiting.process.wait(0.2)  # two at the same moment would be one
        waiting.process.send_signal(signal.SIGINT)
        assert waiting.process.wait(2) == EXIT_INTERRUPTED
    finally:
        waiting.process.kill()


def test_a_signal_that_is_ignored_stays_ignored():
    """As nohup has it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals().handled():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
