"""infer.engine: the network's numbers, and the text that is made of them."""

from collections import Counter

import numpy as np
import pytest
from tiny_models import CHARS, write_model

from charrnn.errors import SamplingError, VocabError
from charrnn.sampling import SamplingOptions, probabilities
from charrnn.vocab import Vocab
from infer import Engine

PROMPT = "ROMEO:\n"
GREEDY = SamplingOptions(0)


# The network, from torch's documented equations (torch.nn.GRU, torch.nn.LSTM), a character at a time.


def test_zero_state_has_a_part_a_cell_and_its_shape(engine):
    state = engine.zero_state(5)
    assert len(state) == {"GRU": 1, "LSTM": 2}[engine.config["model"]["rnn"]]
    assert all(part.shape == (2, 5, 24) and part.dtype == np.float32 and not part.any() for part in state)


def test_an_engine_is_a_key_and_prints_no_contents(gru):
    assert {gru: 1}[gru] == 1
    assert len(repr(gru)) < 100


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


def test_states_and_ids_of_another_type_are_the_callers_mistake(gru):
    ids, state = np.array([[1]]), gru.zero_state(1)
    with pytest.raises(ValueError, match="state must be float32, not float64"):
        gru.step(ids, tuple(part.astype(np.float64) for part in state))
    with pytest.raises(ValueError, match="ids must be integers, not float64"):
        gru.step(ids + 0.7, state)


def test_a_seed_repeats_the_text_and_greedy_needs_none(engine):
    first, again, other, new, newer = ("".join(engine.generate(PROMPT, 80, seed=s)) for s in (7, 7, 8, None, None))
    assert first == again
    assert len({first, other, new, newer}) == 4
    assert len(first) == 80
    assert "".join(engine.generate(PROMPT, 60, GREEDY)) == "".join(engine.generate(PROMPT, 60, GREEDY))


def test_text_is_drawn_from_the_models_own_distribution(gru):
    """Character by character: the text's next character is the one that its distribution and its uniform give."""
    text = "".join(gru.generate(PROMPT, 40, options=SamplingOptions(0.7, 9, 0.9), seed=11))
    rng = np.random.default_rng(11)
    for i, character in enumerate(text):
        logits, _ = gru.prefill(gru.vocab.encode(PROMPT + text[:i]))
        cumulative = probabilities(logits[0], 0.7, 9, 0.9).cumsum()
        assert gru.vocab.symbols[int(np.searchsorted(cumulative, rng.random(), side="right"))] == character


@pytest.mark.parametrize("stop", [None, "e"])
def test_a_batch_equals_its_single_streams(engine, stop):
    options = {"length": 70, "options": SamplingOptions(0.9, 12, 0.97), "stop": stop}
    batch = engine.generate_batch(PROMPT, 5, seed=3, **options)
    assert batch == ["".join(engine.generate(PROMPT, seed=3 + i, **options)) for i in range(5)]
    assert (len({len(text) for text in batch}) > 1) == (stop is not None)


def count_runs(engine, monkeypatch):
    steps, run = Counter(), engine._call
    monkeypatch.setattr(engine, "_call", lambda *a: (steps.update(["run"]), run(*a))[1])
    return steps


def test_a_batch_goes_no_further_than_its_last_stop_text(gru, monkeypatch):
    steps = count_runs(gru, monkeypatch)
    gru.generate_batch(PROMPT, 3, length=1_000_000, seed=0, stop="e")
    assert steps["run"] < 30


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


def test_the_text_ends_before_the_stop_text_if_it_comes(gru):
    whole = "".join(gru.generate(PROMPT, 300, seed=2))
    for stop in (*(whole[at : at + 3] for at in (0, 1, 5, 200)), whole + "a"):
        assert "".join(gru.generate(PROMPT, 300, seed=2, stop=stop)) == whole.split(stop)[0]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        *[({"length": value}, "length") for value in (-1, 2.5, None)],
        *[({"seed": value}, "seed") for value in (-1, 1.5, "x")],
        *[({"prompt": value}, "prompt") for value in (None, b"ab")],
        ({"stop": ""}, "stop text is empty"),
        ({"stop": "a€"}, "never be written: .*€"),
        ({"stop": 5}, "stop text must be a str"),
        ({"prompt": "€"}, "€"),
        ({"prompt": "€", "unknown": "replace"}, "no replacement"),
        ({"unknown": "drop"}, "unknown"),
        *[({"num_samples": value}, "num_samples must be") for value in (10**7, 10**20, 0, 1.5)],
    ],
)
def test_bad_arguments_are_refused_by_name_at_the_call(gru, options, named):
    if "num_samples" not in options:
        with pytest.raises((SamplingError, VocabError), match=named):
            gru.generate(**{"prompt": "a"} | options)
    with pytest.raises((SamplingError, VocabError), match=named):
        gru.generate_batch(**{"prompt": "a", "num_samples": 2} | options)


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ({"options": SamplingOptions(np.float32(0.5))}, {"options": SamplingOptions(0.5)}),
        ({"seed": np.uint8(255)}, {"seed": 255}),
        ({"options": SamplingOptions(top_k=np.int32(3))}, {"options": SamplingOptions(top_k=3)}),
        ({"options": SamplingOptions(top_k=2**63)}, {"options": SamplingOptions()}),
        (
            {"options": SamplingOptions(repetition_penalty=2, repetition_window=10**20)},
            {"options": SamplingOptions(repetition_penalty=2, repetition_window=0)},
        ),
    ],
)
def test_numpys_and_huge_numbers_are_taken_as_what_they_are(gru, given, plain):
    options = {"prompt": "a", "num_samples": 2, "length": 20, "seed": 1}
    assert gru.generate_batch(**options | given) == gru.generate_batch(**options | plain)
