"""A pool of workers: how they start and end, and what jobs they take."""

import asyncio
import json
import logging
import sys
from contextlib import suppress

import pytest
from tiny_models import write_model

from infer.model_file.loader import default_model
from infer.server import completions
from infer.server import pool as server_pool
from infer.server.app import build_app
from infer.server.completions import Completion
from infer.server.errors import ApiError
from infer.server.guard import Service
from infer.server.metrics import Metrics
from infer.server.pool import Pool
from infer.server.protocol import parse
from infer.server.ticket import Ticket
from infer.server.worker import facts

METRICS = Metrics().of("m")


class Jobs(Pool):
    """A pool whose worker takes jobs and does nothing."""

    def __init__(self, vocab, metrics=None):
        super().__init__("m", default_model(), metrics or Metrics(), 1, 1, 300, 0)
        self.facts = {"vocab": vocab}
        self.workers[0].ready = True


def completion(pool, **fields):
    request = parse(json.dumps(fields).encode(), 1 << 30)
    return Completion(request, pool, "cmpl-1", timeout=5, began=asyncio.get_running_loop().time())


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 30))


def test_a_worker_does_not_run_files_of_the_current_folder(tmp_path, monkeypatch):
    for name in ("base64", "onnxruntime", "numpy"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit(3)\n")
    monkeypatch.chdir(tmp_path)

    async def start_and_close():
        pool = Pool("m", default_model(), Metrics(), 1, 1, 1, 1)
        keeper = asyncio.create_task(pool.workers[0].run())
        with suppress(TimeoutError):
            await asyncio.wait_for(pool.startup_finished.wait(), 20)
        await pool.close()
        await keeper
        return pool.facts

    for path in ("", ":"):
        monkeypatch.setenv("PYTHONPATH", path)
        assert run(start_and_close()) is not None
        assert not (tmp_path / "ran").exists()


def test_a_worker_that_cannot_start_or_ends_in_mid_line_is_restarted(monkeypatch, caplog):
    """The first cannot be started; those after it break off in a line."""
    monkeypatch.setattr(logging.getLogger("charrnn.serve"), "propagate", True)
    monkeypatch.setattr(server_pool, "_RESTART_S", 0.001)
    start, failures = asyncio.create_subprocess_exec, []

    async def create(*command, **options):
        if not failures:
            failures.append(OSError(11, "Resource temporarily unavailable"))
            raise failures[0]
        return await start(sys.executable, "-c", "print('{\"events\": [', end='')", **options)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", create)

    async def main():
        pool = Pool("m", default_model(), Metrics(), 1, 1, 1, 1)
        (worker,) = pool.workers
        ready = asyncio.Event()
        ticket = worker.submit({"id": 0, "ids": "", "state": None, "seeds": [1]}, False, ready)
        keeper = asyncio.create_task(worker.run())
        await ready.wait()
        with pytest.raises(ApiError, match="worker of this request ended"):
            ticket.take()
        await asyncio.sleep(0)
        assert not keeper.done()
        await pool.close()
        keeper.cancel()

    run(main())
    assert "cannot start a worker of m: [Errno 11]" in caplog.text


def test_a_stream_that_fails_after_some_text_ends_with_the_error(gru):
    async def main():
        pool = Jobs(gru.vocab)
        asked = completion(pool, prompt="a", stream=True, max_tokens=5)
        asked.submit()
        changes = asked.changes()
        (ticket,) = asked._tickets
        ticket.push({"id": ticket.id, "i": 0, "text": "b", "chars": 1})
        events = asked.stream(changes, await anext(changes))
        first = await anext(events)
        ticket.fail(ApiError(500, "the worker ended"))
        return [first] + [event async for event in events]

    first, *rest = run(main())
    assert '"text": "b"' in first
    assert [json.loads(event[6:])["error"]["message"] for event in rest] == ["the worker ended"]


def test_a_stream_whose_response_never_begins_frees_its_rows(gru):
    """The client leaves in the moment in which the first text comes."""

    async def main():
        pool = Jobs(gru.vocab)
        app = build_app(Service({"m": pool}, Metrics(), 100, 5))
        body = {"type": "http.request", "body": json.dumps({"stream": True}).encode(), "more_body": False}
        left, received = asyncio.Event(), [body]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}

        async def receive():
            if received:
                return received.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(_):
            await asyncio.sleep(0)

        request = asyncio.create_task(app(scope, receive, send))
        while not (tickets := pool.workers[0].tickets):
            await asyncio.sleep(0)
        (ticket,) = tickets.values()
        ticket.push({"id": ticket.id, "i": 0, "text": "b", "chars": 1})
        left.set()
        await request
        assert not pool.workers[0].tickets

    run(main())


def test_times_are_those_of_each_choice_streamed_or_not(gru):
    async def main(stream):
        metrics = Metrics()
        pool = Jobs(gru.vocab, metrics)
        asked = completion(pool, prompt="a", n=2, max_tokens=3, stream=stream)
        asked.submit()
        (ticket,) = asked._tickets
        events = [(0, "b", {}), (0, "cd", {"finish": "length"}), (1, "", {}), (1, "bcd", {"finish": "stop"})]
        for i, text, last in events:
            ticket.push({"id": ticket.id, "i": i, "text": text, "chars": len(text)} | last)
        return metrics.text().decode()

    for stream in (False, True):
        text = run(main(stream))
        assert 'charrnn_time_to_first_char_seconds_count{model="m"} 2.0' in text
        assert 'charrnn_time_per_char_seconds_count{model="m"} 1.0' in text


def test_best_of_takes_an_empty_text_last(gru):
    async def main():
        pool = Jobs(gru.vocab)
        asked = completion(pool, prompt="a", best_of=2, n=1, max_tokens=3)
        asked.submit()
        (ticket,) = asked._tickets
        ticket.push({"id": ticket.id, "i": 0, "text": "", "chars": 0, "scores": [], "finish": "stop"})
        ticket.push({"id": ticket.id, "i": 1, "text": "b", "chars": 1, "scores": [[1, -3.0, []]], "finish": "stop"})
        return (await asked.complete())["choices"]

    (choice,) = run(main())
    assert choice["text"] == "b"


@pytest.mark.parametrize(("scores", "events"), [(0, 300), (1, 5)])
def test_a_client_that_does_not_read_loses_its_row(scores, events):
    """1,000 characters an event: 256 Ki of them may wait, or 4 Ki with log probabilities."""
    cancelled = []

    async def main():
        ticket = Ticket(
            cancelled.append, {"id": 0, "ids": "", "state": None, "seeds": [1]}, True, asyncio.Event(), METRICS
        )
        for _ in range(events):
            assert not ticket.finished
            ticket.push({"i": 0, "text": "a" * 1000, "chars": 1000, "scores": [(0, 0.0, [])] * 1000 * scores})
            if ticket.finished:
                break
        assert cancelled == [ticket]
        with pytest.raises(ApiError, match="not read fast enough"):
            ticket.take()

    run(main())


def test_states_of_all_prompts_are_counted_before_any_is_submitted(gru, monkeypatch):
    monkeypatch.setattr(server_pool, "_MOST_PROMPT_BYTES", 10_000)

    async def main():
        pool = Jobs(gru.vocab)
        with pytest.raises(ApiError, match=r"take 16,\d+ bytes, more than 10,000") as refused:
            completion(pool, prompt=["a"] * 4, state="A" * 4000).submit()
        assert (refused.value.status, pool.workers[0].tickets) == (400, {})
        completion(pool, prompt=["a"] * 2, state="A" * 4000).submit()
        with pytest.raises(ApiError, match="queue is full") as refused:
            completion(pool, prompt="a", state="A" * 4000).submit()
        assert (refused.value.status, len(pool.workers[0].tickets)) == (429, 2)

    run(main())


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logprobs": 0, "n": 2, "max_tokens": 51}, "logprobs"),
        ({"logprobs": 5, "prompt": ["a"] * 4, "max_tokens": 26}, "logprobs"),
        ({"logprobs": 0, "echo": True, "prompt": "a" * 91, "max_tokens": 10}, "logprobs"),
        ({"best_of": 2, "max_tokens": 51}, "best_of"),
        ({"logprobs": 0, "prompt": "a" * 91, "max_tokens": 100}, None),
        ({"echo": True, "n": 2, "max_tokens": 500}, None),
    ],
)
def test_scores_of_a_request_are_bounded(gru, monkeypatch, fields, param):
    monkeypatch.setattr(completions, "_MOST_SCORES", 100)

    async def main():
        pool = Jobs(gru.vocab)
        if param is None:
            completion(pool, **fields)
            return
        with pytest.raises(ApiError, match="more than 100; lower") as refused:
            completion(pool, **fields)
        assert (refused.value.status, refused.value.param) == (400, param)

    run(main())


def test_what_is_told_of_a_model_is_json(model_folder):
    from infer import Engine

    engine = Engine(write_model(model_folder / "facts.onnx"))
    engine.config["model"] |= {"embedding_dim": float("nan"), "note": "\ud800"}
    told = facts(engine, b"")
    json.dumps({name: told[name] for name in told if name != "vocab"}, allow_nan=False).encode()
    assert told["shape"].keys() == {"rnn", "num_layers", "hidden_dim"}
