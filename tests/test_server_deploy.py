"""launch/serve/: commands that are accepted, paths and metrics that exist, and the image's build steps."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_models import write_model

from benchmarks.serving import serving
from infer import cli
from infer.server import main
from infer.server.metrics import Metrics

ROOT = Path(__file__).resolve().parent.parent
SERVE = ROOT / "launch" / "serve"
DOCKERFILE = (SERVE / "Dockerfile").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((SERVE / "compose.yaml").read_text(encoding="utf-8"))
PROMETHEUS = yaml.safe_load((SERVE / "prometheus.yaml").read_text(encoding="utf-8"))
DEPLOYMENT, SERVICE, AUTOSCALER = yaml.safe_load_all((SERVE / "kubernetes.yaml").read_text(encoding="utf-8"))
UNIT = (SERVE / "charrnn.service").read_text(encoding="utf-8")
POD = DEPLOYMENT["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
IMAGE_COMMAND = yaml.safe_load(re.search(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.M)[1])
UNIT_COMMAND = shlex.split(re.search(r"^ExecStart=\S+/(infer .*)$", UNIT, re.M)[1])


@pytest.fixture
def options(monkeypatch):
    """What a command line asks of the server."""

    def options(command):
        found = {}

        async def run(service, listener, drain_timeout):
            found["drain_timeout"] = drain_timeout

        monkeypatch.setattr(main, "run", run)
        monkeypatch.setattr("infer.addresses.listen", lambda host, port: found.update(port=port))
        monkeypatch.setattr("infer.server.logs.configure", lambda as_json: found.update(log_json=as_json))
        monkeypatch.setattr(main, "named_models", lambda _: {})
        assert command[0] == "infer"
        assert cli.run(command[1:]) == 0
        return found

    return options


@pytest.mark.parametrize(
    "command",
    [
        IMAGE_COMMAND, IMAGE_COMMAND + COMPOSE["services"]["charrnn"]["command"], IMAGE_COMMAND + CONTAINER["args"],
        UNIT_COMMAND, [*IMAGE_COMMAND, *shlex.split(re.search(r"charrnn-serve (--model .*)", DOCKERFILE)[1])],
    ],
)  # fmt: skip
def test_commands_are_accepted_on_the_port_that_is_published(options, command):
    assert options(command)["port"] == 8000
    assert options(command)["log_json"]


def test_what_is_stopped_has_time_to_drain(options):
    image = IMAGE_COMMAND + CONTAINER["args"]
    assert POD["terminationGracePeriodSeconds"] > options(image)["drain_timeout"] + 3
    assert int(re.search(r"TimeoutStopSec=(\d+)", UNIT)[1]) > options(UNIT_COMMAND)["drain_timeout"] + 3
    grace = COMPOSE["services"]["charrnn"]["stop_grace_period"]
    assert int(grace.removesuffix("s")) > options(IMAGE_COMMAND)["drain_timeout"] + 3


def test_probes_ports_and_metrics_are_those_of_the_server():
    probes = [CONTAINER[name]["httpGet"] for name in ("startupProbe", "readinessProbe", "livenessProbe")]
    assert {(p["path"], p["port"]) for p in probes} <= {("/health", "http"), ("/metrics", "http")}
    assert CONTAINER["ports"] == [{"name": "http", "containerPort": 8000}]
    assert SERVICE["spec"]["selector"].items() <= DEPLOYMENT["spec"]["template"]["metadata"]["labels"].items()
    assert "EXPOSE 8000" in DOCKERFILE
    (scrape,) = PROMETHEUS["scrape_configs"]
    assert (scrape["metrics_path"], scrape["static_configs"]) == ("/metrics", [{"targets": ["charrnn:8000"]}])
    (metric,) = AUTOSCALER["spec"]["metrics"]
    assert f"# TYPE {metric['pods']['metric']['name']} gauge" in Metrics().text().decode()


def test_images_run_without_root_torch_or_a_writable_disk():
    assert re.search(r"^USER (\d+):", DOCKERFILE, re.M)[1] != "0"
    assert re.findall(r"pip install .*'\.\[(\w+)\]'", DOCKERFILE) == ["serve"]
    assert POD["securityContext"]["runAsNonRoot"] is True
    assert CONTAINER["securityContext"]["readOnlyRootFilesystem"] is True
    assert COMPOSE["services"]["charrnn"]["read_only"] is True


def test_the_dockerfile_copies_what_there_is():
    sources = [s for line in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.M) for s in line.split()]
    assert sources
    assert [source for source in sources if not (ROOT / source).exists()] == []


def test_systemd_takes_the_unit(tmp_path):
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / "charrnn.service"
    unit.write_text(UNIT.replace("/opt/charrnn/bin/infer", sys.executable))
    done = subprocess.run([analyze, "verify", unit], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_load_of_locust_is_what_the_server_counts(model_folder):
    if importlib.util.find_spec("locust") is None:  # not imported: it replaces the threads and sockets of its process
        pytest.skip("locust is not installed")
    locust = [sys.executable, "-m", "locust", "-f", "launch/serve/locustfile.py", "--headless", "--json"]
    locust += ["--users", "3", "--spawn-rate", "3", "--run-time", "2s", "--stop-timeout", "30", "--host"]
    with serving("--model", write_model(model_folder / "load.onnx")) as served:
        done = subprocess.run([*locust, served.url], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stdout + done.stderr
        rows = {row["name"]: row for row in json.loads(done.stdout)}
        first, text = rows["first text"], rows["text"]
        assert first["num_requests"] == served.gauge("charrnn_requests_total", 'path="/v1/completions"') >= 3
        assert first["num_failures"] + text["num_failures"] == served.gauge("charrnn_requests_rejected_total") == 0
        assert text["total_content_length"] == served.gauge("charrnn_generated_chars_total") > 0
        firsts = served.gauge("charrnn_time_to_first_char_seconds_count")
        mean_s = served.gauge("charrnn_time_to_first_char_seconds_sum") / firsts
    assert 0 < mean_s < first["total_response_time"] / first["num_requests"] / 1000


@pytest.mark.slow
def test_the_build_steps_of_the_image_serve(tmp_path):
    """Without an image: its RUN lines in a copy of the sources, and its entry point in an empty environment."""
    for source in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / source, tmp_path)
    for folder in ("charrnn", "train", "infer", "checkpoints"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    place = tmp_path / "opt"
    for step in re.findall(r"^RUN (.*)$", DOCKERFILE, re.M):
        line = step.replace("python -m venv", f"{sys.executable} -m venv").replace("/opt/charrnn", str(place))
        done = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}: {done.stderr}"
    size = sum(f.stat().st_size for f in place.rglob("*") if f.is_file() and not f.is_symlink())
    # The base image has 125 MB of the 400.
    assert size < 275e6, f"{size / 1e6:.0f} MB"
    assert not list(place.rglob("torch"))
    command = [str(place / "bin" / "infer"), *IMAGE_COMMAND[1:], "--port", "0"]
    log = tmp_path / "log"
    with log.open("wb") as file:
        server = subprocess.Popen(command, stderr=file, cwd="/", env={"PATH": os.environ["PATH"]})
    try:
        from benchmarks.serving import Served, _address

        url = _address(server, log).replace("0.0.0.0", "127.0.0.1")
        assert Served(server, url, log).gauge("charrnn_workers_ready") == 1
    finally:
        server.terminate()
        assert server.wait(20) == 0
