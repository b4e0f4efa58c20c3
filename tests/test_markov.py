"""A random source of known surprise: a trained loss nears it from above, or it is not computed honestly."""

import json
import math

import numpy as np
import pytest
from training import make_trainer, tiny_config
from typer.testing import CliRunner

from infer.commands import app
from train.checkpoint.format import load_for_inference
from train.export.exporter import export_checkpoint

ALPHABET = "\nabcdefg"
SETTINGS = [
    *("model.hidden_dim=32", "model.num_layers=1", "optim.lr=0.02", "train.max_steps=200", "data.windows=carry"),
    *("data.batch_size=16", "data.seq_len=32", "eval.every=0", "checkpoint.every=0", "sample.length=0"),
]


def markov_text(num_chars, seed=1):
    """A text in which each character is drawn by the one before it, and those distributions, (A, A)."""
    draw = np.random.default_rng(seed)
    rows = draw.dirichlet(np.full(len(ALPHABET), 0.5), len(ALPHABET))
    ids = [0]
    for u in draw.random(num_chars - 1):
        ids.append(int(np.searchsorted(rows[ids[-1]].cumsum()[:-1], u, side="right")))
    return "".join(ALPHABET[i] for i in ids), rows


@pytest.mark.parametrize("rnn", ["GRU", "LSTM"])
def test_trained_loss_nears_the_limit_from_above(tmp_path, rnn):
    text, rows = markov_text(100_000)
    trainer = make_trainer(tiny_config(tmp_path, [*SETTINGS, f"model.rnn={rnn}"], text))
    trainer.fit()
    val = trainer.data.corpus.vocab.decode(trainer.data.corpus.val)
    ids = [ALPHABET.index(c) for c in val]
    bits = -np.log2(rows[ids[:-1], ids[1:]])  # what the source itself is surprised by
    error = bits.std() / math.sqrt(len(bits))
    # The rate of entropy (Shannon 1948, section 7): each context's entropy, as often as it comes in the long run.
    entropy_rate = np.linalg.matrix_power(rows, 1000)[0] @ -(rows * np.log2(rows)).sum(1)
    assert bits.mean() == pytest.approx(entropy_rate, abs=4 * error)
    # On the same text the excess over the source's own surprise is a divergence: only chance makes it negative.
    assert bits.mean() - error / 4 < trainer.metrics.latest["val/stream/bpc"] < 1.01 * bits.mean()

    best = load_for_inference(trainer.checkpoints.run_dir)
    export_checkpoint(best, tmp_path / "model.onnx")
    (tmp_path / "val.txt").write_text(val)
    done = CliRunner().invoke(app, ["score", str(tmp_path / "model.onnx"), str(tmp_path / "val.txt"), "--json"])
    assert done.exit_code == 0, done.output
    scored = json.loads(done.stdout)["stream"]["bits_per_char"]
    assert scored == pytest.approx(best.trainer["metrics"]["val/stream/bpc"], abs=1e-4)
