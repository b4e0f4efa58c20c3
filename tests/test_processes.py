"""What the launcher started: processes that train as one, with one config."""

import pytest
from training import fresh_accelerator

from charrnn.config import load_config
from charrnn.errors import ConfigError
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


def test_accumulation_in_the_environment_does_not_divide_gradients(monkeypatch):
    fresh_accelerator()
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert make_accelerator(load_config(None, {}).train).gradient_accumulation_steps == 1
