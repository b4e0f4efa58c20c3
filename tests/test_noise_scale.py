"""The gradient noise scale: against cases whose answer is known, and as a run measures it."""

import numpy as np
import pytest
from training import ListRecorder, make_trainer, tiny_config

from train.loop.noise_scale import NoiseScale
from train.summary import noise_line


@pytest.mark.parametrize("scale", [0.5, 8.0, 300.0])
def test_noise_of_known_covariance_is_found(scale):
    """Gradients are g + e, with trace of cov(e) = scale * |g|^2 for one window."""
    draw, size = np.random.default_rng(0), 2000
    true = draw.normal(size=size)
    deviation = np.sqrt(scale * (true @ true) / size)
    estimate = NoiseScale()
    for _ in range(400):
        small, large = (true + draw.normal(size=size) * deviation / np.sqrt(count) for count in (16, 64))
        estimate.measure(small @ small, 16, large @ large, 64)
    assert estimate.windows == pytest.approx(scale, rel=0.15)


def test_exact_squares_give_the_exact_scale():
    estimate = NoiseScale()
    estimate.measure(2 + 12 / 3, 3, 2 + 12 / 6, 6)  # |g|^2 = 2, trace 12
    assert estimate.windows == pytest.approx(6)
    assert NoiseScale(**vars(estimate)) == estimate  # as a checkpoint keeps it


@pytest.mark.parametrize(("small", "large"), [(1.0, 2.0), (9.0, 1.0)])
def test_without_a_positive_ratio_there_is_no_scale(small, large):
    estimate = NoiseScale()
    estimate.measure(small, 1, large, 2)
    assert estimate.windows is None


def test_measuring_changes_no_bit_of_training(tmp_path):
    runs = []
    for every in (0, 3):
        settings = ["model.dropout=0.3", "data.windows=carry", f"train.noise_scale_every={every}"]
        recorder = ListRecorder()
        trainer = make_trainer(tiny_config(tmp_path, [*settings, f"train.run_dir={tmp_path / str(every)}"]), recorder)
        trainer.fit()
        runs.append(recorder.losses())
        assert any("train/noise_scale" in r for r in recorder.records) == bool(every and trainer.noise_scale.windows)
        assert bool(trainer.noise_scale.noise) == bool(every)
    assert runs[0] == runs[1]


def test_the_measured_squares_are_those_of_half_the_rows_and_of_the_batch(tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(NoiseScale, "measure", lambda self, *args: measured.append(args))
    trainer = make_trainer(tiny_config(tmp_path, ["train.noise_scale_every=1", "optim.grad_clip=0"]))
    _, window, _ = trainer.data.read(0)
    expected = []
    for rows in (4, 8):
        trainer.model.zero_grad()
        loss, _ = trainer.update.loss_module(window[:rows], trainer.model.zero_state(rows))
        loss.backward()
        expected.append(sum(p.grad.square().sum().item() for p in trainer.model.parameters()))
    trainer.model.zero_grad()
    trainer.train_step()
    assert len(measured) == 1
    assert measured[0] == pytest.approx((expected[0], 4, expected[1], 8), rel=1e-4)
    assert all(p.grad is None for p in trainer.model.parameters())


def test_a_single_row_is_not_measured(tmp_path):
    trainer = make_trainer(tiny_config(tmp_path, ["train.noise_scale_every=1", "data.batch_size=1"]))
    trainer.train_step()
    assert trainer.noise_scale == NoiseScale()


def test_a_resumed_run_goes_on_with_the_estimate(tmp_path):
    config = tiny_config(tmp_path, ["train.noise_scale_every=2", "train.max_steps=5"])
    first = make_trainer(config)
    first.fit()
    assert first.noise_scale.noise
    assert make_trainer(config).noise_scale == first.noise_scale


def test_the_closing_line_names_the_batch():
    assert "would have helped up to a batch of about 310" in noise_line(309.7, 128)
    assert "a batch of more than 40 brings little: more devices would not have helped" in noise_line(40.2, 128)


def test_a_step_that_the_loss_scaler_skips_is_not_measured():
    estimate = NoiseScale()
    estimate.measure(1.0, 4, float("inf"), 8)
    estimate.measure(float("nan"), 4, 1.0, 8)
    assert estimate == NoiseScale()


def test_no_more_rows_are_measured_than_a_micro_batch_has(tmp_path):
    trainer = make_trainer(tiny_config(tmp_path, ["train.accumulation_steps=4"]))
    batch, window, _ = trainer.data.read(0)
    _, rows = trainer.update.half_gradient(window, batch.reset)
    assert rows == len(window) // 4
