"""infer.scoring: the two protocols' figures, and how a text to score is read."""

import hashlib
import json
import math

import numpy as np
import pytest
from tiny_models import CHARS, random_weights, run_config, write_model

from charrnn.errors import CorpusError, ModelFileError
from charrnn.windows import window_batches
from infer import Engine
from infer.scoring import evaluate, read_text, score


def plain_loss(engine, ids, starts):
    """Mean nll of ids[1:], restarting from the zero state at each of `starts`, a character at a time."""
    total, state = 0.0, None
    for i in range(len(ids) - 1):
        if i in starts:
            state = engine.zero_state(1)
        logits, state = engine.step(np.array([[ids[i]]]), state)
        p = np.exp(logits[0, 0].astype(np.float64))
        total -= math.log(p[ids[i + 1]] / p.sum())
    return total / (len(ids) - 1)


def test_scores_are_one_pass_and_the_mean_over_windows_from_zero_states(engine):
    ids = np.random.default_rng(0).integers(0, len(CHARS), 700).astype(np.uint8)
    found = score(engine, ids)
    assert {name: s.chars for name, s in found.items()} == {"stream": 699, "windows": 699}
    assert found["stream"].nats_per_char == pytest.approx(plain_loss(engine, ids, {0}), rel=1e-6)
    assert found["windows"].nats_per_char == pytest.approx(plain_loss(engine, ids, {0, 256, 512}), rel=1e-6)


@pytest.mark.parametrize("chunk", [1, 7, 64, 10_000])
def test_the_chunk_changes_no_score(gru, chunk):
    ids = np.random.default_rng(1).integers(0, len(CHARS), 300).astype(np.uint8)
    nll, count = evaluate(gru, ids, window_batches(len(ids), 64, 2), chunk)
    assert count == 299
    assert nll / count == pytest.approx(plain_loss(gru, ids, {0, 64, 128, 192, 256}), rel=1e-6)


def test_the_files_own_evaluation_settings_are_used(model_folder):
    tree = json.loads(run_config().model_dump_json())
    tree["eval"] |= {"window": 50, "batch_rows": 2}
    engine = Engine(write_model(model_folder / "window.onnx", changed={"config": json.dumps(tree)}))
    ids = np.random.default_rng(0).integers(0, len(CHARS), 230)
    assert score(engine, ids)["windows"].nats_per_char == pytest.approx(
        plain_loss(engine, ids, {0, 50, 100, 150, 200}), rel=1e-6
    )
    tree["eval"]["window"] = 0
    engine = Engine(write_model(model_folder / "window.onnx", changed={"config": json.dumps(tree)}))
    with pytest.raises(ModelFileError, match=r"eval\.window 0"):
        score(engine, ids)


def test_it_takes_two_characters_to_score(gru):
    for length in (0, 1):
        with pytest.raises(CorpusError, match=f"{length} character"):
            score(gru, np.zeros(length, np.uint8))
    assert {name: s.chars for name, s in score(gru, np.array([1, 2])).items()} == {"stream": 1, "windows": 1}


def test_splits_are_cut_where_training_cut_them(gru):
    text = "".join(np.random.default_rng(0).choice(list(CHARS.symbols), 1001))
    parts = {split: read_text(gru, text.encode(), split, "error") for split in ("all", "train", "val", "test")}
    assert {split: part.chars for split, part in parts.items()} == {"all": 1001, "train": 900, "val": 101, "test": 0}
    assert CHARS.decode(parts["train"].ids) + CHARS.decode(parts["val"].ids) == text


def test_a_scored_text_is_read_as_corpora_are(gru):
    text = read_text(gru, "\ufeffto\r\nbe\ror€\n".encode(), "all", "skip")
    assert CHARS.decode(text.ids) == "to\nbe\nor\n"
    assert (text.chars, text.unknown_chars, text.unknown) == (10, 1, ["€"])
    with pytest.raises(CorpusError, match="byte 0xe9 at offset 3"):
        read_text(gru, b"caf\xe9", "all", "error")


def test_a_byte_model_scores_any_file(byte_engine):
    raw = bytes(range(256)) * 5
    text = read_text(byte_engine, raw, "all", "error")
    assert text.ids.tolist() == list(raw)
    assert score(byte_engine, text.ids)["stream"].chars == 1279


def test_the_training_corpus_is_recognised(tmp_path):
    sha = hashlib.sha256(b"to be\nor not\n").hexdigest()
    engine = Engine(write_model(tmp_path / "m.onnx", changed={"corpus_sha256": sha}))
    assert read_text(engine, b"to be\r\nor not\r\n", "all", "error").is_corpus
    assert not read_text(engine, b"to be\nor no\n", "all", "error").is_corpus


def test_a_model_without_a_finite_loss_is_named(model_folder):
    weights = random_weights(run_config(), len(CHARS))
    weights["head.bias"][3] = np.nan
    engine = Engine(write_model(model_folder / "nan.onnx", weights=weights))
    with pytest.raises(ModelFileError, match="loss of nan"):
        score(engine, CHARS.encode("romeo and so on"))
