"""Ranks agree before every step: an error, a stop signal or a batch mismatch on one is known to all, at the same step.

The slow tests look at what two processes of collectives_worker.py wrote, in one launch.
"""

import json
from pathlib import Path

import collectives_worker as worker
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from launches import ROOT, ended_well, torchrun
from training import fresh_accelerator, largest_difference

from charrnn.config import RunConfig
from charrnn.errors import CharRNNError, CheckpointError, ConfigError, CorpusError, TrainingError
from train.checkpoint.resume import check_same_start
from train.distributed.collectives import Collectives, GlobalStatus, pack_status
from train.distributed.setup import check_processes
from train.distributed.signals import StopSignals
from train.loop.control import Control

KINDS = [CheckpointError, ConfigError, CorpusError, TrainingError]


@pytest.fixture
def alone():
    return Collectives(fresh_accelerator())


def test_a_single_process_agrees_with_itself(alone):
    agreed = alone.all_gather_status(15, True, 12.3456789, np.array([3, 1]))
    assert agreed == GlobalStatus(stop_signal=15, elapsed_s=12.345679, failed_ranks=(0,), mismatched_ranks=())
    assert alone.all_gather("x") == ["x"]
    assert alone.run_on_all(lambda: 3) == alone.local_main_first(lambda: 3) == 3
    alone.barrier()
    alone.raise_if_any(None)
    for way in (alone.run_on_all, alone.local_main_first):
        with pytest.raises(ConfigError, match=r"^wrong$"):
            way(lambda: (_ for _ in ()).throw(ConfigError("wrong")))


def test_a_defect_is_raised_as_it_is(alone):
    with pytest.raises(ZeroDivisionError):
        alone.run_on_all(lambda: 1 / 0)


@given(
    starts=st.lists(st.integers(0, 2**40), min_size=1, max_size=9), other=st.lists(st.integers(0, 2**40), min_size=1)
)
def test_a_status_distinguishes_batches_and_holds_long_clocks(starts, other):
    def packed(batch):
        return pack_status(0, False, 1e9 + 0.000001, np.array(batch, np.int64))

    assert packed(starts)[2] == 10**15 + 1
    for batch in (other, starts[::-1], [*starts, 0]):
        assert (packed(starts)[3] == packed(batch)[3]) == (starts == batch)


@given(st.dictionaries(st.integers(0, 9), st.sampled_from(KINDS), min_size=1))
def test_all_ranks_raise_the_same_message_with_up_to_four_ranks(failing):
    """failing: rank -> kind of its error."""
    ranks = Collectives(fresh_accelerator())
    errors = [failing[rank](f"fault {rank}") if rank in failing else None for rank in range(10)]
    ranks.all_gather = lambda mine: errors
    with pytest.raises(CharRNNError) as caught:
        ranks.raise_if_any(errors[3])
    first = min(failing)
    assert type(caught.value) is failing[first]
    told = [f"rank {rank}: fault {rank}" for rank in sorted(failing)[:4]]
    assert str(caught.value) == ("fault 0" if first == 0 else "; ".join(told))


def test_a_batch_mismatch_is_refused_with_ranks_and_step(alone):
    control = Control(alone, StopSignals())
    assert control.agree(6, np.arange(3), 1.5) == 1.5
    alone.all_gather_status = lambda *_: GlobalStatus(0, 0.0, (), (1, 3))
    with pytest.raises(
        TrainingError, match=r"^batch mismatch at step 7: rank\(s\) 1, 3 and rank 0 .*; use the same charrnn"
    ):
        control.agree(6, np.arange(3), 1.5)


def test_collectives_with_different_starts_are_refused():
    check_same_start([(5, "a"), (5, "a"), (5, "a")], "runs/one")
    with pytest.raises(CheckpointError, match=r"^rank 2 finds step 5 in runs/one, rank 0 step 10; put the run fold"):
        check_same_start([(10, "a"), (10, "a"), (5, "a")], "runs/one")
    with pytest.raises(CheckpointError, match=r"^rank 1 finds step 5 in runs/one, rank 0 step 0"):
        check_same_start([(0, "a"), (5, "a")], "runs/one")
    with pytest.raises(
        CorpusError, match=r"^corpus mismatch: rank 1 has SHA-256 bbbbbbbbbbbb\.\.\., rank 0 aaaaaaaaaaaa\.\."
    ):
        check_same_start([(5, "a" * 64), (10, "b" * 64)], "runs/one")


def test_a_wrong_number_of_processes_is_refused_with_both():
    config = RunConfig.model_validate({"train": {"processes": 4}})
    check_processes(config, 4)
    check_processes(RunConfig(), 3 + 1)
    with pytest.raises(
        ConfigError, match=r"^train\.processes is 4, but the launcher started 1; .*torchrun --nproc_per_node 4"
    ):
        check_processes(config, 1)


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """scenario -> what each rank saw of it."""
    folder = tmp_path_factory.mktemp("ranks")
    worker.prepare_texts(folder)
    ended_well([*torchrun(2), ROOT / "tests" / "collectives_worker.py", folder], folder)
    ranks = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]
    return {name: [rank[name] for rank in ranks] for name in worker.SCENARIOS}


@pytest.fixture
def seen(launched):
    """seen(scenario) is what each rank saw of one that ends without an error."""

    def seen(name):
        for rank in launched[name]:
            assert rank["error"] is None, rank["text"]
        return launched[name]

    return seen


def agreed(stop_signal=0, failed_ranks=(), mismatched_ranks=()):
    ranks = {"failed_ranks": list(failed_ranks), "mismatched_ranks": list(mismatched_ranks)}
    return {"stop_signal": stop_signal, "elapsed_s": 100.25, **ranks}


@pytest.mark.slow
def test_all_ranks_receive_the_same_status(seen):
    for rank, found in enumerate(seen("exchange")):
        assert found["count"] == 2
        assert found["is_main"] == (rank == 0)
        assert found["nothing"] == agreed()
        assert found["stop on 1"] == agreed(stop_signal=15)
        assert found["stops on both"] == agreed(stop_signal=10)
        assert found["fault on 1"] == agreed(failed_ranks=[1])
        assert found["faults on both"] == agreed(failed_ranks=[0, 1])
        assert found["odd batch"] == found["same windows, other order"] == agreed(mismatched_ranks=[1])


@pytest.mark.slow
def test_values_are_gathered_in_rank_order(seen):
    for found in seen("gather"):
        assert found["values"] == [{"rank": 0, "nested": [0]}, {"rank": 1, "nested": [1, 1]}]
        assert found["none"] == [None, None]


@pytest.mark.slow
def test_an_error_of_one_rank_is_raised_on_all(seen):
    for rank, found in enumerate(seen("together")):
        assert found["none"] == 10 + rank
        assert found["on 1"] == {"error": "CheckpointError", "text": "rank 1: of 1"}
        assert found["on 0"] == found["on both"] == {"error": "ConfigError", "text": "of 0"}
        assert found["after"] == [0, 1]


@pytest.mark.slow
def test_the_local_main_process_runs_first(seen):
    first, second = seen("locally_first")
    assert (first["result"], second["result"]) == ("made", "found")
    for found in (first, second):
        assert found["on 0"] == {"error": "CorpusError", "text": "of 0"}
        assert found["on 1"] == {"error": "CorpusError", "text": "rank 1: of 1"}
        assert found["ran"] == ["ran-on-0-beside-1"]  # after a fault of the first, nothing ran on the second


@pytest.mark.slow
def test_watchdogs_meet_in_the_launchers_store(seen):
    for found in seen("store"):
        assert found["both"] is None
        assert found["one"] is None
        assert found["line of 1"] == "left"


@pytest.mark.slow
def test_each_process_refuses_another_number_of_them(seen):
    for found in seen("processes"):
        assert found["wrong"]["error"] == "ConfigError"
        assert "train.processes is 3, but the launcher started 2" in found["wrong"]["text"]
        assert found["right"]["error"] is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        ("different_steps", "CheckpointError", "rank 1 finds step 0 in "),
        ("different_texts", "CorpusError", "corpus mismatch: rank 1 has SHA-256 "),
        ("damaged_on_one", "CheckpointError", "rank 1: none of the 1 checkpoint(s) in "),
    ],
)
def test_all_ranks_refuse_different_starts(launched, name, kind, text):
    for found in launched[name]:
        assert found["error"] == kind
        assert found["text"].startswith(text)


AT_SPOILT = worker.SPOILT - 1  # updates made before the fault is found
FAULTS = {
    # scenario: kind, start of the text, updates made, steps saved
    "nan_loss": ("TrainingError", "training diverged at step 4: loss nan, ", 4, [2]),
    "inf_loss": ("TrainingError", "training diverged at step 4: loss inf, ", 4, [2]),
    "nan_loss_seen_late": ("TrainingError", "training diverged at step 4: loss nan, ", 5, []),
    "index_outside_the_text": (
        "TrainingError",
        "rank 1: the batch of step 4 wants characters 0 to 1000",
        AT_SPOILT,
        [2],
    ),
    "other_windows": (
        "TrainingError",
        "batch mismatch at step 4: rank(s) 1 and rank 0 ",
        3,
        [2],
    ),
    "record_refused_on_0": ("CheckpointError", "cannot write metrics.jsonl", 4, [4, 2]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_one_rank_ends_all_at_the_same_step(launched, name):
    kind, text, step, saved = FAULTS[name]
    first, second = launched[name]
    for found in (first, second):
        assert found["error"] == kind
        assert found["text"].startswith(text)
        assert found["step"] == step
        assert found["saved"] == saved
        assert len(found["losses"]) <= step
    assert first["text"] == second["text"]


@pytest.mark.slow
def test_a_full_disk_of_rank_0_ends_all_at_the_same_step(launched):
    first, second = launched["disk_full_on_0"]
    for found in (first, second):
        assert found["error"] == "CheckpointError"
        assert "step-00000006: No space left on device; free space or permissions on the disk that" in found["text"]
        assert found["saved"] == [3]
    assert first["text"] == second["text"]
    # The write is in the background: some updates are made until it has failed.
    assert 6 <= first["step"] == second["step"] < 200


@pytest.mark.slow
def test_a_stop_signal_to_one_rank_stops_all_and_resume_is_exact(seen):
    for found in seen("stop_on_1"):
        assert (found["stopped_by"], found["step"], found["saved"]) == (10, worker.SPOILT, [worker.SPOILT])
        assert found["resumed_at"] == worker.SPOILT
        assert len(found["curve"]) == 12
        assert found["curve"] == found["whole_curve"]
        assert found["weights"] == found["whole_weights"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "bucket_mib", "tolerance"),
    [
        ("plain", 25, 0),
        ("bucket_mb=1", 1, 0),
        ("bf16", 25, 1e-4),
        ("fp16", 25, 5e-5),
        ("accumulated", 25, 1e-5),
    ],
)
def test_gradient_communication_options_barely_change_losses(seen, kind, bucket_mib, tolerance):
    """tolerance: the largest relative difference of a loss from the plain one, over 20 updates."""
    for found in seen("gradients"):
        ours, plain = found[kind], found["plain"]
        assert ours["error"] is None, ours["text"]
        assert (ours["bucket_mib"], ours["views"]) == (bucket_mib, True)
        assert ours["gradient_mib"] > 2  # more than a bucket of 1 MiB
        assert plain["losses"][-1] < 0.7 * plain["losses"][0]
        difference = largest_difference(ours["losses"], plain["losses"])
        print(f"{kind}: largest relative difference of a loss {difference:.1e}")
        assert difference <= tolerance
        if kind in ("bf16", "fp16"):
            assert ours["losses"] != plain["losses"]
            assert [kind in hook for hook in ours["hooks"]] == [True]
        else:
            assert ours["hooks"] == []
    assert len({found[kind]["weights"] for found in seen("gradients")}) == 1


def test_the_worker_has_a_test_for_every_scenario():
    source = Path(__file__).read_text(encoding="utf-8")
    assert [name for name in worker.SCENARIOS if f'"{name}"' not in source] == []
