"""charrnn.sampling: the distributions it draws from, the draws, and the loop that generates."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from charrnn.errors import SamplingError
from charrnn.sampling import SamplingOptions, draw, generate, penalised, probabilities

finite_logits = hnp.arrays(
    st.sampled_from([np.float32, np.float64]),
    hnp.array_shapes(min_dims=1, max_dims=3, max_side=12),
    elements=st.one_of(
        st.floats(-50, 50, width=32), st.sampled_from([0.0, 1.0, -1e30, 1e30]), st.integers(-3, 3).map(float)
    ),
)
options = st.builds(
    SamplingOptions,
    temperature=st.one_of(st.just(0.0), st.floats(5e-324, 1e300), st.floats(0.1, 10)),
    top_k=st.integers(0, 15),
    top_p=st.floats(0, 1, exclude_min=True),
)


def reference(row: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """The definition, a row at a time in plain Python."""
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    if temperature == 0:
        return np.array([float(i == order[0]) for i in range(len(row))])
    weight = [math.exp((row[i] - max(row)) / temperature) for i in range(len(row))]
    order = order[: top_k or len(order)]
    total, mass, kept = sum(weight[i] for i in order), 0.0, []
    for i in order:
        if kept and top_p < 1 and mass >= top_p * total:  # rounding lets the sum reach the total early
            break
        kept.append(i)
        mass += weight[i]
    return np.array([weight[i] / mass if i in kept else 0.0 for i in range(len(row))])


def test_temperature_one_is_the_softmax():
    logits = np.log([0.1, 0.2, 0.3, 0.4])
    np.testing.assert_allclose(probabilities(logits), [0.1, 0.2, 0.3, 0.4], rtol=1e-12)


def test_temperature_divides_the_logits():
    squares = np.array([0.01, 0.04, 0.09, 0.16])
    logits = np.log([0.1, 0.2, 0.3, 0.4])
    np.testing.assert_allclose(probabilities(logits, temperature=0.5), squares / squares.sum(), rtol=1e-12)


def test_temperature_zero_takes_the_likeliest_and_the_lowest_id_among_equals():
    np.testing.assert_array_equal(probabilities(np.array([1.0, 7.0, 7.0]), temperature=0), [0, 1, 0])


def test_top_k_keeps_k_and_renormalises():
    logits = np.log([0.1, 0.2, 0.3, 0.4])
    np.testing.assert_allclose(probabilities(logits, top_k=2), [0, 0, 3 / 7, 4 / 7], rtol=1e-12)


def test_top_k_cuts_ties_at_the_lower_id():
    np.testing.assert_allclose(probabilities(np.zeros(4), top_k=2), [0.5, 0.5, 0, 0])


@pytest.mark.parametrize("top_k", [0, 4, 5, 1000])
def test_top_k_of_none_or_of_the_vocabulary_or_more_keeps_all(top_k):
    logits = np.log([0.1, 0.2, 0.3, 0.4])
    np.testing.assert_array_equal(probabilities(logits, top_k=top_k), probabilities(logits))


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.01, [3]), (0.39, [3]), (0.41, [2, 3]), (0.69, [2, 3]), (0.71, [1, 2, 3]), (0.95, [0, 1, 2, 3])],
)
def test_top_p_keeps_the_fewest_likeliest_that_reach_the_mass(top_p, kept):
    assert np.flatnonzero(probabilities(np.log([0.1, 0.2, 0.3, 0.4]), top_p=top_p)).tolist() == kept


def test_top_p_that_is_reached_exactly_keeps_no_more():
    assert np.flatnonzero(probabilities(np.zeros(4), top_p=0.5)).tolist() == [0, 1]


def test_top_p_counts_the_mass_that_top_k_left():
    # Of what top_k = 2 leaves (3/7 and 4/7), 0.5 is reached by the likeliest alone; of the whole it would not be.
    assert np.flatnonzero(probabilities(np.log([0.1, 0.2, 0.3, 0.4]), top_k=2, top_p=0.5)).tolist() == [3]


def test_top_p_of_one_drops_nothing_however_small():
    p = probabilities(np.array([0.0, -60.0, -70.0]), top_k=2, top_p=1.0)
    assert p[1] > 0
    assert p[2] == 0


@given(finite_logits, options)
def test_probabilities_sum_to_one_and_are_never_nan(logits, o):
    p = probabilities(logits, o.temperature, o.top_k, o.top_p)
    assert p.shape == logits.shape
    assert p.dtype == np.float64
    assert (p >= 0).all()
    np.testing.assert_allclose(p.sum(axis=-1), 1, rtol=1e-12)


@given(finite_logits, options)
def test_the_support_is_a_prefix_of_the_ranking_no_longer_than_top_k(logits, o):
    p = probabilities(logits, o.temperature, o.top_k, o.top_p)
    for row, ps in zip(logits.reshape(-1, logits.shape[-1]), p.reshape(-1, logits.shape[-1]), strict=True):
        ranked = ps[np.argsort(-row.astype(np.float64), kind="stable")]
        kept = np.count_nonzero(ranked)
        assert ranked[:kept].all()
        assert 1 <= kept <= (o.top_k or len(row))
        assert (np.diff(ranked[:kept]) <= 0).all()


@given(
    hnp.arrays(np.float64, st.integers(1, 8), elements=st.integers(-6, 6).map(float)),
    st.sampled_from([0.0, 0.3, 0.7, 1.0, 2.5]),
    st.integers(0, 9),
    st.sampled_from([0.05, 0.33, 0.62, 0.87, 0.991, 1.0]),
)
def test_probabilities_equal_the_definition(row, temperature, top_k, top_p):
    ours = probabilities(row, temperature, top_k, top_p)
    np.testing.assert_allclose(ours, reference(row, temperature, top_k, top_p), rtol=1e-9, atol=0)


@given(finite_logits, options)
def test_a_row_does_not_depend_on_its_neighbours(logits, o):
    together = probabilities(logits, o.temperature, o.top_k, o.top_p).reshape(-1, logits.shape[-1])
    for row, p in zip(logits.reshape(-1, logits.shape[-1]), together, strict=True):
        np.testing.assert_array_equal(probabilities(row, o.temperature, o.top_k, o.top_p), p)


def test_a_masked_logit_has_no_probability():
    np.testing.assert_allclose(probabilities(np.array([0.0, -np.inf, 0.0])), [0.5, 0, 0.5])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(bad, temperature):
    with pytest.raises(SamplingError, match="not finite"):
        probabilities(np.array([0.0, bad, 1.0]), temperature)


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", v) for v in (-0.1, math.nan, math.inf)]
    + [("top_k", -1)]
    + [("top_p", v) for v in (0.0, -0.5, 1.0001, math.nan)],
)
def test_options_out_of_range_are_refused_with_the_value(field, value):
    with pytest.raises(SamplingError, match=f"{field} .*{value}".replace("+", r"\+")):
        SamplingOptions(**{field: value})


@given(
    hnp.arrays(np.float64, (3, 7), elements=st.sampled_from([0.0, 1e-12, 0.1, 1.0])).filter(lambda w: w.any(1).all()),
    st.lists(st.sampled_from([0.0, 0.25, 0.5, math.nextafter(1, 0)]), min_size=3, max_size=3),
)
def test_draw_never_takes_an_id_of_probability_zero(weights, uniforms):
    p = weights / weights.sum(axis=1, keepdims=True)
    ids = draw(p, np.array(uniforms))
    assert (p[np.arange(3), ids] > 0).all()


def test_draw_inverts_the_cumulative_distribution_in_id_order():
    p = np.tile([0.25, 0.0, 0.5, 0.25], (5, 1))
    assert draw(p, np.array([0.0, 0.24, 0.25, 0.74, 0.75])).tolist() == [0, 0, 2, 2, 3]


@pytest.mark.parametrize(
    "o", [SamplingOptions(), SamplingOptions(0.7), SamplingOptions(1.3, 4), SamplingOptions(1, 0, 0.8)]
)
def test_draws_follow_the_distribution_by_chi_square(o):
    rng = np.random.default_rng(20)
    p = probabilities(rng.normal(size=8), o.temperature, o.top_k, o.top_p)
    count = 40_000
    seen = np.bincount(draw(np.tile(p, (count, 1)), rng.random(count)), minlength=8)
    assert seen[p == 0].sum() == 0
    assert stats.chisquare(seen[p > 0], count * p[p > 0]).pvalue > 1e-3


def walk(ids, state):
    """A model whose logits depend on everything so far: state (B,) is a running hash of the ids."""
    state = (state * 31 + ids[:, 0] + 7) % 97
    return np.sin(state[:, None, None] * np.arange(1, 12)) * 2, state


def stream(seeds, length=60, o=SamplingOptions(0.9, 7, 0.95)):  # noqa: B008
    start = np.zeros((len(seeds), 11))
    return np.stack(list(generate(walk, np.zeros(len(seeds), np.int64), start, length, o, seeds)), axis=1)


def test_a_batch_draws_what_its_rows_draw_alone():
    seeds = [5, 0, 123456789012345]
    np.testing.assert_array_equal(stream(seeds), np.concatenate([stream([s]) for s in seeds]))


def test_the_same_seed_gives_the_same_ids_and_another_seed_others():
    np.testing.assert_array_equal(stream([3]), stream([3]))
    assert (stream([3]) != stream([4])).any()


def test_options_do_not_shift_the_stream_of_uniforms():
    """One uniform a character, whatever the options: a longer text begins with the shorter one."""
    np.testing.assert_array_equal(stream([9], 60)[:, :20], stream([9], 20))


def test_the_ids_are_the_draws_from_the_models_own_distributions():
    o, rng = SamplingOptions(0.9, 7, 0.95), np.random.default_rng(42)
    logits, state, expected = np.zeros((1, 11)), np.zeros(1, np.int64), []
    for _ in range(25):
        p = probabilities(logits, o.temperature, o.top_k, o.top_p)
        expected.append(int(draw(p, np.array([rng.random()]))[0]))
        stepped, state = walk(np.array([[expected[-1]]]), state)
        logits = stepped[:, 0]
    assert stream([42], 25)[0].tolist() == expected


def test_the_last_character_takes_no_further_step():
    calls = []

    def step(ids, state):
        calls.append(ids)
        return walk(ids, state)

    taken = generate(step, np.zeros(1, np.int64), np.zeros((1, 11)), 5, SamplingOptions(), [1])
    assert calls == []
    assert len(list(taken)) == 5
    assert len(calls) == 4


@pytest.mark.parametrize(("length", "seeds", "named"), [(-1, [0], "length"), (5, [3, -2], "seed")])
def test_a_bad_length_or_seed_is_refused_at_the_call(length, seeds, named):
    with pytest.raises(SamplingError, match=named):
        generate(walk, np.zeros(len(seeds)), np.zeros((len(seeds), 11)), length, SamplingOptions(), seeds)


@given(finite_logits, st.floats(0, 1))
def test_min_p_keeps_those_at_least_so_likely_as_that_share_of_the_likeliest(logits, min_p):
    whole, p = probabilities(logits), probabilities(logits, min_p=min_p)
    np.testing.assert_allclose(p.sum(axis=-1), 1, rtol=1e-12)
    likely = whole >= min_p * whole.max(axis=-1, keepdims=True)
    near = np.isclose(whole, min_p * whole.max(axis=-1, keepdims=True), rtol=1e-12)
    assert ((p > 0) == (likely & (whole > 0)))[~near].all()


def test_a_share_of_exactly_min_p_is_kept():
    np.testing.assert_array_equal(probabilities(np.array([0.0, -1.0, 0.0]), min_p=1.0), [0.5, 0, 0.5])


@given(finite_logits, st.floats(0, 1), st.floats(0, 1), options)
def test_a_larger_min_p_keeps_no_more(logits, one, other, o):
    few, many = (
        probabilities(logits, o.temperature, o.top_k, o.top_p, min_p=m) > 0 for m in (max(one, other), min(one, other))
    )
    assert (few <= many).all()


@given(finite_logits, st.integers(1, 15), st.integers(1, 15), options)
def test_a_larger_top_k_keeps_no_fewer(logits, one, other, o):
    few, many = (probabilities(logits, o.temperature, k, 1.0) > 0 for k in sorted((one, other)))
    assert (few <= many).all()
    assert (many <= (probabilities(logits, o.temperature) > 0)).all()


@given(finite_logits, st.floats(0, 1, exclude_min=True), st.floats(0, 1, exclude_min=True), options)
def test_a_larger_top_p_keeps_no_fewer(logits, one, other, o):
    few, many = (probabilities(logits, o.temperature, o.top_k, p) > 0 for p in sorted((one, other)))
    assert (few <= many).all()


@given(finite_logits, st.lists(st.one_of(st.just(0.0), st.floats(0.01, 100), st.floats(5e-324, 1e300)), min_size=2))
def test_a_higher_temperature_makes_the_likeliest_no_likelier_and_the_text_no_surer(logits, temperatures):
    cooler, warmer = (probabilities(logits, t) for t in (min(temperatures), max(temperatures)))
    assert (warmer.max(axis=-1) <= cooler.max(axis=-1) * (1 + 1e-12)).all()

    def entropy(p):
        return -(p * np.log(np.where(p > 0, p, 1))).sum(axis=-1)

    assert (entropy(warmer) >= entropy(cooler) - 1e-9).all()


row_with_seen = st.integers(2, 9).flatmap(
    lambda n: st.tuples(
        hnp.arrays(np.float64, n, elements=st.floats(-1e3, 1e3)),
        hnp.arrays(bool, n),
        st.floats(1, 10),
        st.floats(1, 10),
    )
)


@given(row_with_seen)
def test_a_higher_penalty_makes_what_was_seen_no_likelier_and_leaves_the_rest_in_order(case):
    logits, seen, one, other = case
    low, high = (penalised(logits, seen, p) for p in sorted((one, other)))
    assert (high[seen] <= low[seen]).all()
    np.testing.assert_array_equal(high[~seen], logits[~seen])
    shares = [probabilities(x)[seen].sum() for x in (logits, low, high)]
    assert shares[0] >= shares[1] - 1e-12 >= shares[2] - 2e-12


def test_a_penalty_of_one_changes_nothing():
    logits = np.array([-2.0, 0.0, 3.0])
    np.testing.assert_array_equal(penalised(logits, np.array([True] * 3), 1.0), logits)


def test_the_penalty_looks_back_on_its_window_and_on_the_prompt():
    favourite = np.array([[8.0, 7.0, 6.0, 5.0]])

    def written(window, prompt):
        options = SamplingOptions(0, repetition_penalty=100.0, repetition_window=window)
        step = lambda ids, state: (favourite[:, None], state)  # noqa: E731
        return [int(i[0]) for i in generate(step, None, favourite, 6, options, [0], np.array(prompt))]

    assert written(2, [3]) == [0, 1, 2, 0, 1, 2]
    assert written(0, [0, 1]) == [2, 3, 0, 0, 0, 0]  # all are penalised alike from then on
    assert written(1, [0]) == [1, 0, 1, 0, 1, 0]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"min_p": -0.1}, "min_p must lie between 0"),
        ({"min_p": 1.1}, "min_p must lie between 0"),
        ({"repetition_penalty": 0.9}, "repetition_penalty must be 1"),
        ({"repetition_penalty": math.nan}, "repetition_penalty must be 1"),
        ({"repetition_window": -1}, "repetition_window must be 0"),
    ],
)
def test_options_out_of_range_are_named(wrong, message):
    with pytest.raises(SamplingError, match=message):
        SamplingOptions(**wrong)
