"""A model file in JavaScript: onnxruntime for Node.js and its WebAssembly build give Python's logits and its text."""

import itertools
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from tiny_models import CHARS, write_model

from charrnn import sampling
from charrnn.sampling import SamplingOptions
from infer import Engine

CLIENT = Path(__file__).parent / "javascript"
RUNTIMES = {
    "node": "onnxruntime-node/dist/index.js",
    "wasm": "onnxruntime-web/dist/ort.wasm.min.js",
}
SIZES = {"hidden_dim": 40}
FILES = [f"{rnn}-{precision}" for rnn, precision in itertools.product(("GRU", "LSTM"), ("fp32", "int8", "int4"))]
OPTIONS = {
    "plain": SamplingOptions(),
    "cut": SamplingOptions(temperature=0.8, top_k=9, top_p=0.9, min_p=0.02),
    "warm": SamplingOptions(temperature=1.4, top_p=0.7),
}
JOBS = list(itertools.product(FILES, OPTIONS))
LENGTH = 24
# How far a runtime's logits may lie from Python's. With activations rounded to whole numbers, a sum whose last bit
# differs may take another step: int8's products are exact, so that this is rare, int4's kernels differ.
CLOSE = {"fp32": 1e-4, "int8": 0.01, "int4": 0.2}
EXACT = [job for job in JOBS if not job[0].endswith("int4")]


@pytest.fixture(scope="session")
def packages(tmp_path_factory):
    """The folder with the two npm packages, as tests/javascript/package.json names them."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("no node and npm on this machine: JavaScript is not tested")
    folder = tmp_path_factory.mktemp("npm")
    shutil.copy(CLIENT / "package.json", folder)
    command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--no-package-lock"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        pytest.skip("npm install takes too long (offline?): JavaScript is not tested")
    if done.returncode:
        pytest.skip(f"npm install fails (offline?): JavaScript is not tested; {done.stderr.strip()[-300:]}")
    return folder / "node_modules"


@pytest.fixture(scope="session")
def jobs(tmp_path_factory):
    """(file, options) -> (engine, prompt, uniforms, options, what Python draws)."""
    folder, prompt = tmp_path_factory.mktemp("javascript"), CHARS.encode("ROMEO:").astype(np.int64)
    engines = {}
    for file in FILES:
        rnn, precision = file.split("-")
        engines[file] = Engine(write_model(folder / f"{file}.onnx", rnn=rnn, precision=precision, **SIZES))
    found = {}
    for file, name in JOBS:
        uniforms, drawn = steady_text(engines[file], prompt, OPTIONS[name])
        found[file, name] = engines[file], prompt, uniforms, OPTIONS[name], drawn
    return found


def steady_text(engine, prompt, options):
    """The uniforms (N,) of the first seed whose text does not hang on a rounding, and that text (N,).

    Texts are compared exactly. That is safe where every uniform draws the same character from logits that differ by
    as much as another runtime's may, which noise of that size on Python's logits shows. int4's texts are not compared.
    """
    size = CLOSE[engine.metadata["charrnn.precision"]]
    noise = np.random.default_rng(0).uniform(-size, size, (32, LENGTH, len(CHARS)))
    for seed in range(2000):
        uniforms = np.random.default_rng(seed).random(LENGTH)
        drawn = np.concatenate(list(engine.drawn(prompt, LENGTH, options, [seed])), axis=1)[0]
        logits, _ = engine.step(np.concatenate([prompt, drawn])[None, :-1], engine.zero_state(1))
        shares = sampling.shares_of(logits[0, -LENGTH:] + noise, options).reshape(-1, len(CHARS))  # (32 * N, V)
        if size > 0.1 or (sampling.draw(shares, np.tile(uniforms, 32)) == np.tile(drawn, 32)).all():
            return uniforms, drawn
    raise AssertionError("every seed's text hangs on a rounding")


@pytest.fixture(scope="session", params=RUNTIMES)
def results(request, packages, jobs, tmp_path_factory):
    """(file, options) -> what tests/javascript/run.mjs found."""
    path = tmp_path_factory.mktemp(request.param) / "jobs.json"
    fields = ("temperature", "top_k", "top_p", "min_p")
    path.write_text(
        json.dumps(
            [
                {
                    "model": str(engine.path),
                    "ids": prompt.tolist(),
                    "uniforms": uniforms.tolist(),
                    "options": {name: getattr(options, name) for name in fields},
                }
                for engine, prompt, uniforms, options, _ in jobs.values()
            ]
        )
    )
    command = ["node", CLIENT / "run.mjs", packages / RUNTIMES[request.param], path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(jobs, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("job", JOBS, ids="-".join)
def test_logits_and_what_is_drawn_are_those_of_python(results, jobs, job):
    engine, prompt, _, _, drawn = jobs[job]
    logits, _ = engine.prefill(prompt)
    atol = CLOSE[engine.metadata["charrnn.precision"]]
    np.testing.assert_allclose(results[job]["logits"], logits[0], atol=atol)
    if job in EXACT:
        assert results[job]["stepped"] == drawn.tolist()


@pytest.mark.parametrize("job", EXACT, ids="-".join)
def test_the_graphs_own_loop_draws_the_same_text_once_its_inputs_are_required(results, jobs, job):
    engine, prompt, _, _, drawn = jobs[job]
    assert results[job]["looped"] == drawn.tolist()
    _, (h, *_) = engine.prefill(np.concatenate([prompt, drawn[:-1]]))
    np.testing.assert_allclose(results[job]["h_next"], h.ravel(), atol=CLOSE[engine.metadata["charrnn.precision"]])


def test_without_that_the_packages_hide_the_optional_inputs(results):
    """Should this fail, a newer onnxruntime offers them, and client.mjs needs no withRequiredInputs."""
    for file, name in JOBS:
        assert results[file, name]["inputs"] == ["ids", "h", "c"][: 3 if file.startswith("LSTM") else 2]


def test_the_client_reads_the_metadata(results, jobs):
    for job, (engine, *_) in jobs.items():
        assert results[job]["metadata"] == engine.metadata
