"""Which precision training computes in, and what the run prints of it."""

import pytest
import torch

import train.distributed.precision as precision
from train.distributed.precision import describe_precision, recurrent_type, resolve_precision, training_precision


@pytest.mark.parametrize(
    ("requested", "device_type", "bf16_rnn", "bf16_cpu", "used"),
    [
        # cuDNN's recurrent layers compute in fp16 under any autocast: only fp16 has a loss scale.
        ("native", "cuda", False, True, "fp16"),
        ("bf16", "cuda", False, True, "fp16"),
        ("fp16", "cuda", False, True, "fp16"),
        ("no", "cuda", False, True, "no"),
        # A torch that honours bf16 there.
        ("native", "cuda", True, False, "bf16"),
        ("bf16", "cuda", True, False, "bf16"),
        ("fp16", "cuda", True, False, "fp16"),
        ("native", "cpu", False, True, "bf16"),
        ("native", "cpu", False, False, "no"),
        ("bf16", "cpu", False, False, "bf16"),
        ("native", "mps", False, True, "no"),
    ],
)
def test_precision_by_device(requested, device_type, bf16_rnn, bf16_cpu, used):
    assert resolve_precision(requested, device_type, bf16_rnn=bf16_rnn, bf16_cpu=bf16_cpu) == used


@pytest.fixture
def gpu(monkeypatch):
    """Two GPUs whose recurrent layers compute in what is appended; the devices that were asked."""
    asked = []
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(precision, "recurrent_type", lambda device, kind: asked.append(device) or torch.float16)
    return asked


def test_each_process_asks_its_own_gpu(gpu, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert training_precision("native") == "fp16"
    assert gpu == [torch.device("cuda", 1)]


def test_auto_is_what_the_launcher_says(gpu, monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert training_precision("auto") == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert training_precision("auto") == "fp16"


def test_a_cpu_run_beside_a_gpu_is_not_scaled(gpu, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert training_precision("bf16") == "bf16"
    assert not gpu


def test_the_probe_runs_and_keeps_the_generators():
    before = torch.get_rng_state()
    assert recurrent_type(torch.device("cpu"), torch.bfloat16) in (torch.bfloat16, torch.float32)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_replaced_precision_is_explained():
    assert describe_precision("native", "fp16", "cuda") == "fp16 with loss scaling"
    assert "not bf16: cuDNN's recurrent layers compute in fp16" in describe_precision("bf16", "fp16", "cuda")
    assert describe_precision("no", "fp16", "cuda") == "fp16 with loss scaling"
    assert describe_precision("native", "bf16", "cpu") == "bf16"
