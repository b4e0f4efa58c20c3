"""The loop in a model file: the text that the stepped path writes, by the same rules, for any run length and batch."""

import itertools
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tiny_models import CHARS, model_bytes, random_weights, run_config, write_model

from charrnn import sampling
from charrnn.errors import SamplingError
from charrnn.sampling import SamplingOptions
from charrnn.vocab import Vocab
from infer.engine import Engine

CELLS = ("GRU", "LSTM")
PRECISIONS = ("fp32", "int8", "int4")
CHOICES = [
    SamplingOptions(),
    SamplingOptions(temperature=0),
    SamplingOptions(temperature=0.7, top_k=5),
    SamplingOptions(temperature=1.3, top_p=0.8),
    SamplingOptions(temperature=0.9, min_p=0.1),
    SamplingOptions(temperature=1.1, top_k=12, top_p=0.9, min_p=0.02),
]
LETTERS = 7


@pytest.fixture(scope="module", params=list(itertools.product(CELLS, PRECISIONS, ("plain", "normed"))), ids="-".join)
def engine(request, tmp_path_factory):
    rnn, precision, kind = request.param
    path = tmp_path_factory.mktemp("drawing") / "m.onnx"
    return Engine(write_model(path, rnn=rnn, precision=precision, hidden_dim=40, layer_norm=kind == "normed"))


def drawn(engine, options, seeds=(3,), length=150, **kwargs):
    prompt = CHARS.encode("ROMEO:")
    return np.concatenate(list(engine.drawn(prompt, length, options, seeds, **kwargs)), axis=1)


@pytest.mark.parametrize("options", CHOICES, ids=str)
def test_the_loop_draws_what_the_stepped_path_draws(engine, options):
    assert engine.draws
    ours, theirs = (drawn(engine, options, (3, 4, 5), stepped=stepped) for stepped in (False, True))
    assert ours.shape == (3, 150)
    np.testing.assert_array_equal(ours, theirs)


def test_how_a_text_is_cut_into_runs_does_not_matter(engine):
    prompt, seed, options = CHARS.encode("ROMEO:"), 8, SamplingOptions(0.9)
    uniforms = np.random.default_rng(seed).random((1, 96))
    texts, states = [], []
    for size in (1, 7, 96):
        state, ids, pieces = engine.prefill(prompt[:-1])[1], np.array([[prompt[-1]]], np.int64), []
        for start in range(0, 96, size):
            piece, state = engine.draw(ids, state, uniforms[:, start : start + size], options)
            ids = piece[:, -1:]
            pieces.append(piece)
        texts.append(np.concatenate(pieces, axis=1))
        states.append(state)
    for text, state in zip(texts[1:], states[1:], strict=True):
        np.testing.assert_array_equal(text, texts[0])
        for part, first in zip(state, states[0], strict=True):
            np.testing.assert_array_equal(part, first)  # bit for bit


def test_the_state_returned_is_the_one_before_the_last_character(engine):
    prompt = CHARS.encode("RO")
    state = engine.prefill(prompt[:-1])[1]
    ids, after = engine.draw(prompt[None, -1:].astype(np.int64), state, np.full((1, 5), 0.3), SamplingOptions())
    _, expected = engine.prefill(np.concatenate([prompt, ids[0, :-1]]))
    for part, other in zip(after, expected, strict=True):
        np.testing.assert_allclose(part, other, atol=1e-5 if engine.metadata["charrnn.precision"] == "fp32" else 0.05)


def test_a_batch_writes_what_its_rows_write_alone(engine):
    together = drawn(engine, SamplingOptions(0.9), range(5, 13))
    alone = [drawn(engine, SamplingOptions(0.9), [seed])[0] for seed in range(5, 13)]
    np.testing.assert_array_equal(together, alone)


def test_the_number_of_threads_does_not_change_the_text(engine):
    two = Engine(engine.path, threads=2)
    for seeds in ((1,), range(16)):
        np.testing.assert_array_equal(
            drawn(engine, SamplingOptions(0.9), seeds), drawn(two, SamplingOptions(0.9), seeds)
        )


def test_one_call_without_uniforms_is_a_plain_step(engine):
    session = onnxruntime.InferenceSession(engine.path, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    assert names == ["ids", "h", "c"][: len(names)]
    state = dict(zip(names[1:], engine.zero_state(3), strict=True))
    logits, *after, ids = session.run(None, {"ids": np.zeros((3, 4), np.int64), **state})
    assert (logits.shape, ids.shape) == ((3, 4, len(CHARS)), (3, 0))
    theirs, theirs_after = engine.step(np.zeros((3, 4), np.int64), engine.zero_state(3))
    for part, other in zip([logits, *after], [theirs, *theirs_after], strict=True):
        np.testing.assert_array_equal(part, other)


@pytest.fixture(scope="module")
def constant_engine(tmp_path_factory):
    """logits -> an engine whose logits are always these, (LETTERS,)."""
    folder, vocab = tmp_path_factory.mktemp("constant"), Vocab.of_chars("abcdefg")
    config = run_config(num_layers=1, hidden_dim=2, embedding_dim=1)

    def make(logits):
        weights = {name: np.zeros_like(w) for name, w in random_weights(config, LETTERS).items()}
        weights["head.bias"] = np.asarray(logits, np.float32)
        path = folder / "m.onnx"
        path.write_bytes(model_bytes(vocab, weights, num_layers=1, hidden_dim=2, embedding_dim=1))
        return Engine(path)

    return make


logits_of_a_row = hnp.arrays(
    np.float32,
    LETTERS,
    elements=st.one_of(
        st.floats(-40, 40, width=32),
        st.integers(-2, 2).map(float),
        st.sampled_from([float(np.float32(x)) for x in (-1e30, 1e30, -3e38, 3e38)]),
    ),
)
any_options = st.builds(
    SamplingOptions,
    temperature=st.one_of(st.just(0.0), st.floats(1e-6, 1e6), st.floats(0.1, 3)),
    top_k=st.integers(0, LETTERS + 2),
    top_p=st.one_of(st.just(1.0), st.floats(0.001, 1)),
    min_p=st.one_of(st.just(0.0), st.floats(0, 1)),
)


@settings(max_examples=150)
@given(logits=logits_of_a_row, options=any_options)
def test_the_graph_has_the_rules_of_charrnn_sampling(constant_engine, logits, options):
    engine = constant_engine(logits)
    shares = sampling.shares_of(logits[None], options)
    uniforms = np.linspace(0, 1, 101, endpoint=False)[None]  # (1, 101)
    state = engine.zero_state(1)
    ids, _ = engine.draw(np.zeros((1, 1), np.int64), state, uniforms, options)
    line = shares[0].cumsum() / shares.sum()
    # A rounding apart from an end of a share both neighbours are right.
    clear = np.abs(uniforms[0][:, None] - line).min(axis=1) > 1e-9
    expected = sampling.draw(np.repeat(shares, 101, axis=0), uniforms[0])
    np.testing.assert_array_equal(ids[0][clear], expected[clear])
    assert (shares[0][ids[0]] > 0).all()


@pytest.mark.parametrize("temperature", [1e-199, 1e-300, 5e-324])
@pytest.mark.parametrize("rest", [{}, {"top_k": 3}, {"top_p": 0.5}], ids=str)
def test_the_tiniest_temperature_takes_the_likeliest_however_large_logits_are(constant_engine, temperature, rest):
    logits = np.array([-3e38, 1, 3e38, 2.9e38, 0, -1, 2], np.float32)
    engine = constant_engine(logits)
    uniforms = np.linspace(0, 1, 11, endpoint=False)[None]
    ids, _ = engine.draw(
        np.zeros((1, 1), np.int64), engine.zero_state(1), uniforms, SamplingOptions(temperature, **rest)
    )
    assert set(ids[0]) == {2}


def test_a_model_that_gives_nan_is_refused_by_both_paths(tmp_path):
    weights = random_weights(run_config(), len(CHARS))
    weights["head.bias"][:] = np.nan
    engine = Engine(write_model(tmp_path / "nan.onnx", weights=weights))
    for stepped in (False, True):
        with pytest.raises(SamplingError, match="not finite"):
            drawn(engine, SamplingOptions(), stepped=stepped)


def test_a_repetition_penalty_is_drawn_by_steps_and_repeats_less(tmp_path):
    engine = Engine(write_model(tmp_path / "m.onnx"))
    options = SamplingOptions(0.3)
    plain = drawn(engine, options, length=400)[0]
    penalised = drawn(engine, replace(options, repetition_penalty=1.6, repetition_window=8), length=400)[0]

    def repeats(ids):
        return sum(ids[i] in ids[max(0, i - 8) : i] for i in range(len(ids)))

    assert repeats(penalised) < repeats(plain) / 2


def test_a_prompt_read_in_one_call_and_character_by_character_gives_the_same_text(engine):
    prompt = CHARS.encode("ROMEO: am i there")
    state = engine.zero_state(1)
    for i in prompt:
        logits, state = engine.step(np.array([[i]]), state)
    whole, whole_state = engine.prefill(prompt)
    exact = engine.metadata["charrnn.precision"] == "fp32"
    np.testing.assert_allclose(whole, logits[:, -1], atol=1e-4 if exact else 0.2)
    for part, other in zip(whole_state, state, strict=True):
        np.testing.assert_allclose(part, other, atol=1e-5 if exact else 0.05)


def test_a_large_vocabulary_keeps_its_embedding_and_draws_alike(tmp_path):
    vocab = Vocab.of_chars(map(chr, range(0x4E00, 0x4E00 + 700)))
    for rnn, precision in itertools.product(CELLS, PRECISIONS):
        engine = Engine(write_model(tmp_path / "large.onnx", vocab, rnn=rnn, precision=precision))
        for options in CHOICES[2:4]:
            ours, theirs = (
                np.concatenate(list(engine.drawn(np.array([5]), 80, options, (1, 2), stepped=stepped)), axis=1)
                for stepped in (False, True)
            )
            np.testing.assert_array_equal(ours, theirs)
