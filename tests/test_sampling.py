"""charrnn.sampling: the distributions it draws from, the draws, and what the penalty looks back on."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from charrnn.errors import SamplingError
from charrnn.sampling import History, SamplingOptions, draw, penalised, probabilities, shares_of

finite_logits = hnp.arrays(
    st.sampled_from([np.float32, np.float64]),
    hnp.array_shapes(min_dims=1, max_dims=3, max_side=12),
    elements=st.one_of(
        st.floats(-50, 50, width=32), st.sampled_from([0.0, 1.0, -1e30, 1e30]), st.integers(-3, 3).map(float)
    ),
)
any_options = st.fixed_dictionaries(
    {
        "temperature": st.one_of(st.just(0.0), st.floats(5e-324, 1e300), st.floats(0.1, 10)),
        "top_k": st.integers(0, 15),
        "top_p": st.floats(0, 1, exclude_min=True),
        "min_p": st.floats(0, 1),
    }
)
TENTHS = np.log([0.1, 0.2, 0.3, 0.4])


def reference(row: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
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
    kept = [i for i in kept if weight[i] >= min_p]
    return np.array([weight[i] / sum(weight[k] for k in kept) if i in kept else 0.0 for i in range(len(row))])


@pytest.mark.parametrize(
    ("logits", "options", "expected"),
    [
        (TENTHS, {}, [0.1, 0.2, 0.3, 0.4]),
        (TENTHS, {"temperature": 0.5}, np.array([0.01, 0.04, 0.09, 0.16]) / 0.3),
        ([1.0, 7.0, 7.0], {"temperature": 0}, [0, 1, 0]),
        (TENTHS, {"top_k": 2}, [0, 0, 3 / 7, 4 / 7]),
        (np.zeros(4), {"top_k": 2}, [0.5, 0.5, 0, 0]),
        *[(TENTHS, {"top_k": k}, [0.1, 0.2, 0.3, 0.4]) for k in (4, 5, 1000)],
        *[(TENTHS, {"top_p": p}, [0, 0, 0, 1]) for p in (0.01, 0.39)],
        *[(TENTHS, {"top_p": p}, [0, 0, 3 / 7, 4 / 7]) for p in (0.41, 0.69)],
        (TENTHS, {"top_p": 0.71}, [0, 2 / 9, 3 / 9, 4 / 9]),
        (np.zeros(4), {"top_p": 0.5}, [0.5, 0.5, 0, 0]),
        # Of what top_k = 2 leaves (3/7 and 4/7), 0.5 is reached by the likeliest alone; of the whole it would not be.
        (TENTHS, {"top_k": 2, "top_p": 0.5}, [0, 0, 0, 1]),
        ([0.0, -60.0, -70.0], {"top_k": 2}, [1, math.exp(-60), 0]),
        ([0.0, -np.inf, 0.0], {}, [0.5, 0, 0.5]),
        ([0.0, -1.0, 0.0], {"min_p": 1.0}, [0.5, 0, 0.5]),
    ],
)
def test_probabilities_of_simple_cases(logits, options, expected):
    np.testing.assert_allclose(probabilities(np.array(logits), **options), expected, rtol=1e-12)


@given(finite_logits, any_options)
def test_each_row_is_a_distribution_over_its_likeliest_whatever_its_neighbours(logits, options):
    together = probabilities(logits, **options)
    assert (together.shape, together.dtype) == (logits.shape, np.float64)
    rows = logits.reshape(-1, logits.shape[-1])
    for row, p in zip(rows, together.reshape(rows.shape), strict=True):
        np.testing.assert_array_equal(probabilities(row, **options), p)
        assert p.sum() == pytest.approx(1, rel=1e-12)
        ranked = p[np.argsort(-row.astype(np.float64), kind="stable")]
        kept = np.count_nonzero(ranked)
        assert (ranked[:kept] > 0).all()
        assert 1 <= kept <= (options["top_k"] or len(row))
        assert (np.diff(ranked[:kept]) <= 0).all()


@given(
    hnp.arrays(np.float64, st.integers(1, 8), elements=st.integers(-6, 6).map(float)),
    st.tuples(
        st.sampled_from([0.0, 0.3, 0.7, 1.0, 2.5]),
        st.integers(0, 9),
        st.sampled_from([0.05, 0.33, 0.62, 0.87, 0.991, 1.0]),
        st.sampled_from([0.0, 0.011, 0.13, 0.77, 1.0]),
    ),
)
def test_probabilities_equal_the_definition(row, options):
    np.testing.assert_allclose(probabilities(row, *options), reference(row, *options), rtol=1e-9, atol=0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(bad, temperature):
    with pytest.raises(SamplingError, match="not finite"):
        probabilities(np.array([0.0, bad, 1.0]), temperature)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", (-0.1, math.nan, math.inf)),
        ("top_k", (-1,)),
        ("top_p", (0.0, -0.5, 1.0001, math.nan)),
        ("min_p", (-0.1, 1.1)),
        ("repetition_penalty", (0.9, math.nan)),
        ("repetition_window", (-1,)),
    ],
)
def test_options_out_of_range_are_refused_with_the_value(field, values):
    for value in values:
        with pytest.raises(SamplingError, match=f"{field} must .*{value}"):
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


row_with_seen = st.integers(2, 9).flatmap(
    lambda n: st.tuples(
        hnp.arrays(np.float64, n, elements=st.floats(-1e3, 1e3)),
        hnp.arrays(bool, n),
        st.lists(st.floats(1, 10), min_size=2, max_size=2).map(sorted),
    )
)


@given(row_with_seen)
def test_a_higher_penalty_makes_what_was_seen_no_likelier_and_leaves_the_rest(case):
    logits, seen, penalties = case
    low, high = (penalised(logits, seen, penalty) for penalty in penalties)
    assert (high[seen] <= low[seen]).all()
    np.testing.assert_array_equal(high[~seen], logits[~seen])
    np.testing.assert_array_equal(penalised(logits, seen, 1.0), logits)
    shares = [probabilities(x)[seen].sum() for x in (logits, low, high)]
    assert shares[0] >= shares[1] - 1e-12 >= shares[2] - 2e-12


def test_the_penalty_looks_back_on_its_window_and_on_the_prompt():
    favourite = np.array([[8.0, 7.0, 6.0, 5.0]])

    def written(window, prompt):
        options, found = SamplingOptions(0, repetition_penalty=100.0, repetition_window=window), []
        history = History([prompt], options)
        for _ in range(6):
            ids = draw(shares_of(history.penalise(favourite), options), np.zeros(1))
            history.add(ids)
            found.append(int(ids[0]))
        return found

    assert written(2, [3]) == [0, 1, 2, 0, 1, 2]
    assert written(0, [0, 1]) == [2, 3, 0, 0, 0, 0]  # all are penalised alike from then on
    assert written(1, [0]) == [1, 0, 1, 0, 1, 0]
