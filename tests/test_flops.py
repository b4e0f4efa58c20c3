"""FLOPs by hand-counted cases, and what a device does at best."""

import pytest
import torch
from training import ListRecorder, make_trainer, tiny_config

from charrnn.config import ModelConfig
from train.loop.flops import flops_per_char, measured_peak, peak_flops, published_peak


def test_a_gru_of_one_layer_counts_its_products_by_hand():
    # Forward, per character: 3 gates of 5 units, each a product with 2 inputs and 5 states; 5 states onto 7 symbols.
    multiplications = 3 * 5 * (2 + 5) + 5 * 7
    shape = ModelConfig(rnn="GRU", embedding_dim=2, hidden_dim=5, num_layers=1)
    assert flops_per_char(shape, 7) == 3 * 2 * multiplications == 840


def test_an_lstm_has_four_gates_and_later_layers_read_states():
    multiplications = 4 * 5 * (2 + 5) + 2 * 4 * 5 * (5 + 5) + 5 * 7
    shape = ModelConfig(rnn="LSTM", embedding_dim=2, hidden_dim=5, num_layers=3)
    assert flops_per_char(shape, 7) == 6 * multiplications


@pytest.mark.parametrize(
    ("name", "precision", "flops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA A100-SXM4-80GB", "no", 156e12),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA L4", "bf16", 121e12),
        ("NVIDIA L40S", "no", 183e12),
        ("Tesla V100-PCIE-16GB", "fp16", 112e12),
        ("Tesla T4", "fp16", 65e12),
    ],
)
def test_a_known_gpu_has_its_published_peak(name, precision, flops):
    assert published_peak(name, precision) == pytest.approx(flops)


@pytest.mark.parametrize("name", ["Graphics of 2031", "NVIDIA L40", "NVIDIA A100-SXM4-40GB MIG 1g.5gb"])
def test_an_unknown_gpu_and_a_part_of_one_have_no_peak(name):
    assert published_peak(name, "bf16") is None


def test_a_cpus_peak_is_measured_and_no_product_of_its_kind_beats_it_by_far():
    assert peak_flops(torch.device("meta"), "no") is None
    assert 1e8 < measured_peak(torch.float32, 0.05) < 1e14


def test_figures_follow_from_the_speed(tmp_path, caplog):
    trainer = make_trainer(tiny_config(tmp_path), peak_flops=1e12)
    trainer.fit()
    records = [r for r in trainer.recorder.records if "train/loss" in r]
    assert len(records) == 12
    for record in records:
        flops = record["train/chars_per_s"] * flops_per_char(trainer.config.model, len(trainer.data.vocab))
        assert record["train/gflops"] == pytest.approx(flops / 1e9)
        assert record["train/mfu"] == pytest.approx(flops / 1e12)
    assert "of the peak" in caplog.text


def test_without_a_known_peak_utilisation_is_left_out(tmp_path, caplog):
    recorder = ListRecorder()
    make_trainer(tiny_config(tmp_path), recorder).fit()
    assert not any("train/mfu" in r for r in recorder.records)
    assert "GFLOP/s)" in caplog.text
