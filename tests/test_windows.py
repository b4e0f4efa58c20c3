"""The index arithmetic of training and evaluation batches."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from charrnn.errors import CorpusError
from charrnn.windows import (
    WindowPlan,
    largest_batch,
    permute,
    rank_slice,
    sampled_stream_batch,
    sampled_window_batches,
    split_bounds,
    stream_batch,
    window_batches,
)

MODES = ("sliding", "carry")


def plan(num_chars=1000, seq_len=16, batch_size=4, windows="sliding", stride=0, seed=1, segment=0):
    return WindowPlan(num_chars, seq_len, batch_size, windows, stride, seed, segment=segment)


def test_split_bounds_are_nanogpts_on_tinyshakespeare():
    assert split_bounds(1115394, (0.9, 0.1, 0.0)) == {
        "train": (0, 1003854),
        "val": (1003854, 1115394),
        "test": (1115394, 1115394),
    }


@given(n=st.integers(0, 10**7), train=st.floats(0.05, 1), share=st.floats(0, 1))
def test_splits_cover_the_corpus_without_overlap(n, train, share):
    bounds = split_bounds(n, (train, (1 - train) * share, (1 - train) * (1 - share)))
    assert bounds["train"][0] == 0
    assert bounds["train"][1] == bounds["val"][0] <= bounds["val"][1] == bounds["test"][0] <= bounds["test"][1] == n


@given(count=st.integers(1, 3000), seed=st.integers(0, 2**32))
@settings(max_examples=50)
def test_permute_is_a_bijection(count, seed):
    keys = np.random.default_rng(seed).integers(0, 2**63, 6).astype(np.uint64)
    assert sorted(permute(np.arange(count, dtype=np.uint64), count, keys).tolist()) == list(range(count))


def test_permute_depends_on_every_key_and_mixes_neighbours():
    keys = np.arange(1, 7, dtype=np.uint64)
    positions = np.arange(100_000, dtype=np.uint64)
    first = permute(positions, len(positions), keys)
    assert (permute(positions, len(positions), keys + np.uint64(1)) != first).mean() > 0.99
    # Neighbours of a random permutation lie a third of the range apart on average.
    gaps = np.abs(np.diff(first.astype(np.int64)))
    assert gaps.mean() == pytest.approx(len(positions) / 3, rel=0.02)


@pytest.mark.parametrize("windows", MODES)
@pytest.mark.parametrize("stride", [0, 1, 5])
def test_every_window_lies_inside_the_split(windows, stride):
    p = plan(windows=windows, stride=stride)
    for step in range(3 * p.steps_per_epoch):
        starts = p.batch(step).starts
        assert starts.shape == (4,)
        assert starts.min() >= 0
        assert starts.max() + p.seq_len + 1 <= p.num_chars


@pytest.mark.parametrize("windows", MODES)
def test_a_batch_is_a_function_of_seed_and_step_alone(windows):
    one, other = plan(windows=windows), plan(windows=windows)
    backwards = [other.batch(step).starts for step in reversed(range(40))][::-1]
    for step in range(40):
        np.testing.assert_array_equal(one.batch(step).starts, backwards[step])
    changed = plan(windows=windows, seed=2)
    assert any((changed.batch(s).starts != one.batch(s).starts).any() for s in range(40))


def test_sliding_windows_are_distinct_and_reshuffled():
    p = plan(num_chars=4000, stride=3)
    epochs = [
        np.concatenate([p.batch(e * p.steps_per_epoch + k).starts for k in range(p.steps_per_epoch)]) for e in (0, 1)
    ]
    for starts in epochs:
        assert len(set(starts.tolist())) == len(starts)
        assert len(set((starts % 3).tolist())) == 1
    assert (epochs[0] != epochs[1]).any()
    assert p.windows_per_epoch - len(epochs[0]) < p.batch_size


def test_carry_rows_continue_until_the_epoch_ends():
    p = plan(num_chars=5000, windows="carry")
    for step in range(1, 2 * p.steps_per_epoch):
        before, now = p.batch(step - 1), p.batch(step)
        assert (now.reset == (step % p.steps_per_epoch == 0)).all()
        if not now.reset.any():
            np.testing.assert_array_equal(now.starts, before.starts + p.seq_len)
    assert p.batch(0).reset.all()


def test_rows_reset_independently_with_probability_reset():
    p = WindowPlan(200_000, 16, 40, "carry", 0, seed=3, reset=0.1)
    fresh = np.stack([p.batch(k).reset for k in range(1, p.steps_per_epoch)])  # (windows, B)
    assert abs(fresh.mean() - 0.1) < 0.01
    assert fresh.any(0).all()
    assert 0 < fresh.any(1).mean() < 1
    assert (p.batch(7).reset == WindowPlan(200_000, 16, 40, "carry", 0, seed=3, reset=0.1).batch(7).reset).all()
    assert p.batch(0).reset.all()
    plain = plan(num_chars=5000, windows="carry")
    assert not any(plain.batch(k).reset.any() for k in range(1, plain.steps_per_epoch))


def test_carry_rows_do_not_overlap():
    p = plan(num_chars=5000, windows="carry")
    read = np.concatenate([p.batch(k).starts[:, None] + np.arange(p.seq_len) for k in range(p.steps_per_epoch)], axis=1)
    assert len(np.unique(read)) == read.size


@given(
    num_chars=st.integers(400, 3000), seq_len=st.integers(1, 40), rows=st.integers(1, 8), segment=st.integers(1, 300)
)
def test_segments_are_read_whole_from_a_zero_state_and_once_in_an_epoch(num_chars, seq_len, rows, segment):
    p = plan(num_chars, seq_len, rows, "carry", segment=segment)
    batches = [p.batch(k) for k in range(p.steps_per_epoch)]
    starts, reset = (np.stack([getattr(batch, name) for batch in batches]) for name in ("starts", "reset"))
    read = starts[..., None] + np.arange(seq_len)  # (windows, B, T)
    assert len(np.unique(read)) == read.size
    assert read.min() >= 0
    assert read.max() + 1 < num_chars  # the target of the last
    first = reset.any(1)  # (windows,)
    np.testing.assert_array_equal(reset, np.broadcast_to(first[:, None], reset.shape))
    np.testing.assert_array_equal(starts[1:][~first[1:]], starts[:-1][~first[1:]] + seq_len)
    length = len(batches) // first.sum()
    np.testing.assert_array_equal(first, np.arange(len(batches)) % length == 0)
    assert length * seq_len >= min(segment, num_chars // rows) - 2 * seq_len


def test_a_tenth_of_an_epoch_in_segments_is_of_all_the_text():
    p = plan(1_000_000, 50, 10, "carry", segment=1000)
    starts = np.concatenate([p.batch(k).starts for k in range(p.steps_per_epoch // 10)])
    in_each_tenth, _ = np.histogram(starts, 10, (0, 1_000_000))
    assert in_each_tenth.min() > 0.3 * in_each_tenth.mean()
    again = np.concatenate([p.batch(p.steps_per_epoch + k).starts for k in range(p.steps_per_epoch // 10)])
    assert len(np.intersect1d(starts // 1000, again // 1000)) < 30  # of 100: other ones in the next epoch


@pytest.mark.parametrize("windows", MODES)
def test_largest_batch_fits_and_the_next_is_refused(windows):
    most = largest_batch(1000, 16, windows, 0)
    assert plan(batch_size=most, windows=windows).steps_per_epoch == 1
    with pytest.raises(CorpusError, match=rf"data\.seq_len=16 --set data\.batch_size={most} would fit"):
        plan(batch_size=most + 1, windows=windows)


def test_a_hopelessly_short_text_is_refused():
    with pytest.raises(CorpusError, match="use a longer text"):
        plan(num_chars=5)


@given(rows=st.integers(0, 200), world=st.integers(1, 17))
def test_rank_slices_partition_the_rows_evenly(rows, world):
    slices = [rank_slice(rows, r, world) for r in range(world)]
    assert [i for s in slices for i in range(rows)[s]] == list(range(rows))
    sizes = [s.stop - s.start for s in slices]
    assert max(sizes) - min(sizes) <= 1


@given(n=st.integers(2, 5000), lanes=st.integers(1, 20), warmup=st.integers(0, 60))
def test_stream_predicts_every_character_but_the_first_once(n, lanes, warmup):
    batch = stream_batch(n, lanes, warmup)
    positions = (batch.starts[:, None] + np.arange(batch.length))[batch.counted]
    assert sorted(positions.tolist()) == list(range(n - 1))


def test_stream_rows_after_the_first_warm_up_uncounted():
    batch = stream_batch(10_000, 4, 100)
    assert len(batch.starts) == 4
    assert batch.counted[0].all()
    assert not batch.counted[1:, :100].any()
    assert batch.counted[1:, 100:-4].all()


@given(n=st.integers(2, 3000), window=st.integers(1, 300), rows=st.integers(1, 70))
def test_windows_predict_every_character_but_the_first_once(n, window, rows):
    positions = []
    for batch in window_batches(n, window, rows):
        assert batch.length <= window
        assert len(batch.starts) <= rows
        assert (batch.starts % window == 0).all()
        positions += (batch.starts[:, None] + np.arange(batch.length))[batch.counted].tolist()
    assert sorted(positions) == list(range(n - 1))


@given(st.integers(2, 5000), st.integers(1, 3000), st.integers(1, 32), st.integers(0, 300))
def test_sampled_stream_counts_the_sample_in_the_split(num_chars, sample, lanes, warmup):
    batch = sampled_stream_batch(num_chars, sample, lanes, warmup)
    places = batch.starts[:, None] + np.arange(batch.length)
    counted = places[batch.counted]
    assert counted.min() >= 0
    assert counted.max() < num_chars - 1
    if sample >= num_chars - 1:
        assert sorted(counted) == list(range(num_chars - 1))
    else:
        assert sample <= len(counted) or len(counted) == num_chars - 1
    if len(counted) < num_chars - 1:
        assert len(counted) < sample + lanes
        # Every segment but the first of the split is warmed up.
        first = batch.counted.argmax(1)
        assert all(f == warmup or s == 0 for f, s in zip(first, batch.starts, strict=True))


def test_a_sampled_stream_is_spread_over_the_split():
    batch = sampled_stream_batch(100_001, 1000, 10, 50)
    first = batch.starts + batch.counted.argmax(1)
    assert first[0] == 0
    assert first[-1] == 100_000 - 100
    assert np.ptp(np.diff(first)) <= 1


@given(st.integers(2, 5000), st.integers(1, 3000), st.integers(1, 64), st.integers(1, 16))
def test_sampled_windows_are_windows_of_the_split(num_chars, sample, window, rows):
    everything = {(int(s), b.length) for b in window_batches(num_chars, window, rows) for s in b.starts}
    batches = list(sampled_window_batches(num_chars, sample, window, rows))
    chosen = [(int(s), b.length) for b in batches for s in b.starts]
    assert len(set(chosen)) == len(chosen)
    assert set(chosen) <= everything
    assert sum(int(b.counted.sum()) for b in batches) >= min(sample, num_chars - 1)
