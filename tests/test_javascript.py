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
FILES = [f"{rnn}-{precision}" for rnn, precision in itertools.product(("GRU", "LSTM"), ("fp32", "int8"))]
OPTIONS = {
    "plain": SamplingOptions(),
    "greedy": SamplingOptions(0),
    "cut": SamplingOptions(temperature=0.8, top_k=9, top_p=0.9, min_p=0.02),
    "warm": SamplingOptions(temperature=1.4, top_p=0.7),
}
LENGTH = 40
# How far a runtime's logits may lie from Python's. With activations rounded to whole numbers, a sum whose last bit
# differs may take another step; int8's products are exact, so that this is rare.
CLOSE = {"fp32": 1e-4, "int8": 0.01}


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
    """file -> (engine, prompt, uniforms (B, N), what Python generates (B, N)), a row for each of OPTIONS."""
    folder, prompt = tmp_path_factory.mktemp("javascript"), CHARS.encode("ROMEO:").astype(np.int64)
    found = {}
    for file in FILES:
        rnn, precision = file.split("-")
        engine = Engine(write_model(folder / f"{file}.onnx", rnn=rnn, precision=precision, **SIZES))
        texts = [steady_text(engine, prompt, options) for options in OPTIONS.values()]
        found[file] = engine, prompt, *map(np.stack, zip(*texts, strict=True))
    return found


def steady_text(engine, prompt, options):
    """The uniforms (N,) of the first seed whose text does not hang on a rounding, and that text (N,).

    Texts are compared exactly. That is safe where every uniform draws the same character from logits that differ by
    as much as another runtime's may, which noise of that size on Python's logits shows.
    """
    size = CLOSE[engine.metadata["charrnn.precision"]]
    noise = np.random.default_rng(0).uniform(-size, size, (32, LENGTH, len(CHARS)))
    for seed in range(2000):
        uniforms = np.random.default_rng(seed).random(LENGTH)
        drawn = np.concatenate(list(engine.drawn(prompt, LENGTH, options, [seed])), axis=1)[0]
        logits, _ = engine.step(np.concatenate([prompt, drawn])[None, :-1], engine.zero_state(1))
        shares = sampling.shares_of(logits[0, -LENGTH:] + noise, options).reshape(-1, len(CHARS))  # (32 * N, V)
        if (sampling.draw(shares, np.tile(uniforms, 32)) == np.tile(drawn, 32)).all():
            return uniforms, drawn
    raise AssertionError("every seed's text hangs on a rounding")


@pytest.fixture(scope="session", params=RUNTIMES)
def results(request, packages, jobs, tmp_path_factory):
    """file -> what tests/javascript/run.mjs found."""
    path = tmp_path_factory.mktemp(request.param) / "jobs.json"
    fields = ("temperature", "top_k", "top_p", "min_p")
    options = [{name: getattr(row, name) for name in fields} for row in OPTIONS.values()]
    written = [
        {"model": str(engine.path), "ids": prompt.tolist(), "uniforms": uniforms.tolist(), "options": options}
        for engine, prompt, uniforms, _ in jobs.values()
    ]
    path.write_text(json.dumps(written))
    command = ["node", CLIENT / "run.mjs", packages / RUNTIMES[request.param], path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr == ""  # onnxruntime has no warning of the file
    return dict(zip(jobs, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("file", FILES)
def test_logits_and_text_equal_pythons(results, jobs, file):
    engine, prompt, _, drawn = jobs[file]
    logits, _ = engine.prefill(prompt)
    np.testing.assert_allclose(results[file]["logits"], logits[0], atol=CLOSE[engine.metadata["charrnn.precision"]])
    assert results[file]["generated"] == drawn[0].tolist()


@pytest.mark.parametrize("file", FILES)
def test_rows_with_their_own_options_equal_pythons(results, jobs, file):
    engine, prompt, _, drawn = jobs[file]
    assert results[file]["rows"] == drawn.ravel().tolist()
    states = [engine.prefill(np.concatenate([prompt, row[:-1]]))[1][0] for row in drawn]  # each (L, 1, H)
    expected = np.concatenate(states, axis=1).ravel()
    np.testing.assert_allclose(results[file]["h_next"], expected, atol=CLOSE[engine.metadata["charrnn.precision"]])


def test_the_client_reads_the_metadata(results, jobs):
    for file, (engine, *_) in jobs.items():
        assert results[file]["metadata"] == engine.metadata
