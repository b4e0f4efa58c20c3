"""The GRU for training on a CPU is nn.GRU: values, gradients, state in and out, names."""

import pytest
import torch
from torch import nn

from charrnn.config import ModelConfig
from charrnn.model import rnn as model_rnn
from charrnn.model.gru_cpu import gru_layer, is_faster_on_cpu
from charrnn.model.rnn import CharRNN, NextCharLoss

SIZES = [(1, 1, 2, 1, 1), (3, 5, 2, 4, 1), (2, 7, 6, 3, 3)]  # B, T, I, H, L


def run_gru(rnn, x, h):
    """rnn(x, h) by gru_layer."""
    x, last = x.transpose(0, 1), []
    for i, weights in enumerate(rnn.all_weights):
        x, after = gru_layer(x, h[i], weights)
        last.append(after)
    return x.transpose(0, 1), torch.stack(last)


def both(batch, steps, inputs, width, layers, dtype=torch.float64):
    """Outputs and every gradient, by nn.GRU and by run_gru."""
    torch.manual_seed(0)
    rnn = nn.GRU(inputs, width, layers, batch_first=True, dtype=dtype)
    x = torch.randn(batch, steps, inputs, dtype=dtype, requires_grad=True)
    h = torch.randn(layers, batch, width, dtype=dtype, requires_grad=True)
    weigh_out, weigh_h = torch.randn(batch, steps, width, dtype=dtype), torch.randn(layers, batch, width, dtype=dtype)
    results = []
    for run in (rnn, lambda x, h: run_gru(rnn, x, h)):
        out, after = run(x, h)
        loss = (out * weigh_out).sum() + (after * weigh_h).sum()
        results.append((out, after, *torch.autograd.grad(loss, [x, h, *rnn.parameters()])))
    return zip(*results, strict=True)


@pytest.mark.parametrize("cached", [1, 18, 2**17])  # one step at a time, a few and a rest, all at once
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_outputs_states_and_all_gradients_are_those_of_nn_gru(sizes, cached, monkeypatch):
    monkeypatch.setattr("charrnn.model.gru_cpu._CACHED", cached)
    for theirs, ours in both(*sizes):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_under_autocast_states_stay_in_fp32_and_gradients_are_no_further_from_fp32_than_nn_gru():
    torch.manual_seed(0)
    rnn = nn.GRU(16, 24, 2, batch_first=True)
    x, h = torch.randn(4, 32, 16), torch.zeros(2, 4, 24)

    def gradients(run, enabled):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out, _ = run(x, h)
        return out.dtype, torch.autograd.grad(out.float().square().sum(), list(rnn.parameters()))

    _, exact = gradients(rnn, False)
    kind, theirs = gradients(rnn, True)
    ours_kind, ours = gradients(lambda x, h: run_gru(rnn, x, h), True)
    assert ours_kind == kind == torch.float32
    assert all(gradient.dtype == torch.float32 for gradient in ours)

    def distance(gradients):
        return sum((a - b).square().sum() for a, b in zip(gradients, exact, strict=True))

    assert distance(ours) <= 1.1 * distance(theirs)


def test_dropout_falls_between_layers_only_and_in_training_only():
    torch.manual_seed(0)
    model = CharRNN(ModelConfig(embedding_dim=3, hidden_dim=64, dropout=0.5), 11)
    x, state = torch.randn(2, 9, 3), model.zero_state(2)
    (first, (h,)), (second, (other,)) = (model._run(x, model.rnn.weight_ih_l0, state) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(h[0], other[0])
    assert (first != 0).all()
    model.eval()
    torch.testing.assert_close(model._run(x, model.rnn.weight_ih_l0, state)[0], model.rnn(x, *state)[0])


def test_the_model_trains_with_it_and_evaluates_without(monkeypatch):
    model = CharRNN(ModelConfig(embedding_dim=4, hidden_dim=8), 11)
    window = torch.randint(0, 11, (2, 6))
    used = []
    monkeypatch.setattr(model_rnn, "gru_layer", lambda *args: used.append(args) or gru_layer(*args))
    loss, _ = NextCharLoss(model)(window, model.zero_state(2))
    assert len(used) == 2
    with torch.no_grad():
        plain, _ = NextCharLoss(model)(window, model.zero_state(2))
    assert len(used) == 2
    torch.testing.assert_close(loss, plain)


def test_other_devices_and_single_steps_are_left_to_torch():
    assert is_faster_on_cpu(torch.zeros(2, 3, 4))
    assert not is_faster_on_cpu(torch.zeros(2, 1, 4))
    assert not is_faster_on_cpu(torch.zeros(2, 3, 4, device="meta"))
