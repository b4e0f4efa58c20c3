"""CharRNN: shapes, state, and the equations behind them."""

import pytest
import torch

from charrnn.config import ModelConfig
from charrnn.model import CharRNN, detach

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


@pytest.mark.parametrize("rnn", CELLS)
def test_the_state_is_no_buffer_of_the_module(rnn):
    assert not list(model_of(rnn).buffers())
