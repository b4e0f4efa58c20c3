"""What the page computes, offers and refuses, without a browser; test_page.py looks at it in one."""

import asyncio
import itertools
import math
import os
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_models import write_model

from charrnn.errors import ConfigError, ModelFileError, SamplingError, VocabError
from charrnn.sampling import SamplingOptions, probabilities
from charrnn.vocab import Vocab
from infer import child
from infer.engine import Engine
from infer.ui import guard as page_guard
from infer.ui import views as page_html
from infer.ui.app import MOST_WAITING, build_page, serve
from infer.ui.compute import MOST_CHARS, MOST_PROMPT_CHARS, SHOWN, Odds, Read, next_character, read, stream
from infer.ui.guard import MOST_OPEN_PER_CLIENT, Guard
from infer.ui.models import Models

OPTIONS = {"temperature": 0.8, "top_k": 0, "top_p": 1.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def model(folder):
    return write_model(folder / "m.onnx")


@pytest.fixture(scope="module")
def engine(model):
    return Engine(model)


@pytest.fixture(scope="module")
def byte_engine(folder):
    return Engine(write_model(folder / "bytes.onnx", Vocab.of_bytes()))


def test_the_stream_grows_to_the_text_that_the_engine_writes(engine):
    seconds = itertools.count()
    states = list(stream(engine, "the ", 100, **OPTIONS, seed="3", clock=lambda: float(next(seconds))))
    assert len(states) > 2
    assert all(later.text.startswith(earlier.text) for earlier, later in itertools.pairwise(states))
    assert states[-1].text == "".join(engine.generate("the ", length=100, options=SamplingOptions(0.8), seed=3))
    assert states[-1].seed == 3


def test_speed_counts_the_model_and_not_what_the_page_does_with_the_text(engine):
    now = [0.0]

    def clock() -> float:
        now[0] += 1.0
        return now[0]

    states = []
    for state in stream(engine, "the ", 100, **OPTIONS, seed="3", clock=clock):
        states.append(state)
        now[0] += 1000.0
    pieces = len(list(engine.generate("the ", length=100, options=SamplingOptions(0.8), seed=3)))
    assert states[-1].seconds <= 2 * pieces
    assert states[-1].chars_per_s == pytest.approx(100 / states[-1].seconds)


def test_an_empty_seed_is_a_new_one_each_time(engine):
    seeds = {list(stream(engine, "", 1, **OPTIONS, seed=" "))[-1].seed for _ in range(3)}
    assert len(seeds) == 3


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"prompt": "世"}, VocabError, r"does not know '世' \(U\+4E16\)"),
        ({"prompt": "a" * (MOST_PROMPT_CHARS + 1)}, VocabError, "2,001 characters; this page reads 2,000"),
        ({"prompt": "\ud800"}, VocabError, "not valid Unicode"),
        ({"length": 0}, SamplingError, "1 to 5000 characters, not 0"),
        ({"length": MOST_CHARS + 1}, SamplingError, "not 5001"),
        ({"length": 1.5}, SamplingError, "length must be a whole number"),
        ({"top_k": 0.5}, SamplingError, "top-k must be a whole number"),
        ({"length": math.nan}, SamplingError, "the length has no number; type one"),
        ({"temperature": math.nan}, SamplingError, "the temperature has no number"),
        ({"top_k": math.inf}, SamplingError, "the top-k has no number"),
        ({"top_p": math.nan}, SamplingError, "the top-p has no number"),
        ({"seed": "1" * 5000}, SamplingError, "5000 digits; this page takes 20 at most"),
        ({"seed": "x" * 5000}, SamplingError, "not 'x{40}'; leave"),
        ({"top_p": 2}, SamplingError, "top_p"),
        ({"seed": "-1"}, SamplingError, "seed must be a whole number"),
        ({"seed": "one"}, SamplingError, "seed must be a whole number"),
    ],
)
def test_what_cannot_be_written_is_refused_with_its_reason(engine, change, error, said):
    values = {"prompt": "a", "length": 10, **OPTIONS, "seed": "1"} | change
    with pytest.raises(error, match=said):
        next(stream(engine, **values))


def test_surprise_is_that_of_the_text_read_character_by_character(engine):
    text = "the romeo\nmoon"
    state, last, bits = engine.zero_state(1), engine.vocab.start_id, []
    for i in engine.vocab.encode(text):
        logits, state = engine.step(np.array([[last]]), state)
        bits.append(-math.log2(probabilities(logits[0, 0])[i]))
        last = int(i)
    characters = read(engine, text)
    assert "".join(character.char for character in characters) == text
    assert [character.bits for character in characters] == pytest.approx(bits, rel=1e-4)


def test_the_bytes_of_a_character_share_its_place_and_their_bits_add_up(byte_engine):
    characters = read(byte_engine, "aé世")
    logits, _ = byte_engine.step(np.array([[10, *"aé世".encode()[:-1]]]), byte_engine.zero_state(1))
    p = probabilities(logits[0])[np.arange(6), list("aé世".encode())]
    assert [character.char for character in characters] == ["a", "é", "世"]
    assert [character.bits for character in characters] == pytest.approx(
        [-np.log2(p[:1]).sum(), -np.log2(p[1:3]).sum(), -np.log2(p[3:]).sum()], rel=1e-4
    )


def test_candidates_come_likeliest_first_with_their_probabilities(engine):
    (character,) = read(engine, "a")
    shares = [p for _, p in character.candidates]
    logits, _ = engine.prefill(np.array([engine.vocab.start_id]))
    assert shares == pytest.approx(sorted(probabilities(logits[0]), reverse=True)[:5], rel=1e-4)


def test_an_empty_text_has_no_characters(engine):
    assert read(engine, "") == []


def test_the_distribution_is_whole_before_and_after_the_cut(engine):
    result = next_character(engine, "rom", 0.7, 5, 0.9)
    rows = [*result.shown, result.others]
    assert len(result.shown) == SHOWN
    assert sum(odds.before for odds in rows) == pytest.approx(1)
    assert sum(odds.after for odds in rows) == pytest.approx(1)
    assert result.kept == sum(odds.after > 0 for odds in result.shown) <= 5
    assert result.entropy[1] < result.entropy[0]


def test_temperature_zero_leaves_one_character_and_no_entropy(engine):
    result = next_character(engine, "", 0, 0, 1)
    assert (result.kept, result.entropy[1], result.shown[0].after) == (1, 0, 1)


def test_markup_in_a_text_stays_text(byte_engine):
    nasty = "<i>&\"'"
    characters = [Read(char, 1.0, [("<", 0.5)]) for char in nasty]
    for html in (
        page_html.surprises(characters, byte_engine.vocab),
        page_html.paper(nasty, nasty),
        page_html.problem(nasty),
        page_html._row(Odds(nasty, 0.5, 0.5), 1.0),
    ):
        assert "<i>&" not in html
        assert "&lt;" in html


@pytest.mark.parametrize(("p", "shown"), [(0, "–"), (1e-9, "<0.1%"), (0.0006, "0.1%"), (0.5, "50.0%"), (1, "100.0%")])
def test_a_share_that_is_not_zero_is_not_shown_as_zero(p, shown):
    assert page_html.percent(p) == shown


def test_the_chooser_lists_the_first_model_and_those_below_the_folder(tmp_path, model):
    (tmp_path / "run").mkdir()
    write_model(tmp_path / "run" / "model.onnx")
    models = Models(model, tmp_path)
    assert models.names() == ["m.onnx", "run/model.onnx"]
    write_model(tmp_path / "m.onnx")
    assert models.names() == [str(model), "m.onnx", "run/model.onnx"]


def test_a_model_within_the_folder_is_listed_once(tmp_path):
    models = Models(write_model(tmp_path / "m.onnx"), tmp_path)
    assert models.names() == ["m.onnx"]


def test_without_a_folder_the_checkpoints_below_the_current_one_are_listed(tmp_path, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Models(model).names() == ["m.onnx"]
    Path("checkpoints").mkdir()
    write_model(Path("checkpoints/other.onnx"))
    assert Models(model).names() == ["m.onnx", "other.onnx"]


def test_a_model_is_loaded_once_and_anew_when_its_file_changes(tmp_path):
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


def test_a_folder_that_is_none_is_refused(tmp_path, model):
    with pytest.raises(ConfigError, match="is not a folder"):
        Models(model, tmp_path / "absent")


def test_without_gradio_the_remedy_is_named(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ConfigError, match=r"pip install 'charrnn\[ui\]'"):
        build_page(Models(model))


def test_the_page_sends_nothing_and_its_queue_has_an_end(model):
    pytest.importorskip("gradio", reason="the extra ui is not installed")
    page = build_page(Models(model))
    assert not page.analytics_enabled
    assert page._queue.max_size == MOST_WAITING
    labels = {block.label for block in page.blocks.values() if getattr(block, "label", None)}
    assert {"Prompt", "Length", "Temperature", "Top-k", "Top-p", "Seed", "Model"} <= labels


def test_what_a_slider_sends_is_a_number_or_none_and_never_stops_the_request(model):
    pytest.importorskip("gradio", reason="the extra ui is not installed")
    sliders = [block for block in build_page(Models(model)).blocks.values() if block.get_block_name() == "slider"]
    assert len(sliders) == 7
    for slider in sliders:
        assert slider.preprocess(3) == 3
        assert slider.preprocess(10**9) == 10**9
        assert math.isnan(slider.preprocess(None))
        assert math.isnan(slider.preprocess("three"))


@pytest.mark.parametrize("host", ["nowhere.invalid", "203.0.113.7", "..", ""])
def test_an_address_that_cannot_be_served_on_is_one_line(model, host, monkeypatch):
    pytest.importorskip("gradio", reason="the extra ui is not installed")
    resolve = socket.getaddrinfo

    def resolve_here(name, *args, **kwargs):  # without a network's name servers
        if name == "nowhere.invalid":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return resolve(name, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", resolve_here)
    with pytest.raises(ConfigError, match=r"^cannot serve on .*; choose another --[^\n]*host$"):
        serve(model, None, host, 7871)


def test_a_port_that_is_taken_is_named(model):
    pytest.importorskip("gradio", reason="the extra ui is not installed")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot serve on 127.0.0.1:{port}: .*choose another --port"):
            serve(model, None, "127.0.0.1", port)


def test_a_link_is_listed_by_its_own_name_and_opens(tmp_path, model):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "best.onnx").symlink_to(model)
    models = Models(tmp_path / "models" / "best.onnx", tmp_path / "models")
    assert models.names() == ["best.onnx"]
    assert models.engine("best.onnx").vocab
    (tmp_path / "models" / "other.onnx").symlink_to(model)
    assert models.names() == ["best.onnx", "other.onnx"]
    assert models.engine("other.onnx").vocab


def test_a_file_that_ends_the_process_that_tries_it_is_refused(tmp_path, monkeypatch):
    """What takes memory without end, ends itself, or does not end: here a program in place of onnxruntime."""
    path = write_model(tmp_path / "m.onnx")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for program, limit, said in (
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", 60, "SIGSEGV"),
        ("x = bytearray(1 << 40)", 60, "exit code 1"),
        ("while True: pass", 1, "was not done in 1 s"),
    ):
        (tmp_path / "onnxruntime.py").write_text(program)
        monkeypatch.setattr(child, "_WALL_S", limit)
        with pytest.raises(ModelFileError, match=said):
            Models(path, tmp_path).engine("m.onnx")


@pytest.mark.parametrize(
    ("bound_to", "own", "foreign"),
    [
        (
            "127.0.0.1",
            ["127.0.0.1:7860", "localhost:7860", "[::1]:7860"],
            ["evil.example", "203.0.113.7", ""],
        ),
        ("::1", ["[::1]:7860", "localhost"], ["evil.example", "[2001:db8::1]", "x@[::1]", "[::1"]),
        (
            "0.0.0.0",
            ["203.0.113.7:7860", "localhost", socket.gethostname()],
            ["203.0.113.7.evil.example"],
        ),
        ("models.example", ["models.example:80", "MODELS.example"], ["evil.example", "models.example.evil"]),
    ],
)
def test_the_page_answers_to_its_own_names_alone(bound_to, own, foreign):
    guard = Guard(None, bound_to, {})
    assert [host for host in own if not guard._is_own(host)] == []
    assert [host for host in foreign if guard._is_own(host)] == []


def asked(guard, sent, body=b"", path="/"):
    """One request to a guard; the statuses of the answers go into `sent`."""
    scope = {"type": "http", "method": "GET" if path == "/" else "POST", "path": path, "client": ("192.0.2.1", 1)}
    scope["headers"] = [(b"host", b"localhost")]

    async def receive():
        if body is None:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": body}

    async def send(message):
        sent.append(message.get("status"))

    return guard(scope, receive, send)


def test_a_client_has_so_many_requests_open_at_once():
    async def all_at_once() -> list[int]:
        sent, done = [], asyncio.Event()

        async def app(scope, receive, send):
            await done.wait()

        guard = Guard(app, "127.0.0.1", {})
        waiting = [asyncio.create_task(asked(guard, sent)) for _ in range(MOST_OPEN_PER_CLIENT + 2)]
        await asyncio.sleep(0)
        done.set()
        await asyncio.gather(*waiting)
        await asked(guard, sent)
        assert not guard._open
        return [status for status in sent if status]

    assert asyncio.run(all_at_once()) == [429, 429]


def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(page_guard, "BODY_TIMEOUT_S", 0.01)
    sent = []
    guard = Guard(lambda *_: pytest.fail("the request came through"), "127.0.0.1", {})
    asyncio.run(asked(guard, sent, None, "/gradio_api/queue/join"))
    assert sent[0] == 408
