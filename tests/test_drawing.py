"""Engine.decode: the graph's loop gives the text of the numpy rules, for any run length, batch and mix of options."""

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
PRECISIONS = ("fp32", "int8")
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
def test_graph_loop_equals_numpy_sampling(engine, options):
    ours, theirs = (drawn(engine, options, (3, 4, 5), in_graph=in_graph) for in_graph in (True, False))
    assert ours.shape == (3, 150)
    np.testing.assert_array_equal(ours, theirs)


class Fixed:
    """A random stream of given uniforms, (N,)."""

    def __init__(self, uniforms):
        self._rest = iter(uniforms)

    def random(self, size):
        return np.array(list(itertools.islice(self._rest, size)))


def test_division_into_runs_does_not_matter(engine):
    prompt, options = CHARS.encode("ROMEO:"), [SamplingOptions(0.9)]
    texts, states = [], []
    for size in (1, 7, 96):
        state, last, pieces = engine.prefill(prompt[:-1])[1], prompt[-1:], []
        stream = np.random.default_rng(8)
        for start in range(0, 96, size):
            piece, state = engine.decode(last, state, min(size, 96 - start), options, [stream])
            last = piece[:, -1]
            pieces.append(piece)
        texts.append(np.concatenate(pieces, axis=1))
        states.append(state)
    for text, state in zip(texts[1:], states[1:], strict=True):
        np.testing.assert_array_equal(text, texts[0])
        for part, first in zip(state, states[0], strict=True):
            np.testing.assert_array_equal(part, first)  # bit for bit


def test_returned_state_is_before_the_last_character(engine):
    prompt = CHARS.encode("RO")
    state = engine.prefill(prompt[:-1])[1]
    ids, after = engine.decode(prompt[-1:], state, 5, [SamplingOptions()], [Fixed([0.3] * 5)])
    _, expected = engine.prefill(np.concatenate([prompt, ids[0, :-1]]))
    for part, other in zip(after, expected, strict=True):
        np.testing.assert_allclose(part, other, atol=1e-5 if engine.metadata["charrnn.precision"] == "fp32" else 0.05)


MIXED = [*CHOICES, SamplingOptions(0.8, top_k=3, repetition_penalty=1.3), SamplingOptions(1, top_p=0.6, min_p=0.2)]


@pytest.mark.parametrize("penalised", [True, False])
def test_rows_of_a_batch_decode_as_alone(engine, penalised):
    """int8: bit for bit. fp32: the same text; states may differ in their last bits, by the kernels of the processor."""
    options = MIXED if penalised else [row for row in MIXED if row.repetition_penalty == 1] * 9
    prompts = [CHARS.encode(text) for text in ("a", "ROMEO:", "the ", "x\ny", "to be", "or", "not", "O!")]
    starts = [(engine.prefill(prompt)[1], prompt[-1]) for prompt in prompts]

    def decode(rows):
        states, lasts = zip(*(starts[b % len(starts)] for b in rows), strict=True)
        state = tuple(np.concatenate(parts, axis=1) for parts in zip(*states, strict=True))
        streams = [np.random.default_rng(b) for b in rows]
        return engine.decode(np.array(lasts), state, 60, [options[b] for b in rows], streams)

    together, after = decode(range(len(options)))
    for b in range(len(options)):
        alone, alone_after = decode([b])
        np.testing.assert_array_equal(together[b], alone[0])
        exact = engine.metadata["charrnn.precision"] == "int8"
        for part, other in zip(after, alone_after, strict=True):
            np.testing.assert_allclose(part[:, b], other[:, 0], rtol=0, atol=0 if exact else 1e-5)
    backwards, _ = decode(range(len(options))[::-1])
    np.testing.assert_array_equal(backwards[::-1], together)


def test_threads_do_not_change_the_text(engine):
    two = Engine(engine.path, threads=2)
    for seeds in ((1,), range(16)):
        np.testing.assert_array_equal(
            drawn(engine, SamplingOptions(0.9), seeds), drawn(two, SamplingOptions(0.9), seeds)
        )


def test_onnxruntime_alone_runs_it_without_a_warning(engine, capfd):
    session = onnxruntime.InferenceSession(engine.path, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    states = [name for name in names if name in ("h", "c")]
    assert names == ["ids", *states, "uniforms", "temperature", "top_k", "top_p", "min_p"]
    feeds = {"ids": np.zeros((3, 4), np.int64), **dict(zip(states, engine.zero_state(3), strict=True))}
    logits, *after, ids = session.run(None, feeds)  # without the optional inputs a plain step
    assert (logits.shape, ids.shape) == ((3, 4, len(CHARS)), (3, 0))
    theirs, theirs_after = engine.step(feeds["ids"], engine.zero_state(3))
    for part, other in zip([logits, *after], [theirs, *theirs_after], strict=True):
        np.testing.assert_array_equal(part, other)
    options = {"temperature": np.ones(3), "top_k": np.array([9] * 3), "top_p": np.full(3, 0.5), "min_p": np.zeros(3)}
    (ids,) = session.run(["drawn"], feeds | {"uniforms": np.full((3, 9), 0.3)} | options)
    assert ids.shape == (3, 9)
    assert capfd.readouterr() == ("", "")


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
def test_graph_has_the_rules_of_charrnn_sampling(constant_engine, logits, options):
    engine = constant_engine(logits)
    shares = sampling.shares_of(logits[None], options)
    uniforms = np.linspace(0, 1, 101, endpoint=False)[None]  # (1, 101)
    ids, _ = engine.decode(np.zeros(1, int), engine.zero_state(1), 101, [options], [Fixed(uniforms[0])])
    line = shares[0].cumsum() / shares.sum()
    # A rounding apart from an end of a share both neighbours are right.
    clear = np.abs(uniforms[0][:, None] - line).min(axis=1) > 1e-9
    expected = sampling.draw(np.repeat(shares, 101, axis=0), uniforms[0])
    np.testing.assert_array_equal(ids[0][clear], expected[clear])
    assert (shares[0][ids[0]] > 0).all()


@pytest.mark.parametrize("temperature", [1e-199, 1e-300, 5e-324])
@pytest.mark.parametrize("rest", [{}, {"top_k": 3}, {"top_p": 0.5}], ids=str)
def test_tiny_temperature_is_argmax_of_huge_logits(constant_engine, temperature, rest):
    logits = np.array([-3e38, 1, 3e38, 2.9e38, 0, -1, 2], np.float32)
    engine = constant_engine(logits)
    uniforms = np.linspace(0, 1, 11, endpoint=False)[None]
    options = [SamplingOptions(temperature, **rest)]
    ids, _ = engine.decode(np.zeros(1, int), engine.zero_state(1), 11, options, [Fixed(uniforms[0])])
    assert set(ids[0]) == {2}


def test_nan_logits_are_refused_by_both_paths(tmp_path):
    weights = random_weights(run_config(), len(CHARS))
    weights["head.bias"][:] = np.nan
    engine = Engine(write_model(tmp_path / "nan.onnx", weights=weights))
    for in_graph in (True, False):
        with pytest.raises(SamplingError, match="not finite"):
            drawn(engine, SamplingOptions(), in_graph=in_graph)


def test_repetition_penalty_repeats_less(tmp_path):
    engine = Engine(write_model(tmp_path / "m.onnx"))
    options = SamplingOptions(0.3)
    plain = drawn(engine, options, length=400)[0]
    penalised = drawn(engine, replace(options, repetition_penalty=1.6, repetition_window=8), length=400)[0]

    def repeats(ids):
        return sum(ids[i] in ids[max(0, i - 8) : i] for i in range(len(ids)))

    assert repeats(penalised) < repeats(plain) / 2


def test_large_vocabulary_loop_equals_numpy_sampling(tmp_path):
    vocab = Vocab.of_chars(map(chr, range(0x4E00, 0x4E00 + 700)))
    for rnn, precision in itertools.product(CELLS, PRECISIONS):
        engine = Engine(write_model(tmp_path / "large.onnx", vocab, rnn=rnn, precision=precision))
        for options in CHOICES[2:4]:
            ours, theirs = (
                np.concatenate(list(engine.drawn(np.array([5]), 80, options, (1, 2), in_graph=in_graph)), axis=1)
                for in_graph in (True, False)
            )
            np.testing.assert_array_equal(ours, theirs)
