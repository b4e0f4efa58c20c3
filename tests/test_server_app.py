"""The HTTP side of infer serve without its workers: who is let in, what a request may be, the shape of errors."""

import logging

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from charrnn.errors import ConfigError, ModelFileError
from infer.addresses import is_loopback
from infer.model_file.loader import default_model
from infer.server import app as server_app
from infer.server.app import build_app
from infer.server.guard import Service
from infer.server.logs import configure
from infer.server.main import named_models
from infer.server.metrics import Metrics
from infer.server.pool import Pool

HERE = "http://127.0.0.1:8000"


@pytest.fixture
def connect():
    def connect(**fields):
        metrics = Metrics()
        pools = {name: Pool(name, default_model(), metrics, 1, 1, 4, 4) for name in ("a", "b")}
        service = Service(pools, metrics, max_tokens_limit=100, timeout=5, **fields)
        return TestClient(build_app(service), base_url=HERE, raise_server_exceptions=False)

    return connect


def error(response):
    """The error of OpenAI's shape."""
    (body,) = response.json().values()
    assert body.keys() == {"message", "type", "param", "code"}
    return body


def test_while_models_load_or_requests_drain_completions_are_503(connect):
    client = connect()
    assert (client.get("/health").status_code, client.get("/health").json()) == (503, {"status": "loading"})
    refused = client.post("/v1/completions", json={"prompt": "a"})
    assert (refused.status_code, refused.headers["retry-after"], error(refused)["type"]) == (503, "1", "server_error")
    refused = connect(draining=True).post("/v1/completions", json={"prompt": "a"})
    assert (refused.status_code, error(refused)["code"]) == (503, "shutting_down")


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (b"", 400, None), (b"{", 400, None), (b"[1]", 400, None), (b'"a"', 400, None), (b"\xff{}", 400, None),
        (b"[" * 100_000, 400, None), (b'{"max_tokens": ' + b"9" * 5000 + b"}", 400, None),
        (b'{"temperature": NaN}', 400, "temperature"), (b'{"temperature": 1e999}', 400, "temperature"),
        (b'{"prompt": 5}', 400, "prompt"), (b'{"prompt": []}', 400, "prompt"), (b'{"prompt": ["a", 5]}', 400, "prompt"),
        (b'{"prompt": "\\ud800"}', 400, "prompt"), (b'{"n": true}', 400, "n"), (b'{"n": 1.0}', 400, "n"),
        (b'{"max_tokens": -1}', 400, "max_tokens"), (b'{"max_tokens": 101}', 400, "max_tokens"),
        (b'{"stop": ""}', 400, "stop"), (b'{"stop": [1]}', 400, "stop"), (b'{"stream": 1}', 400, "stream"),
        (b'{"stream_options": {}}', 400, "stream_options"), (b'{"unknown": "drop"}', 400, "unknown"),
        (b'{"stream": true, "stream_options": {"x": 1}}', 400, "stream_options"), (b'{"seed": -1}', 400, "seed"),
        (b'{"stream": true, "best_of": 2}', 400, "best_of"), (b'{"top_k": -1}', 400, "top_k"),
        (b'{"min_p": 1.5}', 400, "min_p"), (b'{"repetition_penalty": 0.5}', 400, "repetition_penalty"),
        (b'{"prompts": "a"}', 400, "prompts"), (b'{"temprature": 1}', 400, "temprature"),
        (b'{"temperature": ' + b"9" * 400 + b"}", 400, "temperature"), (b'{"\\ud800": 1}', 400, r"\ud800"),
        (b'{"model": "c"}', 404, "model"), (b'{"model": 5}', 400, "model"),
        (b'{"prompt": "' + b"a" * (3 << 20) + b'"}', 413, None),
    ],
)  # fmt: skip
def test_what_is_no_request_is_refused_by_name(connect, body, status, param):
    refused = connect().post("/v1/completions", content=body)
    assert (refused.status_code, error(refused)["param"]) == (status, param)
    assert len(refused.content) < 1000


def test_a_body_that_does_not_arrive_is_given_up(connect, monkeypatch):
    import asyncio

    monkeypatch.setattr(server_app, "BODY_TIMEOUT_S", 0.05)
    sent = []

    async def run():
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}

        async def send(message):
            sent.append(message)

        await connect().app(scope, asyncio.Event().wait, send)

    asyncio.run(run())
    assert sent[0]["status"] == 400
    assert b"did not arrive" in sent[1]["body"]


def test_other_paths_and_methods_have_errors_of_the_same_shape(connect):
    client = connect()
    assert [client.get("/v1/chat/completions").status_code, client.get("/v1/completions").status_code] == [404, 405]
    assert "/nothing" in error(client.get("/nothing"))["message"]
    assert client.get("/v1/completions").headers["allow"] == "POST"


def test_a_defect_is_a_500_without_its_traceback(connect, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("charrnn.serve"), "propagate", True)
    caplog.set_level(logging.INFO, "charrnn.serve")
    monkeypatch.setattr(server_app, "parse", lambda *_: 1 / 0)
    failed = connect().post("/v1/completions", json={})
    assert failed.status_code == 500
    assert "division" not in failed.text
    assert failed.headers["x-request-id"] in failed.text
    (line,) = [record for record in caplog.records if hasattr(record, "facts")]
    assert (line.facts["status"], line.facts["id"]) == (500, failed.headers["x-request-id"])


def test_an_api_key_is_asked_for(connect):
    client = connect(api_key="s3cret")
    for headers in ({}, {"Authorization": "Bearer s3cre"}, {"Authorization": "Bearer \xe9"}):
        refused = client.get("/v1/models", headers=[(k, v.encode("latin-1")) for k, v in headers.items()])
        assert (refused.status_code, error(refused)["code"]) == (401, "invalid_api_key")
        assert refused.headers["www-authenticate"] == "Bearer"
    for host in ("x/health?", "x/metrics#", "127.0.0.1/?"):  # which make another URL of the same path
        assert client.get("/v1/models", headers={"Host": host}).status_code == 401
    assert client.get("/v1/models", headers={"Authorization": "Bearer s3cret"}).status_code == 200
    assert [client.get(path).status_code for path in ("/", "/metrics", "/health")] == [200, 200, 503]


@pytest.mark.parametrize(
    ("fields", "host", "origin", "status"),
    [
        ({}, "127.0.0.1:8000", "http://127.0.0.1:8000", 200),
        ({}, "localhost:8000", "http://localhost:8000", 200),
        ({}, "[::1]:8000", None, 200),
        ({}, "127.0.0.1:8000", "https://example.org", 403),
        ({}, "127.0.0.1:8000", "null", 403),
        ({}, "127.0.0.1:8000", "http://[", 403),
        # A name of another's that leads here, so that its pages pass for ours.
        ({}, "evil.example:8000", "http://evil.example:8000", 421),
        ({}, "evil.example:8000", None, 421),
        ({}, "127.0.0.1@evil.example", None, 421),
        ({}, "[", None, 421),
        ({"loopback": False}, "models.example", "http://models.example", 200),
        ({"loopback": False}, "models.example", None, 200),
        # Behind a proxy that passes the Host header on.
        ({"api_key": "k"}, "models.example", None, 200),
        ({"origins": ("https://models.example",)}, "models.example", None, 200),
        ({"origins": ("https://example.org",)}, "127.0.0.1:8000", "https://example.org", 200),
        ({"origins": ("https://example.org",)}, "models.example", "https://example.org", 200),
        ({"origins": ("https://example.org",)}, "127.0.0.1:8000", "https://example.com", 403),
        ({"origins": ("*",)}, "127.0.0.1:8000", "https://example.com", 200),
    ],
)
def test_pages_of_other_sites_are_kept_out(connect, fields, host, origin, status):
    headers = {"Host": host, "Authorization": "Bearer k"} | ({} if origin is None else {"Origin": origin})
    got = connect(**fields).get("/v1/models", headers=headers)
    assert got.status_code == status


def test_cors_preflight_is_answered_without_a_key(connect):
    client = connect(api_key="k", origins=("https://example.org",))
    headers = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST",
               "Access-Control-Request-Headers": "authorization, content-type"}  # fmt: skip
    answer = client.options("/v1/completions", headers=headers)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://example.org"
    assert client.options("/v1/completions", headers=headers | {"Origin": "https://e.com"}).status_code == 400


def test_the_page_shows_a_curl_line(connect):
    got = connect().get("/").text
    assert f"curl {HERE}/v1/completions" in got
    assert "<code>a</code>" in got
    assert ["Bearer KEY" in text for text in (got, connect(api_key="x").get("/").text)] == [False, True]


def test_metrics_are_read_by_prometheus_own_parser(connect):
    client = connect()
    client.get("/nothing/at/all")
    families = {f.name: f for f in text_string_to_metric_families(client.get("/metrics").text)}
    counted = [(s.labels, s.value) for s in families["charrnn_requests"].samples]
    assert ({"path": "other", "status": "404"}, 1.0) in counted
    gauges = dict.fromkeys(("streams_running", "streams_waiting", "workers_ready"), "gauge")
    counters = dict.fromkeys(("generated_chars", "prompt_chars", "prefix_cache_hits", "requests_rejected"), "counter")
    timings = ("time_to_first_char_seconds", "time_per_char_seconds", "batch_rows")
    wanted = gauges | counters | dict.fromkeys(timings, "histogram")
    assert {name: families[f"charrnn_{name}"].type for name in wanted} == wanted


def test_models_are_named_after_their_files(tmp_path):
    for name in ("run/model.onnx", "small.onnx", "other/small.onnx"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    run, small, other = (str(tmp_path / n) for n in ("run/model.onnx", "small.onnx", "other/small.onnx"))
    assert list(named_models([run, small, f"x={other}"])) == ["run", "small", "x"]
    assert list(named_models([])) == ["shakespeare"]
    with pytest.raises(ConfigError, match="two models are called 'small'"):
        named_models([small, other])
    with pytest.raises(ModelFileError, match="does not exist"):
        named_models([f"x={tmp_path / 'none.onnx'}"])


def test_loopback_is_known_by_address_or_name():
    hosts = {"127.0.0.1": True, "localhost": True, "::1": True, "[::1]": True, "0.0.0.0": False, "example.org": False}
    assert {host: is_loopback(host) for host in hosts} == hosts


@pytest.mark.parametrize("as_json", [False, True])
def test_log_lines_carry_what_is_known_of_a_request(connect, capfd, as_json):
    configure(as_json)
    connect().get("/nothing%0Ainfo forged")
    logging.getLogger("charrnn.serve").handlers.clear()
    (line,) = capfd.readouterr().err.splitlines()
    assert ('"status": 404' if as_json else "status=404") in line
