"""lm-eval's local-completions against infer serve: its likelihoods are infer score's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_models import write_model

from benchmarks.serving import serving
from charrnn.vocab import Vocab
from infer import Engine

TASK = """
task: continuations
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{continuation}}}}"
target_delimiter: ""
metric_list: [{{metric: perplexity}}]
"""
# lm-eval moves spaces at a context's end to its continuation.
DOCUMENTS = [("ROMEO:", "\nBut soft, what light"), ("A", " b"), ("To be, or not to be: that is", " the question.\n")]


@pytest.fixture(scope="module")
def lm_eval(tmp_path_factory):
    """The interpreter of an environment that has lm-eval, made for it."""
    folder = tmp_path_factory.mktemp("lm-eval")
    python = folder / "bin" / "python"
    steps = [
        [sys.executable, "-m", "venv", "--system-site-packages", str(folder)],
        [str(python), "-m", "pip", "install", "--quiet", "lm-eval[api]"],
        [str(python), "-c", "import lm_eval.models.openai_completions"],
    ]
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"lm-eval does not install: {done.stderr.strip()[-300:]}")
    return python


@pytest.mark.slow
def test_likelihoods_are_those_of_score(lm_eval, tmp_path):
    engine = Engine(write_model(tmp_path / "tiny.onnx", Vocab.of_bytes()))
    lines = [json.dumps({"context": c, "continuation": t}) for c, t in DOCUMENTS]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    (tmp_path / "task.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    with serving("--model", engine.path) as served:
        arguments = f"model=tiny,base_url={served.url}/v1/completions,tokenizer_backend=remote"
        command = [
            lm_eval, "-m", "lm_eval", "--model", "local-completions", "--model_args", arguments, "--tasks",
            "continuations", "--include_path", tmp_path, "--output_path", tmp_path / "out", "--log_samples",
        ]  # fmt: skip
        environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "none"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = Path(tmp_path / "out").rglob("samples_*.jsonl")
    found = {s["doc_id"]: s["filtered_resps"][0] for s in map(json.loads, samples.read_text().splitlines())}
    for i, (context, continuation) in enumerate(DOCUMENTS):
        ids = engine.vocab.encode(context + continuation).astype(np.int64)
        logits = engine.step(ids[None, :-1], engine.zero_state(1))[0][0].astype(np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        count = len(continuation.encode())
        wanted = log_p[np.arange(len(ids) - 1), ids[1:]][-count:].sum()
        assert float(found[i][0] if isinstance(found[i], list) else found[i]) == pytest.approx(wanted, abs=1e-4)
