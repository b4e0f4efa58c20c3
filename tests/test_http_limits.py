"""Timeouts of a connection, on a clock and a transport that the test moves."""

from types import SimpleNamespace

import pytest
from uvicorn import Config
from uvicorn.server import ServerState

from infer.http_limits import HEADER_TIMEOUT_S, READ_TIMEOUT_S, TimedProtocol


class Transport:
    """What a client has not read, and whether its connection was aborted."""

    def __init__(self):
        self.unread, self.aborted, self.high = 0, False, None

    def get_extra_info(self, _):
        return None

    def set_write_buffer_limits(self, high):
        self.high = high

    def get_write_buffer_size(self):
        return self.unread

    def abort(self):
        self.aborted = True


class Clock:
    """A loop's timers, run by `advance`."""

    def __init__(self):
        self.now, self.timers = 0.0, []

    def call_later(self, seconds, callback, *arguments):
        timer = SimpleNamespace(at=self.now + seconds, run=lambda: callback(*arguments))
        timer.cancel = lambda: self.timers.remove(timer) if timer in self.timers else None
        self.timers.append(timer)
        return timer

    def advance(self, seconds):
        self.now += seconds
        for timer in [timer for timer in self.timers if timer.at <= self.now]:
            self.timers.remove(timer)
            timer.run()


@pytest.fixture
def connection():
    clock, transport = Clock(), Transport()
    protocol = TimedProtocol(Config(lambda *_: None, log_config=None), ServerState(), {}, _loop=clock)
    protocol.connection_made(transport)
    return protocol, transport, clock


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nX: "])
def test_headers_that_do_not_arrive_close_a_connection(connection, sent):
    protocol, transport, clock = connection
    for byte in sent:  # each of which comes late does not count
        clock.advance(0.9 * HEADER_TIMEOUT_S / len(sent))
        protocol.data_received(bytes([byte]))
    assert not transport.aborted
    clock.advance(HEADER_TIMEOUT_S)
    assert transport.aborted


def test_a_client_that_reads_slowly_is_kept_and_one_that_stops_is_not(connection):
    protocol, transport, clock = connection
    clock.timers.clear()
    assert transport.high == 0
    transport.unread = 1000
    protocol.pause_writing()
    for unread in (999, 500, 1):
        transport.unread = unread
        clock.advance(READ_TIMEOUT_S)
        assert not transport.aborted
    protocol.resume_writing()
    clock.advance(10 * READ_TIMEOUT_S)
    protocol.pause_writing()
    clock.advance(READ_TIMEOUT_S)
    assert transport.aborted


def test_a_closed_connection_leaves_no_timer(connection):
    protocol, _, clock = connection
    protocol.pause_writing()
    assert len(clock.timers) == 2
    protocol.connection_lost(OSError())
    assert not clock.timers
