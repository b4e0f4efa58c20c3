"""What the page computes, offers and refuses, without a browser; test_page.py looks at it in one."""

import asyncio
import itertools
import math
import os
import socket
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from tiny_models import write_model

from charrnn.errors import ConfigError, ModelFileError, SamplingError, VocabError
from charrnn.sampling import SamplingOptions, probabilities
from infer import sandbox
from infer.ui import views
from infer.ui.app import MAX_QUEUE, build_page, listen
from infer.ui.models import Models
from infer.ui.predictions import (
    MAX_LENGTH,
    MAX_PROMPT_CHARS,
    NUM_BARS,
    Bar,
    Character,
    generate,
    next_character,
    surprisal,
)

OPTIONS = {"temperature": 0.8, "top_k": 0, "top_p": 1.0}


@pytest.fixture(scope="module")
def model(gru):
    return gru.path


# predictions


def test_the_stream_grows_to_the_engines_text_by_the_models_time(gru):
    now = [0.0]

    def clock() -> float:
        now[0] += 1.0
        return now[0]

    states = []
    for state in generate(gru, "the ", 100, **OPTIONS, seed="3", clock=clock):
        states.append(state)
        now[0] += 1000.0  # what the page does with the text
    assert len(states) > 2
    assert all(later.text.startswith(earlier.text) for earlier, later in itertools.pairwise(states))
    pieces = list(gru.generate("the ", 100, SamplingOptions(0.8), seed=3))
    assert (states[-1].text, states[-1].seed) == ("".join(pieces), 3)
    assert states[-1].seconds <= 2 * len(pieces)
    assert states[-1].chars_per_s == pytest.approx(100 / states[-1].seconds)
    assert len({list(generate(gru, "", 1, **OPTIONS, seed=" "))[-1].seed for _ in range(3)}) == 3


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prompt": "世"}, VocabError, r"not in this model's vocabulary: '世' \(U\+4E16\)"),
        ({"prompt": "a" * (MAX_PROMPT_CHARS + 1)}, VocabError, "2,001 characters; this page reads 2,000"),
        ({"prompt": "\ud800"}, VocabError, "not valid Unicode"),
        ({"length": 0}, SamplingError, "1 to 5000 characters, not 0"),
        ({"length": MAX_LENGTH + 1}, SamplingError, "not 5001"),
        ({"length": 1.5}, SamplingError, "length must be a whole number"),
        ({"top_k": 0.5}, SamplingError, "top-k must be a whole number"),
        ({"length": math.nan}, SamplingError, "length has no number; type one"),
        ({"temperature": math.nan}, SamplingError, "temperature has no number"),
        ({"top_k": math.inf}, SamplingError, "top-k has no number"),
        ({"top_p": math.nan}, SamplingError, "top-p has no number"),
        ({"seed": "1" * 5000}, SamplingError, "5000 digits; this page takes 20 at most"),
        ({"seed": "x" * 5000}, SamplingError, "not 'x{40}'; leave"),
        ({"top_p": 2}, SamplingError, "top_p"),
        ({"seed": "-1"}, SamplingError, "seed must be a whole number"),
        ({"seed": "one"}, SamplingError, "seed must be a whole number"),
    ],
)
def test_invalid_inputs_are_refused_with_the_reason(gru, change, error, message):
    with pytest.raises(error, match=message):
        next(generate(gru, **{"prompt": "a", "length": 10, **OPTIONS, "seed": "1"} | change))


def test_surprisal_and_candidates_equal_those_of_single_steps(gru):
    text = "the romeo\nmoon"
    state, last, bits, tops = gru.zero_state(1), gru.vocab.start_id, [], []
    for i in gru.vocab.encode(text):
        logits, state = gru.step(np.array([[last]]), state)
        p = probabilities(logits[0, 0])
        bits.append(-math.log2(p[i]))
        tops += sorted(p, reverse=True)[:5]
        last = int(i)
    characters = surprisal(gru, text)
    assert "".join(character.char for character in characters) == text
    assert [character.bits for character in characters] == pytest.approx(bits, rel=1e-4)
    assert [p for character in characters for _, p in character.candidates] == pytest.approx(tops, rel=1e-4)
    assert surprisal(gru, "") == []


def test_surprisal_of_a_character_is_the_sum_of_its_bytes(byte_engine):
    characters = surprisal(byte_engine, "aé世")
    logits, _ = byte_engine.step(np.array([[10, *"aé世".encode()[:-1]]]), byte_engine.zero_state(1))
    p = probabilities(logits[0])[np.arange(6), list("aé世".encode())]
    assert [character.char for character in characters] == ["a", "é", "世"]
    assert [character.bits for character in characters] == pytest.approx(
        [-np.log2(p[:1]).sum(), -np.log2(p[1:3]).sum(), -np.log2(p[3:]).sum()], rel=1e-4
    )


def test_the_distribution_sums_to_1_before_and_after(gru):
    result = next_character(gru, "rom", 0.7, 5, 0.9)
    rows = [*result.bars, result.others]
    assert len(result.bars) == NUM_BARS
    assert sum(bar.before for bar in rows) == pytest.approx(1)
    assert sum(bar.after for bar in rows) == pytest.approx(1)
    assert result.kept == sum(bar.after > 0 for bar in result.bars) <= 5
    assert result.entropy[1] < result.entropy[0]
    greedy = next_character(gru, "", 0, 0, 1)
    assert (greedy.kept, greedy.entropy[1], greedy.bars[0].after) == (1, 0, 1)


# views


def test_markup_in_a_text_is_escaped(byte_engine):
    nasty = "<i>&\"'"
    characters = [Character(char, 1.0, [("<", 0.5)]) for char in nasty]
    for html in (
        views.surprisal(characters, byte_engine.vocab),
        views.paper(nasty, nasty),
        views.problem(nasty),
        views._row(Bar(nasty, 0.5, 0.5), 1.0),
    ):
        assert "<i>&" not in html
        assert "&lt;" in html


@pytest.mark.parametrize(("p", "shown"), [(0, "–"), (1e-9, "<0.1%"), (0.0006, "0.1%"), (0.5, "50.0%"), (1, "100.0%")])
def test_only_0_is_shown_as_0(p, shown):
    assert views.percent(p) == shown


# models


def test_the_first_model_and_those_in_the_folder_are_listed(tmp_path, model):
    (tmp_path / "run").mkdir()
    write_model(tmp_path / "run" / "model.onnx")
    models = Models(model, tmp_path)
    assert models.names() == [model.name, "run/model.onnx"]
    write_model(tmp_path / model.name)
    assert models.names() == [str(model), model.name, "run/model.onnx"]
    assert Models(tmp_path / model.name, tmp_path).names() == [model.name, "run/model.onnx"]


def test_without_a_folder_checkpoints_is_listed(tmp_path, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Models(model).names() == [model.name]
    Path("checkpoints").mkdir()
    write_model(Path("checkpoints/other.onnx"))
    assert Models(model).names() == [model.name, "other.onnx"]
    with pytest.raises(ConfigError, match="is not a folder"):
        Models(model, tmp_path / "absent")


def test_a_model_is_loaded_once_until_its_file_changes(tmp_path):
    path = write_model(tmp_path / "m.onnx")
    models = Models(path, tmp_path)
    first = models.engine("m.onnx")
    assert models.engine("m.onnx") is first
    write_model(path, hidden_dim=8)
    os.utime(path, ns=(1, 1))
    assert models.engine("m.onnx").config["model"]["hidden_dim"] == 8


def test_only_listed_models_are_opened(tmp_path, model):
    models = Models(write_model(tmp_path / "m.onnx"), tmp_path)
    for name in ("../secret.onnx", str(model), "gone.onnx"):
        with pytest.raises(ModelFileError, match="there is no model"):
            models.engine(name)


def test_a_symbolic_link_keeps_its_name_and_opens(tmp_path, model):
    for name in ("best.onnx", "other.onnx"):
        (tmp_path / name).symlink_to(model)
    models = Models(tmp_path / "best.onnx", tmp_path)
    assert models.names() == ["best.onnx", "other.onnx"]
    assert all(models.engine(name).vocab for name in models.names())


@pytest.mark.parametrize(
    ("program", "limit", "message"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", 60, "SIGSEGV"),
        ("x = bytearray(1 << 40)", 60, "exit code 1"),
        ("while True: pass", 1, "1 s"),
    ],
)
def test_a_file_that_ends_its_trial_process_is_refused(tmp_path, monkeypatch, program, limit, message):
    """A program in place of onnxruntime crashes, takes memory without end, or does not end."""
    path = write_model(tmp_path / "m.onnx")
    (tmp_path / "onnxruntime.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(sandbox, "_WALL_S", limit)
    with pytest.raises(ModelFileError, match=message):
        Models(path, tmp_path).engine("m.onnx")


# the page


def test_without_gradio_the_remedy_is_named(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ConfigError, match=r"pip install 'charrnn\[ui\]'"):
        build_page(Models(model))


@pytest.fixture(scope="module")
def page(model):
    pytest.importorskip("gradio", reason="the extra ui is not installed")
    return build_page(Models(model))


def test_the_page_sends_nothing_its_queue_is_bounded_and_empty_numbers_are_nan(page):
    assert not page.analytics_enabled
    assert page._queue.max_size == MAX_QUEUE
    labels = {block.label for block in page.blocks.values() if getattr(block, "label", None)}
    assert {"Prompt", "Length", "Temperature", "Top-k", "Top-p", "Seed", "Model"} <= labels
    sliders = [block for block in page.blocks.values() if block.get_block_name() == "slider"]
    assert len(sliders) == 7
    for slider in sliders:
        assert [slider.preprocess(3), slider.preprocess(10**9)] == [3, 10**9]
        assert math.isnan(slider.preprocess(None))
        assert math.isnan(slider.preprocess("three"))


@pytest.mark.parametrize("host", ["nowhere.invalid", "203.0.113.7", "..", "", "127.0.0.1"])
def test_an_address_that_cannot_be_bound_is_one_line(host, monkeypatch):
    resolve = socket.getaddrinfo

    def resolve_here(name, *args, **kwargs):  # without a network's name servers
        if name == "nowhere.invalid":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return resolve(name, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", resolve_here)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"^cannot serve on {host}:{port}: .*; choose another --port or --host$"):
            listen(host, port)


@pytest.mark.skipif(not socket.has_ipv6, reason="this system has no IPv6")
def test_the_page_is_served_on_ipv6(model):
    pytest.importorskip("gradio", reason="the extra ui is not installed")
    from page_server import page_server

    with page_server(Models(model), "::1") as served, urllib.request.urlopen(served.url, timeout=60) as response:
        assert served.url.startswith("http://[::1]:")
        assert b"charrnn" in response.read()


# the guard


@pytest.fixture
def guard_module():
    pytest.importorskip("gradio", reason="the extra ui is not installed")
    from infer.ui import guard

    return guard


@pytest.mark.parametrize(
    ("bound_to", "own", "foreign"),
    [
        ("127.0.0.1", ["127.0.0.1:7860", "localhost:7860", "[::1]:7860"], ["evil.example", "203.0.113.7", ""]),
        ("::1", ["[::1]:7860", "localhost"], ["evil.example", "[2001:db8::1]", "x@[::1]", "[::1"]),
        ("0.0.0.0", ["203.0.113.7:7860", "localhost", socket.gethostname()], ["203.0.113.7.evil.example"]),
        ("models.example", ["models.example:80", "MODELS.example"], ["evil.example", "models.example.evil"]),
    ],
)
def test_the_page_answers_to_its_own_host_names_alone(guard_module, bound_to, own, foreign):
    guard = guard_module.Guard(None, bound_to, {}, lambda client: 0)
    assert [host for host in own if not guard._is_own(host)] == []
    assert [host for host in foreign if guard._is_own(host)] == []


def test_a_body_that_does_not_arrive_times_out(guard_module, monkeypatch):
    monkeypatch.setattr(guard_module, "BODY_TIMEOUT_S", 0.01)
    sent = []

    async def receive():
        await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/gradio_api/queue/join", "headers": [(b"host", b"localhost")]}
    guard = guard_module.Guard(lambda *_: pytest.fail("the request came through"), "127.0.0.1", {}, lambda client: 0)
    asyncio.run(guard(scope, receive, send))
    assert sent[0]["status"] == 408
