"""The n-gram baseline, compared with a plain implementation and with texts of known loss."""

import math
import random
from collections import defaultdict

import numpy as np
import pytest
from training import some_text

from charrnn.data.stats import ngram_loss

DISCOUNT = 0.85


def ids_of(text):
    symbols = sorted(set(text))
    return np.array([symbols.index(c) for c in text], np.uint8), len(symbols)


def plain_loss(train, val, symbols, order):
    """Interpolated Kneser-Ney as the textbook writes it, one character at a time."""
    counts = {k: defaultdict(lambda: defaultdict(int)) for k in range(1, order + 1)}
    for i in range(len(train) - order + 1):
        counts[order][tuple(train[i : i + order - 1])][train[i + order - 1]] += 1
    for k in range(1, order):
        preceded = {tuple(train[i : i + k + 1]) for i in range(len(train) - k)}
        for gram in preceded:
            counts[k][gram[1:-1]][gram[-1]] += 1

    def probability(context, symbol, k):
        if k == 0:
            return 1 / symbols
        lower = probability(context[1:], symbol, k - 1)
        followers = counts[k].get(context)
        if not followers:
            return lower
        total = sum(followers.values())
        own = max(followers.get(symbol, 0) - DISCOUNT, 0)
        return (own + DISCOUNT * len(followers) * lower) / total

    everything = [*train, *val]
    losses = []
    for i in range(len(train), len(everything)):
        losses.append(-math.log(probability(tuple(everything[i - order + 1 : i]), everything[i], order)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("order", [1, 2, 3, 6])
def test_it_is_the_textbooks_kneser_ney(order):
    ids, symbols = ids_of(some_text(2000))
    train, val = ids[:1600], ids[1600:]
    assert ngram_loss(train, val, symbols, order) == pytest.approx(
        plain_loss(train.tolist(), val.tolist(), symbols, order), abs=1e-9
    )


def test_a_character_never_seen_has_a_finite_loss():
    assert math.isfinite(ngram_loss(np.zeros(50, np.uint8), np.ones(5, np.uint8), 2))


def test_noise_costs_log_v_and_repetition_nothing():
    noise = np.array(random.Random(0).choices(range(16), k=40_000), np.uint8)
    assert ngram_loss(noise[:36_000], noise[36_000:], 16, order=2) == pytest.approx(math.log(16), rel=0.01)
    cycle = np.resize(np.arange(7, dtype=np.uint8), 7000)
    assert ngram_loss(cycle[:6300], cycle[6300:], 7) < 0.01


def test_a_large_alphabet_gets_the_orders_that_fit_a_key():
    ids = np.array(random.Random(0).choices(range(100_000), k=2000), np.uint32)
    assert math.isfinite(ngram_loss(ids[:1800], ids[1800:], 100_000))
