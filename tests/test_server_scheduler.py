"""The scheduler of infer serve on a thread's own terms: jobs in, events out, no processes and no HTTP."""

import base64
from collections import defaultdict
from queue import SimpleQueue

import numpy as np
import pytest
from tiny_models import CHARS, write_model

from charrnn.errors import SamplingError
from charrnn.sampling import SamplingOptions
from charrnn.vocab import Vocab
from infer import Engine
from infer.server import scheduler
from infer.server.batch import Job
from infer.server.scheduler import Scheduler
from infer.server.states import BLOCK, PrefixCache, StateError, TextState, digests

SHA = bytes(range(32))
PROMPT = "ROMEO:\n"


@pytest.fixture(scope="module", params=["GRU", "LSTM"])
def int8(request, model_folder):
    return Engine(write_model(model_folder / f"{request.param}8.onnx", rnn=request.param, precision="int8"))


class Run:
    """What became of some jobs."""

    def __init__(self, engine, jobs, max_streams=64, late=(), cancelled=(), then=()):
        """late: jobs that arrive after as many reports; cancelled: ids, likewise. then: jobs, one after the other."""
        self.texts, self.finish, self.states = defaultdict(str), {}, {}
        self.scores, self.errors, self.prompt_scores, self.counts = defaultdict(list), {}, {}, []
        inbox, self._late = SimpleQueue(), list(late)
        self._waiting = {(j.id, i) for j in [*jobs, *(j for _, j in late)] for i in range(len(j.streams))}
        self._waiting -= {key for key in self._waiting if key[0] in dict(cancelled).values()}
        self._cancelled, self._then = list(cancelled), list(then)
        for job in jobs:
            inbox.put(job)
        self._inbox = inbox
        self.scheduler = Scheduler(engine, inbox, self._take, max_streams)
        self.scheduler.run()

    def _take(self, events, counts):
        self.counts.append(counts)
        for event in events:
            key = event["id"], event.get("i")
            if "error" in event:
                self.errors[event["id"]] = event["error"]
                self._waiting = {key for key in self._waiting if key[0] != event["id"]}
            elif "prompt_scores" in event:
                self.prompt_scores[event["id"]] = event["prompt_scores"]
            else:
                self.texts[key] += event["text"]
                self.scores[key] += event.get("scores", [])
                if "finish" in event:
                    self.finish[key], self.states[key] = event["finish"], event.get("state")
                    self._waiting.discard(key)
        for todo in (self._late, self._cancelled):
            while todo and len(self.counts) >= todo[0][0]:
                self._inbox.put(todo.pop(0)[1])
        if not self._waiting and not self._late and not self._cancelled:
            following = self._then.pop(0) if self._then else None
            if following:
                self._waiting.add((following.id, 0))
            self._inbox.put(following)


def job(engine, id=0, prompt=PROMPT, length=50, seeds=(1,), **fields):
    ids = engine.vocab.begun(engine.vocab.encode(prompt)).astype(np.int64)
    options = SamplingOptions(**fields.pop("options", {}))
    return Job(id, ids, engine.zero_state(1), length, options, [(seed, 0) for seed in seeds], **fields)


def alone(engine, prompt, length, seed, **options):
    return "".join(engine.generate(prompt, length, SamplingOptions(**options), seed=seed))


OPTIONS = [
    {}, {"temperature": 0.7}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.1},
    {"repetition_penalty": 1.3}, {"temperature": 1.4, "top_k": 9, "top_p": 0.9, "min_p": 0.02},
]  # fmt: skip


@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_text_does_not_depend_on_load(precision, model_folder):
    # int8: exact, by integer products. fp32: a rounding may differ between batch sizes, which a draw seldom shows.
    engine = Engine(write_model(model_folder / f"load-{precision}.onnx", precision=precision))
    rng = np.random.default_rng(0)
    jobs = [
        job(engine, i, "ROMEO:\n"[: 1 + i % 7] * (1 + i % 60), int(rng.integers(100, 600)), [i], options=OPTIONS[i % 8])
        for i in range(64)
    ]
    wanted = [alone(engine, engine.vocab.decode(j.ids), j.length, j.id, **OPTIONS[j.id % 8]) for j in jobs]
    run = Run(engine, jobs[:20], max_streams=48, late=[(1 + i // 4, j) for i, j in enumerate(jobs[20:])])
    same = [run.texts[j.id, 0] == text for j, text in zip(jobs, wanted, strict=True)]
    assert all(same) if precision == "int8" else sum(same) >= 62
    assert max(counts["running"] for counts in run.counts) > 20
    assert run.scheduler.running == run.scheduler.waiting == 0


def test_choices_of_a_job_are_those_of_generate_batch(int8):
    run = Run(int8, [job(int8, seeds=range(5, 12))], max_streams=3)
    assert [run.texts[0, i] for i in range(7)] == int8.generate_batch(PROMPT, 7, 50, seed=5)
    assert set(run.finish.values()) == {"length"}
    assert max(counts["running"] for counts in run.counts) <= 3


def test_scores_are_the_log_probabilities_of_what_was_drawn(int8):
    run = Run(int8, [job(int8, logprobs=2, score_prompt=True, length=30, seeds=[4, 5])])
    for i in range(2):
        ids = int8.vocab.encode(PROMPT + run.texts[0, i]).astype(np.int64)
        logits, _ = int8.step(ids[None, :-1], int8.zero_state(1))
        log_p = logits[0] - np.log(np.exp(logits[0].astype(np.float64)).sum(-1, keepdims=True))
        scores = run.prompt_scores[0] + run.scores[0, i]
        assert [s[0] for s in scores] == ids.tolist()
        assert scores[0][1:] == (None, None)
        np.testing.assert_allclose([s[1] for s in scores[1:]], log_p[np.arange(len(ids) - 1), ids[1:]], atol=1e-5)
        assert [s[2][0][0] for s in scores[1:]] == log_p.argmax(-1).tolist()
        assert {len(s[2]) for s in scores[1:]} == {2}


def test_logits_of_one_tick_are_bounded(gru, monkeypatch):
    monkeypatch.setattr(scheduler, "_MOST_LOGITS", most := 6 * len(gru.vocab))
    sizes, step = [], gru.step
    monkeypatch.setattr(gru, "step", lambda *a: sizes.append((out := step(*a))[0].size) or out)
    run = Run(gru, [job(gru, logprobs=0, length=50, seeds=[4, 5])])
    assert max(sizes) <= most
    assert [run.texts[0, i] for i in range(2)] == [alone(gru, PROMPT, 50, seed) for seed in (4, 5)]


@pytest.mark.parametrize("stop", [(), ("zzz", "q!")])
@pytest.mark.parametrize("cut", [0, 1, 17, 100])
def test_a_text_goes_on_from_its_state(int8, stop, cut):
    whole = alone(int8, PROMPT, 150, 6)
    first = Run(int8, [job(int8, length=cut, seeds=[6], stop=stop, return_state=True)])
    encoded = first.states[0, 0].encode(SHA)
    text = TextState.decode(encoded, SHA, int8)
    assert text.drawn == cut
    ids = np.array(text.recent[-1:])
    rest = Job(1, ids, text.state, 150 - cut, SamplingOptions(), [(text.seed, text.drawn)], lead=1, continued=True,
               recent=text.recent[:-1])  # fmt: skip
    assert first.texts[0, 0] + Run(int8, [rest]).texts[1, 0] == whole


def test_a_state_ends_before_the_stop_text(int8):
    whole = alone(int8, PROMPT, 150, 6)
    stop = whole[90:96]
    run = Run(int8, [job(int8, length=150, seeds=[6], stop=(stop,), return_state=True)])
    text = run.states[0, 0]
    count = whole.find(stop)
    assert (text.drawn, text.recent[-1]) == (count, int8.vocab.encode(whole)[count - 1])
    _, wanted = int8.prefill(int8.vocab.encode(PROMPT + whole[: count - 1]))
    for part, other in zip(text.state, wanted, strict=True):
        np.testing.assert_allclose(part, other, atol=1e-5)


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:-1], lambda raw: b"crn\x02" + raw[4:], lambda raw: raw[:4] + b"x" + raw[5:],
        lambda raw: raw[:-4] + np.float32(np.nan).tobytes(), lambda raw: raw[:-4] + np.float32(1e30).tobytes(),
        lambda raw: raw[:52] + b"\x00\x00" + raw[54:], lambda raw: raw[:54] + b"\xff" * 4 + raw[58:], lambda raw: b"",
        lambda raw: raw[:44] + b"\xff" * 8 + raw[52:],
    ],
)  # fmt: skip
def test_damaged_states_are_refused(int8, damage):
    run = Run(int8, [job(int8, length=5, return_state=True)])
    raw = base64.b64decode(run.states[0, 0].encode(SHA))
    TextState.decode(base64.b64encode(raw).decode(), SHA, int8)
    with pytest.raises(StateError):
        TextState.decode(base64.b64encode(damage(raw)).decode(), SHA, int8)
    rounded = TextState(tuple(np.full_like(part, 1 + 1e-6) for part in int8.zero_state(1)), (1,), 0, 0)
    assert TextState.decode(rounded.encode(SHA), SHA, int8).recent == (1,)


def test_prompts_that_share_a_prefix_read_it_once(int8):
    long = "ROMEO:\nabc " * 80
    run = Run(int8, [job(int8, 0, long)], then=[job(int8, 1, long + "more"), job(int8, 2, long)])
    assert [run.texts[i, 0] for i in range(3)] == [alone(int8, p, 50, 1) for p in (long, long + "more", long)]
    cached = len(long) // BLOCK * BLOCK
    assert cached > BLOCK
    assert sum(counts["read"] for counts in run.counts) == 3 * (len(long) - 1) + len("more") - 2 * cached
    assert sum(counts["hits"] for counts in run.counts) == 2


def test_the_cache_is_bounded_and_drops_the_oldest():
    state = (np.zeros((2, 1, 64), np.float32),)
    cache = PrefixCache(most_bytes=20_000)
    blocks = digests(np.arange(30 * BLOCK + 3))
    assert len(blocks) == 30
    for digest in blocks:
        cache.put(digest, state)
    assert 0 < len(cache) < 20
    assert cache.longest(blocks) == (30 * BLOCK, state)
    assert cache.longest(blocks[:-1]) == (29 * BLOCK, state)
    # The shorter ones are gone; nothing cached is a prefix of the other.
    for others in (blocks[:10], digests(np.arange(1, 1000)), []):
        assert cache.longest(others) == (0, None)
    assert (cache.hits, cache.misses) == (2, 3)


def test_newcomers_do_not_hold_up_a_running_stream(int8, monkeypatch):
    groups, run_rows, read, step = [], scheduler.run_rows, [], int8.step
    monkeypatch.setattr(int8, "step", lambda ids, state: read.append(len(ids)) or step(ids, state))
    monkeypatch.setattr(
        scheduler, "run_rows", lambda e, rows, n: groups.append([r.job.id for r in rows]) or run_rows(e, rows, n)
    )
    short = [job(int8, i, "ab", length=1, seeds=[i]) for i in range(1, 1000)]
    run = Run(int8, [job(int8, 0, length=5000, seeds=[0])], max_streams=200, late=[(1, j) for j in short])
    crowded = [group for group in groups if len(group) > 1]
    assert len(crowded) > 10
    last = max(i for i, group in enumerate(groups) if 0 in group)
    assert all(0 in group for group in groups[:last])
    assert max(map(len, groups)) <= scheduler.GROUP_ROWS
    assert 1 < max(read) <= scheduler.GROUP_ROWS
    assert run.texts[0, 0] == alone(int8, PROMPT, 5000, 0)


def test_reports_are_one_per_turn_of_all_rows_unless_a_client_waits(int8, monkeypatch):
    monkeypatch.setattr(scheduler, "GROUP_ROWS", 4)
    run = Run(int8, [job(int8, length=5000, seeds=range(12))])
    assert [run.texts[0, i] for i in range(12)] == int8.generate_batch(PROMPT, 12, 5000, seed=0)
    assert sum(run.counts[0]["groups"]) <= 4  # first texts are reported at once
    reports = [sum(counts["groups"]) for counts in run.counts if counts["running"] == 12]
    assert reports.count(12) > 0.8 * len(reports) > 10


def test_prompts_are_read_for_a_bounded_time(gru, monkeypatch):
    sizes, step = [], gru.step
    monkeypatch.setattr(gru, "step", lambda ids, state: sizes.append(ids.shape) or step(ids, state))
    monkeypatch.setattr(scheduler, "_READ_S", 1e-9)  # as if reading took long
    run = Run(gru, [job(gru, i, "a" * 50, length=5) for i in range(3)])
    assert {rows for rows, _ in sizes} == {3}
    assert sizes[0][1] == max(length for _, length in sizes) == scheduler._LEAST_SHORT
    assert [run.texts[i, 0] for i in range(3)] == [alone(gru, "a" * 50, 5, 1)] * 3


def test_a_cancelled_job_leaves_and_the_others_go_on(int8):
    jobs = [job(int8, i, length=10**6 if i else 40, seeds=[i]) for i in range(3)]
    run = Run(int8, jobs, max_streams=2, cancelled=[(3, 1), (6, 2)])
    assert run.texts[0, 0] == alone(int8, PROMPT, 40, 0)
    assert run.scheduler.running == run.scheduler.waiting == 0
    assert len(run.texts[1, 0]) < 10**5


@pytest.mark.parametrize(
    ("method", "calls", "error", "message"),
    [
        ("decode", 1, SamplingError("the logits are not finite"), "the logits are not finite"),
        ("step", 0, MemoryError("(3, 50) ids"), "out of memory: (3, 50) ids"),
    ],
)
def test_an_error_ends_the_jobs_of_the_call_alone(gru, monkeypatch, method, calls, error, message):
    run_well, left = getattr(gru, method), iter([None] * calls + [error])

    def fails_once(*args, **kwargs):
        if failure := next(left, None):
            raise failure
        return run_well(*args, **kwargs)

    monkeypatch.setattr(gru, method, fails_once)
    run = Run(gru, [job(gru, i) for i in range(3)], then=[job(gru, 3)])
    assert run.errors == dict.fromkeys(range(3), message)
    assert run.texts[3, 0] == alone(gru, PROMPT, 50, 1)
    assert run.scheduler.running == run.scheduler.waiting == 0


def test_a_document_ends_its_choice(model_folder):
    vocab = Vocab.of_chars("".join(CHARS.symbols), document_end="!")
    engine = Engine(write_model(model_folder / "documents.onnx", vocab))
    run = Run(engine, [job(engine, length=2000, seeds=[1])])
    assert run.texts[0, 0] == alone(engine, PROMPT, 2000, 1)
    assert run.finish[0, 0] == "stop"
