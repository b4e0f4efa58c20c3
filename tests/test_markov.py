"""Random sources with a known answer, and the proof by them that losses are computed honestly."""

import json
import math

import numpy as np
import pytest
from markov import ALPHABET, MarkovSource
from training import make_trainer, tiny_config
from typer.testing import CliRunner

from infer.commands import app
from train.checkpoint.format import load_for_inference
from train.export.exporter import export_checkpoint

GOLDEN = {1: "ab\nfgeecdggfedagffcfd\neccbecdgagd\neacbea", 3: "gegbdcgagga\ndfag\necbcadfc\nacbabaab\nfc\ngb"}


def text_of(source):
    return b"".join(source.chunks()).decode()


def test_seed_fixes_the_text_for_any_numpy():
    """The golden strings were written down once; numpy promises that PCG64's raw numbers stay."""
    assert text_of(MarkovSource(1, 1, 40)) == GOLDEN[1]
    assert text_of(MarkovSource(3, 7, 40)) == GOLDEN[3]


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_the_stationary_distribution_solves_the_linear_system(order):
    source = MarkovSource(order, 5)
    states, a = source.contexts, len(ALPHABET)
    transition = np.zeros((states, states))
    for context in range(states):
        for symbol in range(a):
            transition[context, (context * a + symbol) % states] += source.weights[context, symbol] / 2**16
    system = np.vstack([transition.T - np.eye(states), np.ones(states)])
    solved, *_ = np.linalg.lstsq(system, np.append(np.zeros(states), 1.0), rcond=None)
    assert source.stationary == pytest.approx(solved, abs=1e-12)
    entropies = [-sum(w / 2**16 * math.log2(w / 2**16) for w in row) for row in source.weights.tolist()]
    assert source.entropy_rate == pytest.approx(float(np.dot(solved, entropies)), abs=1e-10)


@pytest.mark.parametrize("order", [0, 1, 2, 4])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_row_is_a_positive_distribution_below_log2(order, seed):
    source = MarkovSource(order, seed)
    assert (source.weights.sum(1) == 2**16).all()
    assert source.weights.min() >= 64
    assert source.entropy_rate < 0.95 * math.log2(len(ALPHABET))


def test_surprisal_is_the_rate_within_sampling_error():
    """64 texts: their mean surprises scatter about the rate as their standard error says."""
    scores = []
    for seed in range(64):
        source = MarkovSource(2, seed, 5000)
        bits = source.surprises(text_of(source))
        scores.append((bits.mean() - source.entropy_rate) / (bits.std() / math.sqrt(len(bits))))
    assert abs(np.mean(scores)) < 4 / math.sqrt(64) * max(1.0, np.std(scores))
    assert np.std(scores) < 3  # neighbouring surprises are correlated, so that it is not 1


def check_against_the_limit(folder, source, assignments, closeness):
    """Holds the trainer's and the exported file's loss on `source`'s text against its own."""
    (folder / "markov.txt").write_bytes(b"".join(source.chunks()))
    config = tiny_config(folder, [f"data.source={folder / 'markov.txt'}", "sample.length=0", *assignments])
    trainer = make_trainer(config)
    trainer.fit()
    val = trainer.data.corpus.vocab.decode(trainer.data.corpus.val)
    bits = source.surprises(val)
    error = bits.std() / math.sqrt(len(bits))
    reached = trainer.metrics.latest["val/stream/bpc"]
    assert bits.mean() == pytest.approx(source.entropy_rate, abs=4 * error)
    # On the same text, the excess over the source's own surprise is a divergence: only chance makes it negative.
    assert reached > bits.mean() - error / 4
    assert reached < closeness * bits.mean()

    best = load_for_inference(trainer.checkpoints.run_dir)
    export_checkpoint(best, folder / "model.onnx")
    (folder / "val.txt").write_bytes(val.encode())
    done = CliRunner().invoke(app, ["score", str(folder / "model.onnx"), str(folder / "val.txt"), "--json"])
    assert done.exit_code == 0, done.output
    scored = json.loads(done.stdout)["stream"]["bits_per_char"]
    assert scored == pytest.approx(best.trainer["metrics"]["val/stream/bpc"], abs=1e-4)
    return reached, source.entropy_rate, bits.mean(), error


def test_trained_loss_nears_the_limit_from_above(tmp_path):
    settings = [
        "model.hidden_dim=32",
        "model.num_layers=1",
        "optim.lr=0.02",
        "train.max_steps=200",
        "eval.every=0",
        "checkpoint.every=0",
    ]
    settings += ["data.windows=carry", "data.batch_size=16", "data.seq_len=32"]
    check_against_the_limit(tmp_path, MarkovSource(1, 1, 100_000), settings, 1.01)


@pytest.mark.slow
@pytest.mark.parametrize("rnn", ["GRU", "LSTM"])
def test_a_well_trained_model_is_within_one_percent_of_the_limit(tmp_path, rnn):
    settings = [f"model.rnn={rnn}", "model.hidden_dim=64", "model.embedding_dim=16", "model.num_layers=1"]
    settings += ["optim.lr=0.01", "train.max_steps=1200", "eval.every=0", "checkpoint.every=0"]
    settings += ["data.windows=carry", "data.batch_size=32", "data.seq_len=64"]
    reached, rate, own, error = check_against_the_limit(tmp_path, MarkovSource(2, 1), settings, 1.01)
    print(f"{rnn}: {reached:.4f} bits/char; limit {rate:.4f}, the source on that text {own:.4f} +- {error:.4f}")
