"""infer.engine: the network's numbers, and the text that is made of them."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import CHARS, random_weights, run_config, write_model

from charrnn.errors import ConfigError, SamplingError, VocabError
from charrnn.sampling import SamplingOptions, probabilities
from charrnn.vocab import Vocab
from infer import Engine
from infer.text_writer import TextWriter

PROMPT = "ROMEO:\n"
GREEDY = SamplingOptions(0)


# The network, from torch's documented equations (torch.nn.GRU, torch.nn.LSTM), a character at a time.


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gru_cell(x, h, w_x, w_h, b_x, b_h):
    r_x, z_x, n_x = np.split(w_x @ x + b_x, 3)
    r_h, z_h, n_h = np.split(w_h @ h[0] + b_h, 3)
    r, z = sigmoid(r_x + r_h), sigmoid(z_x + z_h)
    n = np.tanh(n_x + r * n_h)
    return ((1 - z) * n + z * h[0],)


def lstm_cell(x, state, w_x, w_h, b_x, b_h):
    h, c = state
    i, f, g, o = np.split(w_x @ x + b_x + w_h @ h + b_h, 4)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


def reference(rnn, num_layers, weights, ids, state):
    """logits (T, V) and the state for one row. ids: (T,). state: each (L, H)."""
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    cell = gru_cell if rnn == "GRU" else lstm_cell
    layers = [tuple(part[i] for part in state) for i in range(num_layers)]
    logits = []
    for token in ids:
        x = w["embedding.weight"][token]
        for i in range(num_layers):
            parameters = (w[f"rnn.{kind}_l{i}"] for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
            layers[i] = cell(x, layers[i], *parameters)
            x = layers[i][0]
        logits.append(w["head.weight"] @ x + w["head.bias"])
    return np.stack(logits), tuple(np.stack([layer[p] for layer in layers]) for p in range(len(state)))


@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("rnn", ["GRU", "LSTM"])
def test_logits_and_state_are_those_of_the_cells_equations(rnn, num_layers, tmp_path):
    config = run_config(rnn, num_layers)
    weights = random_weights(config, len(CHARS), seed=num_layers)
    engine = Engine(write_model(tmp_path / "m.onnx", weights=weights, rnn=rnn, num_layers=num_layers))
    rng = np.random.default_rng(1)
    ids = rng.integers(0, len(CHARS), (3, 9))
    state = tuple(rng.normal(0, 0.5, part.shape).astype(np.float32) for part in engine.zero_state(3))
    logits, state_next = engine.step(ids, state)
    assert logits.shape == (3, 9, len(CHARS))
    assert logits.dtype == np.float32
    for b in range(3):
        expected, expected_state = reference(rnn, num_layers, weights, ids[b], [part[:, b] for part in state])
        np.testing.assert_allclose(logits[b], expected, atol=2e-5)
        for part, expected_part in zip(state_next, expected_state, strict=True):
            np.testing.assert_allclose(part[:, b], expected_part, atol=2e-5)


def test_zero_state_has_a_part_a_cell_and_its_shape(engine):
    state = engine.zero_state(5)
    assert len(state) == {"GRU": 1, "LSTM": 2}[engine.config["model"]["rnn"]]
    assert all(part.shape == (2, 5, 24) and part.dtype == np.float32 and not part.any() for part in state)


def test_prefill_equals_step_by_step(engine):
    ids = engine.vocab.encode(PROMPT)
    logits, state = engine.prefill(ids)
    stepped_state = engine.zero_state(1)
    for token in ids:
        stepped, stepped_state = engine.step(np.array([[token]]), stepped_state)
    assert logits.shape == (1, len(CHARS))
    np.testing.assert_allclose(logits, stepped[:, 0], atol=1e-5)
    for part, stepped_part in zip(state, stepped_state, strict=True):
        np.testing.assert_allclose(part, stepped_part, atol=1e-5)


def test_prefill_of_a_long_prompt_in_parts_equals_one_call(engine, monkeypatch):
    ids = np.random.default_rng(3).integers(0, len(CHARS), 100)
    whole, state = engine.prefill(ids)
    monkeypatch.setattr("infer.network._PREFILL_CHARS", 33)
    parts, parts_state = engine.prefill(ids)
    np.testing.assert_allclose(parts, whole, atol=1e-5)
    np.testing.assert_allclose(parts_state[0], state[0], atol=1e-5)


@pytest.mark.parametrize(
    "ids", [[[-1]], [[len(CHARS)]], [[0, 10**12]], [], [[]], [0, 1], [[[0]]]], ids=lambda ids: repr(ids)
)
def test_step_refuses_ids_of_another_shape_or_range(gru, ids):
    with pytest.raises(ValueError, match="ids must"):
        gru.step(np.array(ids, np.int64), gru.zero_state(1))


def test_the_same_seed_gives_the_same_text_and_another_seed_another(engine):
    first, again, other = ("".join(engine.generate(PROMPT, 80, seed=s)) for s in (7, 7, 8))
    assert first == again
    assert first != other
    assert len(first) == 80


def test_no_seed_gives_a_new_text_each_time(gru):
    assert "".join(gru.generate(PROMPT, 80)) != "".join(gru.generate(PROMPT, 80))


def test_text_is_drawn_from_the_models_own_distribution(gru):
    """Character by character: the text's next character is the one that its distribution and its uniform give."""
    text = "".join(gru.generate(PROMPT, 40, options=SamplingOptions(0.7, 9, 0.9), seed=11))
    rng = np.random.default_rng(11)
    for i, character in enumerate(text):
        logits, _ = gru.prefill(gru.vocab.encode(PROMPT + text[:i]))
        cumulative = probabilities(logits[0], 0.7, 9, 0.9).cumsum()
        assert gru.vocab.symbols[int(np.searchsorted(cumulative, rng.random(), side="right"))] == character


def test_temperature_zero_needs_no_seed_to_repeat_itself(engine):
    assert "".join(engine.generate(PROMPT, 60, GREEDY)) == "".join(engine.generate(PROMPT, 60, GREEDY))


def test_a_batch_equals_its_single_streams(engine):
    options = {"length": 70, "options": SamplingOptions(0.9, 12, 0.97)}
    batch = engine.generate_batch(PROMPT, 4, seed=3, **options)
    assert batch == ["".join(engine.generate(PROMPT, seed=3 + i, **options)) for i in range(4)]


def test_a_batch_with_a_stop_text_equals_its_single_streams(engine):
    batch = engine.generate_batch(PROMPT, 5, length=60, seed=0, stop="e")
    assert batch == ["".join(engine.generate(PROMPT, 60, seed=i, stop="e")) for i in range(5)]
    assert len({len(text) for text in batch}) > 1


def test_a_batch_goes_no_further_than_its_last_stop_text(gru, monkeypatch):
    steps = count_runs(gru, monkeypatch)
    gru.generate_batch(PROMPT, 3, length=1_000_000, seed=0, stop="e")
    assert steps["run"] < 30


def count_runs(engine, monkeypatch):
    steps, run = Counter(), engine._run
    monkeypatch.setattr(engine, "_run", lambda *a: (steps.update(["run"]), run(*a))[1])
    return steps


def test_pieces_come_as_they_are_drawn(gru, monkeypatch):
    steps = count_runs(gru, monkeypatch)
    pieces = gru.generate(PROMPT, 500, seed=1)
    assert steps["run"] == 1  # the prompt but its last character, in one call
    assert [1 <= len(next(pieces)) <= 32 for _ in range(3)] == [True] * 3
    assert steps["run"] == 4


@pytest.mark.parametrize(("characters", "start"), [("\t\nab", "\n"), ("zyx", "x")])
def test_an_empty_prompt_starts_from_a_newline_or_the_first_entry(model_folder, characters, start):
    engine = Engine(write_model(model_folder / f"{start!r}.onnx", Vocab.of_chars(characters)))
    assert "".join(engine.generate("", 40, seed=5)) == "".join(engine.generate(start, 40, seed=5))


def test_length_zero_writes_nothing(gru):
    assert list(gru.generate(PROMPT, 0)) == []
    assert gru.generate_batch(PROMPT, 2, length=0) == ["", ""]


@pytest.mark.parametrize("length", [0, 1, 5, 200])
def test_the_text_ends_before_the_stop_text(gru, length):
    whole = "".join(gru.generate(PROMPT, 300, seed=2))
    stop = whole[length : length + 3]
    assert "".join(gru.generate(PROMPT, 300, seed=2, stop=stop)) == whole.split(stop)[0]


def test_a_stop_text_that_never_comes_leaves_the_text_whole(gru):
    whole = "".join(gru.generate(PROMPT, 100, seed=2))
    assert "".join(gru.generate(PROMPT, 100, seed=2, stop=whole + "a")) == whole


def written(vocab, ids, stop):
    writer = TextWriter(vocab, [stop] if stop else [])
    return [writer.feed([i]) for i in ids] + [writer.end()]


@given(st.text("ab", max_size=30), st.text("ab", min_size=1, max_size=4))
def test_writing_with_a_stop_text_holds_back_its_possible_beginnings_and_no_more(text, stop):
    vocab = Vocab.of_chars("ab")
    pieces = written(vocab, vocab.encode(text).tolist(), stop)
    assert "".join(pieces) == text.split(stop)[0]
    for n in range(len(text)):
        seen = text[: n + 1]
        if stop in seen:
            break
        longest = max(k for k in range(len(stop)) if seen.endswith(stop[:k]))
        assert "".join(pieces[: n + 1]) == seen[: len(seen) - longest]


@given(st.binary(max_size=40), st.text(min_size=1, max_size=3))
def test_a_byte_stream_writes_whole_characters_before_its_stop_text(raw, stop):
    pieces = written(Vocab.of_bytes(), list(raw), stop)
    assert "".join(pieces) == raw.decode("utf-8", "replace").split(stop)[0]


def test_byte_models_stream_valid_utf8(byte_engine):
    pieces = list(byte_engine.generate("é€", 300, SamplingOptions(2.0), seed=1))
    "".join(pieces).encode("utf-8")
    assert all(pieces)


def test_skip_and_replace_decide_what_the_model_reads(gru, model_folder):
    assert "".join(gru.generate("RO€ME", 30, seed=1, unknown="skip")) == "".join(gru.generate("ROME", 30, seed=1))
    vocab = Vocab("chars", CHARS.symbols, replacement="!")
    replacing = Engine(write_model(model_folder / "replacing.onnx", vocab))
    expected = "".join(replacing.generate("RO!ME", 30, seed=1))
    assert "".join(replacing.generate("RO€ME", 30, seed=1, unknown="replace")) == expected


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"length": -1}, SamplingError, "length"),
        ({"seed": -1}, SamplingError, "seed"),
        ({"stop": ""}, SamplingError, "stop text is empty"),
        ({"stop": "a€"}, SamplingError, "never be written: .*€"),
        ({"prompt": "€"}, VocabError, "€"),
        ({"prompt": "€", "unknown": "replace"}, VocabError, "no replacement"),
    ],
)
def test_generate_refuses_bad_arguments_at_the_call(gru, options, error, named):
    with pytest.raises(error, match=named):
        gru.generate(**options)
    with pytest.raises(error, match=named):
        gru.generate_batch(num_samples=2, **options)


def test_a_batch_of_none_is_refused(gru):
    with pytest.raises(SamplingError, match="num_samples"):
        gru.generate_batch(PROMPT, 0)


def test_weights_that_are_not_finite_are_named_and_not_sampled(model_folder):
    weights = random_weights(run_config(), len(CHARS))
    weights["head.bias"][3] = np.nan
    engine = Engine(write_model(model_folder / "nan.onnx", weights=weights))
    with pytest.raises(SamplingError, match="not finite"):
        list(engine.generate(PROMPT, 5))


def test_the_engine_shows_what_the_file_records(gru):
    assert gru.vocab == CHARS
    assert gru.config["model"]["rnn"] == "GRU"
    assert gru.metrics["step"] == 1200
    assert gru.corpus["name"] == "tiny"
    assert gru.metadata["charrnn.corpus_sha256"] == "0" * 64


def test_threads_do_not_change_the_text(gru):
    two = Engine(gru.path, threads=2)
    assert "".join(two.generate(PROMPT, 60, seed=4)) == "".join(gru.generate(PROMPT, 60, seed=4))


@pytest.mark.parametrize("threads", [0, -1, 100_000])
def test_a_number_of_threads_out_of_range_is_refused(gru, threads):
    with pytest.raises(ConfigError, match=f"threads .*{threads}"):
        Engine(gru.path, threads)


# A caller's mistakes are not the file's.


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *(("length", 2.5), ("length", None), ("seed", 1.5), ("seed", "x"), ("prompt", None)),
        *(("prompt", b"ab"), ("stop", 5), ("unknown", "drop")),
    ],
)
def test_an_argument_of_the_wrong_type_is_named(gru, argument, value):
    options = {"prompt": "a", "length": 3, "seed": 1} | {argument: value}
    with pytest.raises((SamplingError, VocabError), match=rf"\b{argument}\b"):
        "".join(gru.generate(**options))


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ({"options": SamplingOptions(np.float32(0.5))}, {"options": SamplingOptions(0.5)}),
        ({"seed": np.uint8(255)}, {"seed": 255}),
        ({"options": SamplingOptions(top_k=np.int32(3))}, {"options": SamplingOptions(top_k=3)}),
        ({"options": SamplingOptions(top_k=2**63)}, {"options": SamplingOptions()}),
        *[
            (
                {"options": SamplingOptions(repetition_penalty=2, repetition_window=10**20)},
                {"options": SamplingOptions(repetition_penalty=2, repetition_window=0)},
            )
        ],
    ],
)
def test_numpys_and_huge_numbers_are_taken_as_what_they_are(gru, given, plain):
    options = {"prompt": "a", "num_samples": 2, "length": 20, "seed": 1}
    assert gru.generate_batch(**options | given) == gru.generate_batch(**options | plain)


def test_states_and_ids_of_another_type_are_the_callers_mistake(gru):
    ids, state = np.array([[1]]), gru.zero_state(1)
    with pytest.raises(ValueError, match="state must be float32, not float64"):
        gru.step(ids, tuple(part.astype(np.float64) for part in state))
    with pytest.raises(ValueError, match="ids must be integers, not float64"):
        gru.step(ids + 0.7, state)


@pytest.mark.parametrize("num_samples", [10**7, 10**20, 0, 1.5])
def test_more_samples_than_memory_holds_are_refused(gru, num_samples):
    with pytest.raises(SamplingError, match="num_samples must be"):
        gru.generate_batch("a", num_samples, 2)
