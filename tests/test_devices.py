"""What an accelerator changes, as far as a CPU can show it: placement on torch's meta device, and cuDNN's rules."""

import contextlib
import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from training import make_trainer, tiny_config

import train.loop.dataloader as dataloader
from charrnn.config import EvalConfig, ModelConfig, RunConfig
from charrnn.errors import CorpusError, TrainingError
from charrnn.model.rnn import CharRNN
from train.checkpoint.format import Checkpoint
from train.checkpoint.rng import restore_rank_rng
from train.loop.dataloader import IdSource
from train.loop.errors import MOST_SKIPPED
from train.loop.evaluation import evaluate, full_fp32
from train.loop.metrics import Metrics
from train.summary import text_lines
from train.tracking.console import format_share

META = torch.device("meta")
CPU = torch.device("cpu")
KINDS = [np.uint8, np.uint16, np.uint32]


def some_ids(kind, count=5000):
    return np.random.default_rng(0).integers(0, min(np.iinfo(kind).max, 1 << 20), count, endpoint=True).astype(kind)


@pytest.mark.parametrize("with_table", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_on_a_device_are_those_of_the_host(kind, with_table, monkeypatch):
    monkeypatch.setattr(dataloader, "_COPIED_AT_ONCE", 999)
    ids = some_ids(kind)
    table = np.random.default_rng(1).permutation(int(ids.max()) + 1) if with_table else None
    host, device = IdSource(ids, CPU, table), IdSource(ids, CPU, table)
    device._ids = device._copied(dataloader._narrowest(ids.dtype, table))
    assert device._ids.element_size() == ids.itemsize
    starts = np.array([0, 17, len(ids) - 5])
    window = device.windows(starts, 9)
    assert window.dtype == torch.int64
    assert torch.equal(window, host.windows(starts, 9))
    assert torch.equal(device.gather(torch.from_numpy(starts), 9), window)


def test_a_damaged_id_is_found_on_the_way_to_the_device():
    ids = some_ids(np.uint16)
    with pytest.raises(CorpusError, match="is damaged"):
        IdSource(ids, META, num_symbols=int(ids.max()))


@pytest.mark.parametrize(("free", "fits"), [(20_001, True), (20_000, True), (19_999, False)])
def test_ids_take_at_most_half_of_the_free_memory(free, fits, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1 << 40))
    assert dataloader._fits(10_000, torch.device("cuda")) == fits


def test_ids_that_do_not_fit_are_read_from_the_host_and_the_run_says_so(tmp_path, monkeypatch):
    data = make_trainer(tiny_config(tmp_path)).data
    resident = IdSource(data.corpus.train, META)
    monkeypatch.setattr(dataloader, "_fits", lambda *_: False)
    source = IdSource(data.corpus.train, META)
    assert (resident.is_resident, source.is_resident) == (True, False)
    assert source.windows(np.array([3, 4]), 7).device == META
    lines = ["\n".join(text_lines(replace(data, train=ids), ())) for ids in (data.train, resident, source)]
    assert ["half of the GPU's free memory" in line for line in lines] == [False, False, True]


FORMS = [
    {"rnn": rnn, "num_layers": layers, **more}
    for rnn, layers, more in itertools.product(
        ("GRU", "LSTM"),
        (1, 2),
        ({}, {"dropout": 0.3}, {"dropout": 0.3, "dropout_mask": "window"}, {"layer_norm": True}),
    )
]


@pytest.mark.parametrize(
    ("fields", "device_type", "training", "expected"),
    [
        ({"num_layers": 2}, "cuda", True, False),
        ({"num_layers": 1, "dropout": 0.3}, "cuda", True, False),
        ({"num_layers": 2, "dropout": 0.3}, "cuda", True, True),
        ({"num_layers": 2, "dropout": 0.3}, "cuda", False, True),
        ({"num_layers": 2, "dropout": 0.3}, "cpu", True, False),
        ({"num_layers": 2, "dropout": 0.3, "dropout_mask": "window"}, "cpu", True, True),
        ({"num_layers": 2, "dropout": 0.3, "dropout_mask": "window"}, "cpu", False, False),
        ({"num_layers": 1, "layer_norm": True}, "cpu", False, True),
    ],
)
def test_layers_run_one_by_one_where_something_lies_between(fields, device_type, training, expected):
    model = CharRNN(ModelConfig(embedding_dim=4, hidden_dim=4, **fields), 5)
    assert model.runs_layer_by_layer(device_type, training=training) == expected


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_cudnn_keeps_what_a_backward_pass_needs_wherever_there_may_be_one(form, monkeypatch):
    model = CharRNN(ModelConfig(embedding_dim=4, hidden_dim=4, **form), 5)
    kept = []
    for name in ("gru", "lstm"):
        original = getattr(torch, name)
        monkeypatch.setattr(
            torch, name, lambda *args, original=original: kept.append((args[6], args[5])) or original(*args)
        )
    monkeypatch.setattr("charrnn.model.rnn.is_faster_on_cpu", lambda x: False)  # as on a GPU
    ids = torch.zeros(2, 3, dtype=torch.long)
    for training, grad, expected in ((True, True, True), (False, True, True), (False, False, False)):
        kept.clear()
        model.train(training)
        with torch.set_grad_enabled(grad):
            model(ids, model.zero_state(2))
        assert {train for train, _ in kept} == {expected}
        assert training or {dropout for _, dropout in kept} == {0.0}


def flattened(form, monkeypatch):
    """How cuDNN is asked to lay weights out: layers of each call, and calls of torch's own method."""
    model = CharRNN(ModelConfig(embedding_dim=4, hidden_dim=8, **form), 5)
    calls, whole = [], []
    monkeypatch.setattr(torch.backends.cudnn, "is_acceptable", lambda tensor: True)
    monkeypatch.setattr(torch.backends.cudnn.rnn, "get_cudnn_mode", lambda name: 2)
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: contextlib.nullcontext())
    monkeypatch.setattr(torch, "_cudnn_rnn_flatten_weight", lambda *args: calls.append(args), raising=False)
    monkeypatch.setattr(model.rnn, "flatten_parameters", lambda: whole.append(1))
    model.flatten_parameters()
    shapes = [[tuple(w.shape) for w in weights] for weights, *_ in calls]
    return shapes, [rest[1] for _, *rest in calls], len(whole)


def test_weights_lie_in_one_block_or_in_one_a_layer(monkeypatch):
    assert flattened({"num_layers": 2}, monkeypatch) == ([], [], 1)
    shapes, widths, whole = flattened({"rnn": "LSTM", "num_layers": 2, "dropout": 0.3}, monkeypatch)
    assert shapes == [[(32, 4), (32, 8), (32,), (32,)], [(32, 8), (32, 8), (32,), (32,)]]
    assert (widths, whole) == ([4, 8], 0)


def test_moved_weights_are_laid_out_again(monkeypatch):
    model, calls = CharRNN(ModelConfig(embedding_dim=4, hidden_dim=8), 5), []
    monkeypatch.setattr(CharRNN, "flatten_parameters", lambda moved: calls.append(moved))
    assert model.to(torch.float64) is model
    assert calls == [model]


def test_evaluation_switches_tf32_off_and_on_again():
    rnn = torch.backends.cudnn.rnn
    before = rnn.fp32_precision
    with full_fp32():
        assert rnn.fp32_precision == "ieee"
    assert rnn.fp32_precision == before


@pytest.mark.parametrize("here", [True, False])
def test_an_evaluation_out_of_memory_on_one_rank_ends_all_of_them(here):
    """here: whether this rank has run out, or another."""

    def run_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    model = CharRNN(ModelConfig(embedding_dim=4, hidden_dim=4), 300)
    other = torch.tensor([1.0, 1.0, 0.0, float(not here)], dtype=torch.float64)
    accelerator = SimpleNamespace(
        process_index=0, num_processes=2, device=CPU, reduce=lambda totals, how: totals + other
    )
    if here:
        model.forward = run_out
    reason = "tried to allocate 2.00 GiB" if here else "on another process"
    with pytest.raises(TrainingError, match=rf"evaluation \({reason}\); lower eval\.batch_rows \(now 64\)"):
        evaluate(model, IdSource(some_ids(np.uint8), CPU), EvalConfig(), accelerator)


def test_what_does_not_fit_before_the_loop_is_one_line(tmp_path, monkeypatch):
    def run_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")

    monkeypatch.setattr(CharRNN, "to", run_out)
    with pytest.raises(TrainingError, match=r"tried to allocate 3\.00 GiB.*model\.hidden_dim \(now 16\)"):
        make_trainer(tiny_config(tmp_path))


def scaled_figures(norms, run_dir="run"):
    """Figures of steps under a loss scaler, with these gradient norms."""
    figures = Metrics(SimpleNamespace(num_processes=1, scaler=object()), run_dir)
    for norm in norms:
        figures.add(0.1, torch.tensor(1.0), torch.tensor(norm))
    figures.fetch(len(norms))
    return figures.take()


def test_a_step_that_the_loss_scaler_skips_is_no_divergence_and_leaves_no_infinity():
    assert scaled_figures([0.5, float("inf")])["train/grad_norm"] == 0.5
    assert "train/grad_norm" not in scaled_figures([float("nan"), float("inf")])
    json.dumps(scaled_figures([float("inf")]), allow_nan=False)


def test_steps_that_no_loss_scale_saves_are_a_divergence():
    inf = float("inf")
    scaled_figures([inf] * MOST_SKIPPED + [1.0] + [inf] * MOST_SKIPPED)
    with pytest.raises(TrainingError, match=rf"at step 50: the gradients of {MOST_SKIPPED + 1} steps in a row"):
        scaled_figures([1.0] * (49 - MOST_SKIPPED) + [inf] * (MOST_SKIPPED + 1))


@pytest.mark.parametrize(("before", "now"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_generators_are_reseeded_on_another_kind_of_device(before, now, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *_: pytest.fail("another device's state"))
    states = {"cpu": torch.get_rng_state()} | ({"cuda": torch.get_rng_state()} if before == "cuda" else {})
    config = RunConfig.model_validate({"model": {"dropout": 0.1}})
    saved = Checkpoint(config, None, {}, {"step": 7}, rng=(states,))
    seeds = []
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    accelerator = SimpleNamespace(num_processes=1, process_index=0, device=torch.device(now))
    restore_rank_rng(accelerator, saved, config)
    effect = "dropout's random generators are reseeded, all else is restored"
    assert caplog.messages == [f"device {before} before, {now} now: {effect}"]
    assert len(seeds) == 1


@pytest.mark.parametrize(
    ("share", "text"), [(0.574, "57%"), (0.012, "1%"), (0.01, "1%"), (0.0034, "0.3%"), (0.000151, "0.02%"), (0.0, "0%")]
)
def test_shares_below_a_percent_keep_a_digit(share, text):
    assert format_share(share) == text
