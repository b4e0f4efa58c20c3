"""infer serve as processes: the documents' commands, a worker that is killed, the way it starts and ends."""

import asyncio
import os
import re
import shlex
import signal
import subprocess
from contextlib import aclosing
from pathlib import Path

import httpx
import pytest
from launches import ROOT, python
from tiny_models import write_model

from benchmarks.serving import serving, stream
from charrnn.vocab import Vocab
from infer import Engine

DOCUMENT = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
BASH = "".join(re.findall(r"^```bash\n(.*?)^```", DOCUMENT, re.M | re.S))
CURL = [line for line in BASH.splitlines() if line.startswith("curl")]


@pytest.fixture(scope="module")
def file(model_folder):
    return write_model(model_folder / "tiny.onnx", Vocab.of_bytes(), precision="int8")


@pytest.fixture(scope="module")
def served(file):
    arguments = ("--model", file, "--workers", 2, "--max-tokens-limit", 10**7, "--drain-timeout", 1.5)
    with serving(*arguments) as server:
        server.wait_for("charrnn_workers_ready", 2)
        yield server


@pytest.mark.parametrize("line", CURL)
def test_curl_lines_of_the_document_work(served, line):
    line = line.replace("http://127.0.0.1:8000", served.url)
    done = subprocess.run(
        [*shlex.split(line), "--silent", "--fail-with-body", "--max-time", "20"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout


def test_the_document_shows_what_there_is(served):
    assert len(CURL) == 7
    (example,) = re.findall(r"^```text\n(from openai .*?)^```", DOCUMENT, re.M | re.S)
    compile(example, "docs/serving.md", "exec")
    prose = re.sub(r"```.*?```|`python -m [^`]*`", "", DOCUMENT, flags=re.S)
    options = set(re.findall(r"--[a-z][a-z-]+", prose))
    shown = python("-m", "infer.cli", "serve", "--help")
    assert options <= set(re.findall(r"--[a-z][a-z-]+", shown.stdout)) | {"--help"}
    metrics = set(re.findall(r"charrnn_[a-z_]+", DOCUMENT))
    text = httpx.get(f"{served.url}/metrics").text
    assert {name for name in metrics if name not in text} == set()


def test_each_of_two_workers_has_its_share(served, file):
    engine = Engine(file)

    async def texts():
        async def text(seed):
            async with aclosing(stream(served.port, prompt="RO", seed=seed, max_tokens=400)) as pieces:
                return "".join([piece async for piece in pieces])

        return await asyncio.gather(*(text(seed) for seed in range(24)))

    assert asyncio.run(texts()) == engine.generate_batch("RO", 24, 400, seed=0)
    assert served.gauge("charrnn_batch_rows_count") > 1


def test_a_killed_worker_is_told_and_replaced(served):
    async def run():
        broken = [stream(served.port, prompt="a", max_tokens=10**7) for _ in range(8)]
        for pieces in broken:
            await anext(pieces)
        async with httpx.AsyncClient(base_url=served.url, timeout=20) as client:
            waiting = [client.post("/v1/completions", json={"max_tokens": 10**7}) for _ in range(4)]
            tasks = [asyncio.create_task(post) for post in waiting]
            await asyncio.to_thread(served.wait_for, "charrnn_streams_running", 12)
            for pid in served.worker_pids():
                os.kill(pid, signal.SIGKILL)
            assert {(await task).status_code for task in tasks} == {500}
        for pieces in broken:
            with pytest.raises(ConnectionError, match="worker of this request ended"):
                async for _ in pieces:
                    pass

    asyncio.run(run())
    served.wait_for("charrnn_workers_ready", 2)
    assert served.gauge("charrnn_worker_restarts_total") == 2
    assert httpx.post(f"{served.url}/v1/completions", json={"max_tokens": 3}).status_code == 200
    assert served.gauge("charrnn_streams_running") == 0


def test_a_client_that_leaves_cannot_end_the_server(served):
    # The command line lets SIGPIPE end it, as `infer ... | head` should.
    ignored = re.search(r"^SigIgn:\s+(\w+)", Path(f"/proc/{served.process.pid}/status").read_text(), re.M)
    assert int(ignored[1], 16) >> (signal.SIGPIPE - 1) & 1


def test_sigterm_lets_short_requests_finish_and_cuts_long_ones(served):
    async def run():
        short, long = (stream(served.port, max_tokens=n, prompt="a", top_k=1) for n in (300, 10**7))
        await anext(long)
        first = await anext(short)
        served.process.send_signal(signal.SIGTERM)
        assert len((first + "".join([piece async for piece in short])).encode()) >= 300
        with pytest.raises(ConnectionError, match="shutting down"):
            async for _ in long:
                pass

    asyncio.run(run())
    assert served.process.wait(20) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(served.url)


def test_a_refused_model_file_ends_with_one_line(tmp_path):
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"not a model")
    done = python("-m", "infer.cli", "serve", "--port", "0", "--host", "0.0.0.0", "--model", bad)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {bad}")
    assert "without an API key" in done.stderr
    assert "Traceback" not in done.stderr
