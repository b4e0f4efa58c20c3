"""Setup of the processes that a launcher starts."""

import os
from datetime import timedelta

import pytest
import torch
from accelerate.utils import InitProcessGroupKwargs
from training import fresh_accelerator

from charrnn.config import load_config
from charrnn.errors import ConfigError
from train.distributed import setup
from train.distributed.setup import check_joined, check_same_config, make_accelerator, shared_fields


def test_processes_that_accelerate_did_not_join_are_refused():
    check_joined(2, 2)
    with pytest.raises(ConfigError, match=r"WORLD_SIZE is 2, but Accelerate joined 1 .* ACCELERATE_USE_CPU=true"):
        check_joined(2, 1)


def test_configs_that_differ_are_named_by_field_and_rank():
    ours = load_config(None, {"data.source": "a.txt", "train.threads": 2})
    theirs = load_config(None, {"data.source": "b.txt", "optim.lr": 0.1, "train.max_steps": 7})
    check_same_config([shared_fields(ours, "no")] * 2)
    check_same_config([shared_fields(ours, "no"), shared_fields(load_config(None, {"train.run_dir": "x"}), "no")])
    both = r"^rank 2 .*optim\.lr is 0\.1 there and 0\.002 on rank 0, train\.max_steps is 7 there and 0 on rank 0"
    with pytest.raises(ConfigError, match=both):
        check_same_config([shared_fields(ours, "no"), shared_fields(ours, "no"), shared_fields(theirs, "no")])
    with pytest.raises(ConfigError, match=r"train\.mixed_precision is 'bf16' there"):
        check_same_config([shared_fields(ours, "no"), shared_fields(ours, "bf16")])


def test_the_environments_accumulation_is_ignored(monkeypatch):
    fresh_accelerator()
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert make_accelerator(load_config(None, {}).train).gradient_accumulation_steps == 1


@pytest.fixture
def gpus(monkeypatch):
    """gpus(count) pretends that this machine has so many."""

    def gpus(count):
        found = torch.device("cuda") if count else None
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: found)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)

    return gpus


@pytest.mark.parametrize(
    ("count", "environment", "refused"),
    [
        (1, {"LOCAL_WORLD_SIZE": "2"}, True),
        (2, {"LOCAL_WORLD_SIZE": "2"}, False),
        (1, {}, False),
        (0, {"LOCAL_WORLD_SIZE": "2"}, False),
        (1, {"LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}, False),
        (1, {"LOCAL_WORLD_SIZE": "2", "ACCELERATE_TORCH_DEVICE": "cuda:0"}, False),
    ],
)
def test_more_processes_than_gpus_are_refused(gpus, monkeypatch, count, environment, refused):
    for name in ("LOCAL_WORLD_SIZE", "ACCELERATE_USE_CPU", "ACCELERATE_TORCH_DEVICE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    gpus(count)
    if refused:
        with pytest.raises(
            ConfigError, match=r"^2 processes on this machine, but only 1 GPU\(s\); .*ACCELERATE_USE_CPU"
        ):
            setup.check_local_devices()
    else:
        setup.check_local_devices()


@pytest.fixture
def clean_environment(monkeypatch):
    """Without the variables of NCCL and cuBLAS; what a test sets is undone."""
    for name in ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores it
        monkeypatch.delenv(name)
    return monkeypatch


def test_nccl_raises_instead_of_aborting_by_default(clean_environment):
    fresh_accelerator()
    timeouts = []
    clean_environment.setattr(
        setup,
        "InitProcessGroupKwargs",
        lambda timeout: timeouts.append(timeout) or InitProcessGroupKwargs(timeout=timeout),
    )
    clean_environment.setenv("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", "7")
    make_accelerator(load_config(None, {"train.peer_timeout": 2000}).train)
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "2"
    assert os.environ["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"] == "7"
    assert timeouts == [timedelta(seconds=4000)]  # above the watchdog's, which reports the rank


@pytest.mark.parametrize("wanted", [False, True])
def test_deterministic_algorithms_are_an_option(clean_environment, wanted):
    fresh_accelerator()
    try:
        make_accelerator(load_config(None, {"train.deterministic": wanted}).train)
        assert torch.are_deterministic_algorithms_enabled() is wanted
        assert torch.backends.cudnn.deterministic is wanted
        assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if wanted else None)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False
        torch.utils.deterministic.fill_uninitialized_memory = True
