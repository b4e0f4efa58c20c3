"""Any arguments of an `infer` command, any request to the page: the property of tests/doors.py holds."""

import contextlib
import http.client
import json
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from doors import NASTY, bounded, check_command, generator
from tiny_models import write_model

import infer.addresses
import infer.bench
import infer.ui.app
from charrnn.errors import ConfigError
from charrnn.vocab import Vocab
from infer.cli import run
from infer.commands import app

# What a value of any option may be: numbers at and beyond the ends of every type, no numbers, and hostile text.
VALUES = [
    *NASTY,
    *("0.5", "1e-320", "1e400", "٣", str(2**31), str(2**63 - 1), str(2**63), str(-(2**63) - 1), str(10**20), "9" * 400),
    *("1e9", "the", "€", "\x1b[2J", "a\nb\n", "\u202e", "caf\udce9", "𝟙", "\ufeff", "%s%n", "; ls", "x" * 100_000),
    *("..", "/", "MODEL", "TEXT", "FOLDER", "EMPTY", "NOISE"),
    *("error", "skip", "replace", "all", "val", "::1", "0.0.0.0", "localhost", "7860", "65536"),
]
OPTIONS = {
    name: [option for option in command.params if option.param_type_name == "option" and not option.is_flag]
    for name, command in typer.main.get_command(app).commands.items()
}
OPTIONS = {name: [opt for option in options for opt in option.opts] for name, options in OPTIONS.items()}
FLAGS = ["--greedy", "--no-stream", "--no-echo", "--past-end", "--stats", "--json", "--version", "-h", "--nonsense"]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("doors")
    places = {name: folder / name for name in ("MODEL", "TEXT", "FOLDER", "EMPTY", "NOISE")}
    write_model(places["MODEL"], Vocab.of_chars("\n abehnort"), hidden_dim=8, num_layers=1)
    places["TEXT"].write_text("the boat on the hearth\n" * 9)
    places["FOLDER"].mkdir()
    places["EMPTY"].touch()
    places["NOISE"].write_bytes(bytes(range(256)) * 9)
    return {name: str(path) for name, path in places.items()}


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Measures are short, and no page stays up."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(infer.bench, "_TURN_S", 0.001)
    monkeypatch.setattr(infer.bench, "start_up", lambda path: dict.fromkeys(("imports", "load", "first", "whole"), 0.1))
    monkeypatch.setattr(infer.ui.app, "build_page", unserved)
    monkeypatch.setattr(infer.addresses, "listen", unserved)


def unserved(*_):
    """Ends `infer ui` and `infer serve` where their arguments are good after all."""
    raise ConfigError("nothing is served in this test")


def arguments(rng, places) -> list[str]:
    """A command with some options, most of them with a hostile value."""
    command = str(rng.choice(list(OPTIONS)))
    given = [command]
    if command == "ui":  # else it would be up
        given += ["--models", str(rng.choice(["/dev/null", "nowhere", places["TEXT"]]))]
    if command == "generate":
        given += ["-n", str(rng.choice(["0", "1", "9", "-1", "x", ""]))]
    if command == "bench":
        given += ["--rounds", "2"]
    if rng.random() < 0.7 and command in ("generate", "bench"):
        given += ["-m", places["MODEL"]]
    if command in ("info", "score") and rng.random() < 0.9:
        given += [places["MODEL"], places["TEXT"]][: 1 if command == "info" else 2]
    for _ in range(rng.integers(0, 4)):
        value = VALUES[rng.integers(len(VALUES))]
        value = places.get(value, value)
        match rng.integers(8):
            case 0:
                given.append(str(rng.choice(FLAGS)))
            case 1:
                given.append(value)
            case _:
                given += [str(rng.choice(OPTIONS[command])), value]
    # Reading these does not end; a shell's user would press Ctrl-C.
    return ["/dev/null" if value == "/dev/zero" and command != "info" else value for value in given]


@pytest.mark.parametrize(("count", "seed"), [(60, 17), pytest.param(1500, 18, marks=pytest.mark.slow)])
def test_any_arguments_end_with_0_or_with_2_and_one_line(places, quick, capfd, monkeypatch, count, seed):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=SimpleNamespace(read=lambda: b"the")))
    rng = generator(seed)
    for _ in range(count):
        given = arguments(rng, places)
        if "--rounds" in given[3:]:  # a number of rounds that is valid takes as long as it says
            given = given[: given.index("--rounds", 3)]
        capfd.readouterr()
        with bounded(given):
            code = run(given)
        sys.stdout.flush()
        check_command(given, code, *capfd.readouterr())


# ---- the page

ROUTES = [
    *("/", "/theme.css", "/manifest.json", "/config", "/login", "/login_check", "/logout", "/monitoring", "/docs"),
    *("/gradio_api/" + name for name in ("upload", "queue/join", "queue/data", "run/predict", "call/write", "cancel")),
    *("/gradio_api/" + name for name in ("file=/etc/passwd", "proxy=http://192.0.2.1/", "info", "app_id", "reset")),
    *("/gradio_api/" + name for name in ("component_server", "process_recording", "vibe-code", "mcp", "token")),
    *(
        "/assets/../../etc/passwd",
        "/static/%2e%2e/%2e%2e/x",
        "/assets/index.js",
        "//",
        "/\x7f",
        "/é".encode().decode("latin-1"),
    ),
]
SCALARS = [None, True, 0, -1, 0.5, 10**400, "", "the", "€", "\ud800", "x" * 3000, "small.onnx", [], {}, [[1]]]
FILES = {"path": "http://192.0.2.1/x", "url": "http://192.0.2.1/x", "meta": {"_type": "gradio.FileData"}}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page, with a model that takes half a minute for the longest text beside a small one."""
    pytest.importorskip("gradio", reason="the extra ui is not installed")
    from page_server import page_server

    from infer.ui.models import Models

    folder = tmp_path_factory.mktemp("page")
    write_model(folder / "slow.onnx", hidden_dim=768, num_layers=3)
    with page_server(Models(write_model(folder / "small.onnx"), folder)) as served:
        yield served


def ask(page, method, path, body=b"", client="127.0.0.1", **headers) -> int:
    """The status of the answer; 0 when the connection is closed without one."""
    connection = http.client.HTTPConnection(page.netloc, timeout=20, source_address=(client, 0))
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"} | headers)
        answer = connection.getresponse()
        if "text/event-stream" not in answer.headers.get("content-type", ""):
            answer.read(1 << 20)
        return answer.status
    except (http.client.HTTPException, ConnectionError, ValueError):
        return 0
    finally:
        connection.close()


def call(page, data, **fields) -> bytes:
    number = next(number for number, function in page.blocks.fns.items() if function.name == "generate")
    return json.dumps({"data": data, "fn_index": number, "session_hash": "x"} | fields).encode()


GOOD = ["small.onnx", "a", 5, 0.8, 0, 1, "1"]


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status"),
    [
        ("GET", "/", b"", {}, 200),
        ("POST", "/gradio_api/upload", b"x" * 1000, {}, 404),
        ("GET", "/gradio_api/proxy=http://192.0.2.1/", b"", {}, 404),
        ("GET", "/gradio_api/file=/etc/passwd", b"", {}, 404),
        ("GET", "/", b"", {"Host": "evil.example"}, 421),
        ("GET", "/", b"", {"Host": "evil.example:7860@127.0.0.1"}, 421),
        ("GET", "/", b"", {"Host": "203.0.113.7"}, 421),
        ("GET", "/", b"", {"Origin": "http://evil.example"}, 403),
        ("GET", "/", b"", {"Origin": "http://["}, 403),
        ("POST", "/gradio_api/queue/join", GOOD, {}, 200),
        ("POST", "/gradio_api/queue/join", GOOD, {"Origin": "null"}, 403),
        ("POST", "/gradio_api/queue/join", GOOD, {"Content-Length": "150000000"}, 413),
        ("POST", "/gradio_api/queue/join", ["small.onnx", "x" * (2 << 20), 5, 0.8, 0, 1, "1"], {}, 413),
        ("POST", "/gradio_api/queue/join", ["small.onnx", FILES, 5, 0.8, 0, 1, "1"], {}, 400),
        ("POST", "/gradio_api/queue/join", ["small.onnx", "a", FILES, 0.8, 0, 1, "1"], {}, 400),
        ("POST", "/gradio_api/queue/join", GOOD[:3], {}, 400),
        ("POST", "/gradio_api/queue/join", b"{" * 100_000, {}, 400),
    ],
)
def test_only_what_the_page_itself_asks_for_is_answered(page, method, path, body, headers, status):
    body = call(page, body) if isinstance(body, list) else body
    answer = ask(page, method, path, body, **headers)
    # 0: the server closed the connection before all of a large body was sent.
    assert answer == status or (status == 413 and answer == 0)


def test_a_clients_share_of_the_queue_is_limited(page):
    from infer.ui.app import MAX_QUEUE
    from infer.ui.guard import MAX_WAITING_PER_CLIENT

    queued = []

    def join(client):
        body = call(page, ["slow.onnx", "a", 5000, 0.8, 0, 1, "1"], session_hash=f"s{len(queued)}")
        queued.append(body)
        return ask(page, "POST", "/gradio_api/queue/join", body, client)

    def join_until_refused(client):
        return next((status, n) for n in range(2 * MAX_QUEUE) if (status := join(client)) != 200)

    try:
        status, joined = join_until_refused("127.0.0.1")
        assert status == 429
        assert joined in (MAX_WAITING_PER_CLIENT, MAX_WAITING_PER_CLIENT + 1)  # the one that runs does not wait
        status, joined = join_until_refused("127.0.0.2")
        assert joined >= 1
        assert status in (429, 503)
    finally:
        for event in reversed(list(page.blocks._queue.event_ids_to_events.values())):  # the one that runs last
            fields = {"event_id": event._id, "session_hash": event.session_hash, "fn_index": event.fn._id}
            ask(page, "POST", "/gradio_api/cancel", json.dumps(fields).encode())


def closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(1000) == b""
    except ConnectionResetError:
        return True


def test_a_clients_open_connections_are_limited(page, monkeypatch):
    monkeypatch.setattr("infer.http_limits.MAX_CONNECTIONS_PER_CLIENT", 3)
    host, port = page.netloc.split(":")
    client, other = ("127.0.0.3", 0), ("127.0.0.4", 0)
    with contextlib.ExitStack() as stack:

        def connect(source):
            return stack.enter_context(socket.create_connection((host, int(port)), 20, source))

        kept = [connect(client) for _ in range(3)]
        assert closed(connect(client))
        for connection in (*kept, connect(other)):
            connection.sendall(b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b"404" in connection.recv(1000)


@pytest.mark.parametrize(("count", "seed"), [(100, 19), pytest.param(5000, 20, marks=pytest.mark.slow)])
def test_requests_of_any_kind_are_answered_or_refused(page, capfd, count, seed):
    rng = generator(seed)
    uploads = Path(page.blocks.GRADIO_CACHE)
    before = sum(1 for _ in uploads.rglob("*")) if uploads.is_dir() else 0
    with bounded("requests", seconds=60 + count, mib=400):
        for _ in range(count):
            method = str(rng.choice(["GET", "POST", "POST", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "X"]))
            path = ROUTES[rng.integers(len(ROUTES))]
            if rng.random() < 0.5:  # where most can go wrong
                method, path = "POST", str(rng.choice(["/gradio_api/queue/join", "/gradio_api/run/predict"]))
            data = [SCALARS[i] for i in rng.integers(len(SCALARS), size=rng.integers(9))]
            if rng.random() < 0.5:
                data = list(GOOD)
                data[rng.integers(len(data))] = SCALARS[rng.integers(len(SCALARS))]
            number = [None, -1, 0, 1, 2, 3, 99, 2**70, "x", []][rng.integers(10)]
            body = call(page, data, fn_index=number) if rng.random() < 0.7 else rng.bytes(rng.integers(2000))
            headers = {"Host": "evil.example"} if rng.random() < 0.1 else {}
            headers |= {"Origin": "http://evil.example"} if rng.random() < 0.1 else {}
            headers |= {"Content-Type": "text/plain"} if rng.random() < 0.2 else {}
            status = ask(page, method, path, body, **headers)
            assert status < 500 or status in (501, 503), (method, path, body[:300], headers)
    assert ask(page, "GET", "/") == 200
    after = sum(1 for _ in uploads.rglob("*")) if uploads.is_dir() else 0
    assert after == before
    assert "Traceback" not in capfd.readouterr().err
