"""Random sources with a known answer, and the proof by them that losses are computed honestly."""

import json
import math

import numpy as np
import pytest
from training import make_trainer, tiny_config
from typer.testing import CliRunner

from charrnn.config import DataConfig
from charrnn.data import markov
from charrnn.data.corpus import prepare
from charrnn.data.markov import ALPHABET, MarkovSource, named_source
from charrnn.errors import CorpusError
from infer.cli import app
from train.checkpoint.format import load_for_inference
from train.export.exporter import export_checkpoint
from train.tracking.summary import entropy_lines, ngram_baseline

GOLDEN = {1: "ab\nfgeecdggfedagffcfd\neccbecdgagd\neacbea", 3: "gegbdcgagga\ndfag\necbcadfc\nacbabaab\nfc\ngb"}


def text_of(source):
    return b"".join(source.chunks()).decode()


def test_a_seed_gives_one_text_whatever_the_version_of_numpy():
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
def test_every_row_is_a_distribution_in_which_all_can_follow_and_the_rate_lies_well_below_log2(order, seed):
    source = MarkovSource(order, seed)
    assert (source.weights.sum(1) == 2**16).all()
    assert source.weights.min() >= 64
    assert source.entropy_rate < 0.95 * math.log2(len(ALPHABET))


def test_the_texts_own_surprise_is_the_rate_within_its_sampling_error():
    """64 texts: their mean surprises scatter about the rate as their standard error says."""
    scores = []
    for seed in range(64):
        source = MarkovSource(2, seed, 5000)
        bits = source.surprises(text_of(source))
        scores.append((bits.mean() - source.entropy_rate) / (bits.std() / math.sqrt(len(bits))))
    assert abs(np.mean(scores)) < 4 / math.sqrt(64) * max(1.0, np.std(scores))
    assert np.std(scores) < 3  # neighbouring surprises are correlated, so that it is not 1


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("markov:", "write markov:ORDER:SEED"),
        ("markov:2", "write markov:ORDER:SEED"),
        ("markov:2:x", "write markov:ORDER:SEED"),
        ("markov:-1:1", "write markov:ORDER:SEED"),
        ("markov:1:2:3:4", "write markov:ORDER:SEED"),
        ("markov:6:1", "5 is the highest"),
        ("markov:1:1:0", "1 to 10000000000"),
        ("markov:1:" + "9" * 5000, "more than 18 digits"),
    ],
)
def test_a_malformed_name_is_refused_with_the_form(name, why):
    with pytest.raises(CorpusError, match=why):
        named_source(name)


def test_the_file_is_made_once_and_made_again_when_it_was_changed(tmp_path, monkeypatch):
    source = MarkovSource(1, 3, 1000)
    path = markov.fetch(source, tmp_path)
    assert path.read_text() == text_of(source)
    with monkeypatch.context() as patch:
        patch.setattr(MarkovSource, "chunks", lambda self: pytest.fail("made twice"))
        assert markov.fetch(source, tmp_path) == path
    path.write_text("changed")
    assert markov.fetch(source, tmp_path).read_text() == text_of(source)


def test_a_corpus_by_such_a_name_is_that_text(tmp_path):
    corpus = prepare(DataConfig(source="markov:1:3:5000", cache_dir=str(tmp_path)))
    assert corpus.vocab.decode(corpus.ids) == text_of(MarkovSource(1, 3, 5000))
    assert corpus.name == "markov-1-3-5000"
    [entropy, baseline, limit] = entropy_lines(corpus, ngram_baseline(corpus))
    assert "counted" not in entropy
    assert "Kneser-Ney" in baseline
    assert f"{MarkovSource(1, 3).entropy_rate:.4f} bits/char" in limit


def check_against_the_limit(folder, name, assignments, closeness):
    """Trains on `name`; holds the trainer's and the exported file's loss against the source's own on that very text."""
    config = tiny_config(folder, [f"data.source={name}", "sample.length=0", *assignments])
    trainer = make_trainer(config)
    trainer.fit()
    source = named_source(name)
    val = trainer.corpus.vocab.decode(trainer.corpus.val)
    bits = source.surprises(val)
    error = bits.std() / math.sqrt(len(bits))
    reached = trainer.metrics["val/stream/bpc"]
    assert bits.mean() == pytest.approx(source.entropy_rate, abs=4 * error)
    # On the same text, the excess over the source's own surprise is a divergence: only chance makes it negative.
    assert reached > bits.mean() - error / 4
    assert reached < closeness * bits.mean()

    best = load_for_inference(trainer.run_dir)
    export_checkpoint(best, folder / "model.onnx")
    (folder / "val.txt").write_bytes(val.encode())
    done = CliRunner().invoke(app, ["score", str(folder / "model.onnx"), str(folder / "val.txt"), "--json"])
    assert done.exit_code == 0, done.output
    scored = json.loads(done.stdout)["stream"]["bits_per_char"]
    assert scored == pytest.approx(best.trainer["metrics"]["val/stream/bpc"], abs=1e-4)
    return reached, source.entropy_rate, bits.mean(), error


def test_a_trained_models_loss_comes_near_the_limit_and_not_below_it(tmp_path):
    settings = [
        "model.hidden_dim=32",
        "model.num_layers=1",
        "optim.lr=0.02",
        "train.max_steps=200",
        "eval.every=0",
        "checkpoint.every=0",
    ]
    settings += ["data.windows=carry", "data.batch_size=16", "data.seq_len=32"]
    check_against_the_limit(tmp_path, "markov:1:1:100000", settings, 1.01)


@pytest.mark.slow
@pytest.mark.parametrize("rnn", ["GRU", "LSTM"])
def test_a_well_trained_model_is_within_one_percent_of_the_limit(tmp_path, rnn):
    settings = [f"model.rnn={rnn}", "model.hidden_dim=64", "model.embedding_dim=16", "model.num_layers=1"]
    settings += ["optim.lr=0.01", "train.max_steps=1200", "eval.every=0", "checkpoint.every=0"]
    settings += ["data.windows=carry", "data.batch_size=32", "data.seq_len=64"]
    reached, rate, own, error = check_against_the_limit(tmp_path, "markov:2:1:1000000", settings, 1.01)
    print(f"{rnn}: {reached:.4f} bits/char; limit {rate:.4f}, the source on that text {own:.4f} +- {error:.4f}")
