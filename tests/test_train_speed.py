"""The plain loop that the trainer is compared with does the same work, and trains."""

import itertools

import pytest
import torch

from benchmarks.speed.reference_loop import Network, SlidingWindows, losses
from charrnn.config import ModelConfig
from charrnn.model.rnn import CharRNN


@pytest.mark.parametrize("rnn", ["GRU", "LSTM"])
def test_the_reference_computes_the_models_logits(rnn):
    config = ModelConfig(rnn=rnn, embedding_dim=6, hidden_dim=9)
    model, reference = CharRNN(config, 11), Network(config, 11)
    reference.load_state_dict(model.state_dict())
    ids = torch.randint(0, 11, (3, 5))
    torch.testing.assert_close(reference(ids), model(ids, model.zero_state(3))[0])


def test_targets_are_inputs_shifted_by_one_character():
    windows = SlidingWindows(torch.arange(10), 4)
    assert len(windows) == 6
    assert [part.tolist() for part in windows[5]] == [[5, 6, 7, 8], [6, 7, 8, 9]]


def test_the_reference_learns():
    torch.manual_seed(0)
    text = torch.arange(200) % 5
    config = ModelConfig(embedding_dim=8, hidden_dim=16, num_layers=1)
    curve = list(itertools.islice(losses(config, text, 5, 16, 8), 60))
    assert curve[-1] < curve[0] / 2
