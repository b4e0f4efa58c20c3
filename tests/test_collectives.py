"""Ranks agree before every step: an error, a stop signal or a batch mismatch on one is known to all, at the same step.

The slow tests are the scenarios of collectives_worker.py, which two processes play in one launch.
"""

import json

import collectives_worker as worker
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from launches import ROOT, ended_well, torchrun
from training import fresh_accelerator

from charrnn.config import RunConfig
from charrnn.errors import CharRNNError, CheckpointError, ConfigError, CorpusError, TrainingError
from train.checkpoint.resume import check_same_start
from train.distributed.collectives import Collectives
from train.distributed.setup import check_processes
from train.distributed.signals import StopSignals
from train.loop.control import Control, pack_status

KINDS = [CheckpointError, ConfigError, CorpusError, TrainingError]


@pytest.fixture
def alone():
    return Collectives(fresh_accelerator())


def test_a_single_process_agrees_with_itself(alone):
    control = Control(alone, StopSignals())
    control.signals.received = 15
    assert (control.agree(0, np.array([3, 1]), 12.3456789), control.stopped_by) == (12.345679, 15)
    control.note(TrainingError("wrong"))
    with pytest.raises(TrainingError, match=r"^wrong$"):
        control.agree(0, np.array([3, 1]), 12.3456789)
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
    alone.all_gather_integers = lambda mine: [[*mine[:3], batch] for batch in (7, 5, 7, 6)]
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
    """rank -> scenario -> how it failed there."""
    folder = tmp_path_factory.mktemp("ranks")
    worker.prepare_texts(folder)
    ended_well([*torchrun(2), ROOT / "tests" / "collectives_worker.py", folder], folder)
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", worker.SCENARIOS)
def test_two_ranks(launched, name):
    for rank, failures in enumerate(launched):
        assert failures[name] == "", f"rank {rank}: {failures[name]}"
