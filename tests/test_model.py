"""CharRNN: shapes, state, and the equations behind them."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from charrnn.config import ModelConfig
from charrnn.model.rnn import CharRNN, WindowDropout, detach

CELLS = ("GRU", "LSTM")


def model_of(rnn, num_layers=2, dropout=0.0):
    torch.manual_seed(0)
    config = ModelConfig(rnn=rnn, embedding_dim=3, hidden_dim=5, num_layers=num_layers, dropout=dropout)
    return CharRNN(config, vocab_size=7)


@pytest.mark.parametrize("rnn", CELLS)
@pytest.mark.parametrize("num_layers", [1, 3])
def test_shapes_are_those_of_the_docstring(rnn, num_layers):
    model = model_of(rnn, num_layers)
    state = model.zero_state(4)
    assert len(state) == (1 if rnn == "GRU" else 2)
    assert all(part.shape == (num_layers, 4, 5) for part in state)
    logits, after = model(torch.randint(7, (4, 6)), state)
    assert logits.shape == (4, 6, 7)
    assert [part.shape for part in after] == [part.shape for part in state]


@pytest.mark.parametrize("rnn", CELLS)
def test_a_sequence_in_pieces_gives_the_logits_of_the_whole(rnn):
    model = model_of(rnn).eval()
    ids = torch.randint(7, (2, 9))
    whole, _ = model(ids, model.zero_state(2))
    state, pieces = model.zero_state(2), []
    for piece in ids.split([1, 5, 3], dim=1):
        logits, state = model(piece, state)
        pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole)


@pytest.mark.parametrize("rnn", CELLS)
def test_a_detached_state_lets_no_gradient_through(rnn):
    model = model_of(rnn)
    _, state = model(torch.randint(7, (2, 4)), model.zero_state(2))
    assert all(part.requires_grad for part in state)
    assert not any(part.requires_grad for part in detach(state))


@pytest.mark.parametrize("num_layers", [1, 2])
def test_dropout_acts_in_training_alone(num_layers, recwarn):
    model = model_of("GRU", num_layers, dropout=0.5)
    ids = torch.randint(7, (2, 4))
    first, second = (model(ids, model.zero_state(2))[0] for _ in range(2))
    assert not torch.equal(first, second)
    model.eval()
    first, second = (model(ids, model.zero_state(2))[0] for _ in range(2))
    assert torch.equal(first, second)
    assert not recwarn.list


@pytest.mark.parametrize(("rnn", "gates"), [("GRU", 3), ("LSTM", 4)])
def test_num_parameters_is_the_formula(rnn, gates):
    e, h, v = 3, 5, 7
    cells = gates * (h * e + h * h + 2 * h) + gates * (h * h + h * h + 2 * h)
    assert model_of(rnn).num_parameters() == v * e + cells + h * v + v


END = 3


def document_model(rnn, **fields):
    torch.manual_seed(0)
    config = ModelConfig(rnn=rnn, embedding_dim=3, hidden_dim=5, num_layers=2, **fields)
    return CharRNN(config, 7, END)


def documents(length, *rows):
    """(len(rows), length) ids without END but where each row says."""
    ids = torch.randint(4, 7, (len(rows), length), generator=torch.Generator().manual_seed(1))
    for row, ends in enumerate(rows):
        ids[row, list(ends)] = END
    return ids


@pytest.mark.parametrize("rnn", CELLS)
def test_after_a_documents_end_characters_are_predicted_from_a_zero_state(rnn):
    model = document_model(rnn)
    ids = documents(9, [4], [2, 3, 8], [], [0])
    state = tuple(torch.randn_like(part) for part in model.zero_state(4))
    logits, after = model(ids, state)
    model.document_end = None  # now the rows by hand, each piece by itself
    for row in range(4):
        ends = [i for i in range(9) if ids[row, i] == END]
        mine = tuple(part[:, [row]] for part in state)
        for start, stop in itertools.pairwise(sorted({0, *ends, 9})):
            mine = model.zero_state(1) if start in ends else mine
            expected, mine = model(ids[[row], start:stop], mine)
            torch.testing.assert_close(logits[[row], start:stop], expected)
        for ours, theirs in zip(mine, after, strict=True):
            torch.testing.assert_close(theirs[:, [row]], ours)


@pytest.mark.parametrize("rnn", CELLS)
def test_nothing_before_a_documents_end_reaches_what_follows_not_even_by_gradient(rnn):
    model = document_model(rnn)
    ids = documents(8, [5], [5])
    state = tuple(torch.randn_like(part).requires_grad_() for part in model.zero_state(2))
    logits, after = model(ids, state)
    (logits[:, 5:].sum() + sum(part.sum() for part in after)).backward()
    assert all(not part.grad.any() for part in state)
    changed = ids.clone()
    changed[:, :5] = 6
    again, _ = model(changed, model.zero_state(2))
    assert torch.equal(again[:, 5:], logits[:, 5:])


def test_a_window_without_a_documents_end_runs_as_one(monkeypatch):
    model = document_model("GRU")
    calls = []
    run = model._run
    monkeypatch.setattr(model, "_run", lambda x, *rest: calls.append(x.shape[1]) or run(x, *rest))
    model(documents(9, [], []), model.zero_state(2))
    assert calls == [9]
    model(documents(9, [0, 4], [4, 6]), model.zero_state(2))
    assert calls == [9, 4, 2, 3]


def test_one_mask_serves_all_characters_of_a_window_and_differs_between_rows():
    torch.manual_seed(0)
    mask = WindowDropout(0.5)(torch.ones(6, 9, 40))
    assert torch.equal(mask, mask[:, :1].expand_as(mask))
    assert not torch.equal(mask[0], mask[1])
    assert set(mask.unique().tolist()) == {0.0, 2.0}
    layer = WindowDropout(0.5).eval()
    assert torch.equal(layer(mask), mask)


@pytest.mark.parametrize("rnn", CELLS)
def test_reading_one_hot_symbols_is_reading_embeddings(rnn):
    torch.manual_seed(0)
    config = ModelConfig(rnn=rnn, embedding_dim=30, hidden_dim=5, num_layers=2)
    model = CharRNN(config, vocab_size=7).double()
    ids, targets = torch.randint(7, (2, 4, 9))
    state = tuple(torch.randn_like(part, dtype=torch.float64) for part in model.zero_state(4))
    x, matrix = model._read(ids)
    assert x.shape == (4, 9, 7)
    assert matrix.shape == (5 * (3 if rnn == "GRU" else 4), 7)
    logits = [model(ids, state)[0], model.head(model._run_rnn(model.embedding(ids), state)[0])]
    gradients = [
        torch.autograd.grad(F.cross_entropy(some.flatten(0, 1), targets.flatten()), list(model.parameters()))
        for some in logits
    ]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert model._read(ids[:1, :1])[0].shape == (1, 1, 30)  # of so few, the product would be more


@pytest.mark.parametrize("rnn", CELLS)
def test_layer_normalisation_is_that_of_its_definition(rnn):
    torch.manual_seed(0)
    config = ModelConfig(rnn=rnn, embedding_dim=3, hidden_dim=5, num_layers=1, layer_norm=True)
    model = CharRNN(config, vocab_size=7).eval()
    ids = torch.randint(7, (2, 4))
    hidden, _ = model.rnn(model.embedding(ids))  # (B, T, H)
    centred = hidden - hidden.mean(-1, keepdim=True)
    normalised = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    logits, after = model(ids, model.zero_state(2))
    torch.testing.assert_close(logits, model.head(normalised))  # gain 1, offset 0 at the start
    torch.testing.assert_close(after[0][0], hidden[:, -1])  # the state is what the cell gives, not normalised


@pytest.mark.parametrize("mask", ["character", "window"])
@pytest.mark.parametrize("rnn", CELLS)
def test_every_parameter_is_trained_with_every_kind_of_dropout(rnn, mask):
    config = ModelConfig(rnn=rnn, embedding_dim=8, hidden_dim=8, dropout=0.2, dropout_mask=mask, layer_norm=True)
    model = CharRNN(config, vocab_size=7)
    model(torch.randint(7, (4, 6)), model.zero_state(4))[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
