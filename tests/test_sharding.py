"""Any number of processes trains the same run: the same windows, losses and evaluations, and little crosses.

The slow tests compare what three launches of sharding_worker.py wrote, of 1, 2 and 4 CPU processes.
"""

import itertools
import json
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
import sharding_worker as worker
import torch
from hypothesis import given
from hypothesis import strategies as st
from launches import ROOT, ended_well, torchrun
from sharding_worker import CELLS, HALF, MODES, SMALL, STEPS, WORLDS
from training import largest_difference

import train.loop.evaluation
from charrnn.config import EvalConfig
from charrnn.windows import WindowPlan, rank_slice, split_bounds
from train.loop.dataloader import window_plan

TOLERANCE = 1e-5  # relative
KINDS = list(itertools.product(CELLS, MODES))


@st.composite
def sharings(draw):
    """A plan, a step, and numbers of processes and micro-batches that its batch divides by."""
    world, parts, rows = draw(st.integers(1, 9)), draw(st.integers(1, 6)), draw(st.integers(1, 4))
    batch_size, seq_len = world * parts * rows, draw(st.integers(1, 40))
    stride = draw(st.integers(0, 50))
    num_chars = (batch_size + 2) * max(seq_len, stride) + seq_len + 1 + draw(st.integers(0, 5000))
    seed, segment = draw(st.integers(0, 99)), draw(st.integers(0, 200))
    plan = WindowPlan(num_chars, seq_len, batch_size, draw(st.sampled_from(MODES)), stride, seed, segment=segment)
    return plan, draw(st.integers(0, 3 * plan.steps_per_epoch)), world, parts


@given(sharings())
def test_ranks_and_micro_batches_cut_a_batch_evenly_in_order(sharing):
    plan, step, world, parts = sharing
    whole = plan.batch(step).starts
    assert len(set(whole.tolist())) == plan.batch_size
    shares = [whole[rank_slice(plan.batch_size, rank, world)] for rank in range(world)]
    assert {len(share) for share in shares} == {plan.batch_size // world}
    micro_batches = [share[rank_slice(len(share), i, parts)].tolist() for share in shares for i in range(parts)]
    count = world * parts
    assert micro_batches == [whole[rank_slice(plan.batch_size, i, count)].tolist() for i in range(count)]
    assert list(itertools.chain(*micro_batches)) == whole.tolist()


def evaluated_positions(num_chars, config, rank, world):
    """For each protocol, the positions whose prediction counts on this rank, as `evaluate` shares them out."""
    read = []

    def noted(model, ids, batches, *rest):
        batches = list(batches)
        positions = [batch.starts[:, None] + range(batch.length) for batch in batches]  # each (R, length)
        counted = [p[batch.counted].tolist() for p, batch in zip(positions, batches, strict=True)]
        read.append(list(itertools.chain(*counted)))

    accelerator = SimpleNamespace(
        process_index=rank, num_processes=world, device=torch.device("cpu"), reduce=lambda totals, how: totals
    )
    model = SimpleNamespace(training=True, eval=lambda: None, train=lambda mode: None)
    ones = torch.ones(2, dtype=torch.float64)
    with mock.patch.multiple(train.loop.evaluation, read=noted, nll_sum=lambda chunks: ones):
        train.loop.evaluation.evaluate(model, range(num_chars), config, accelerator)
    return read


@given(
    num_chars=st.integers(2, 2000),
    lanes=st.integers(1, 9),
    warmup=st.integers(0, 60),
    window=st.integers(1, 300),
    rows=st.integers(1, 40),
    world=st.integers(1, 9),
)
def test_the_ranks_together_evaluate_every_character_once(num_chars, lanes, warmup, window, rows, world):
    config = EvalConfig(stream_lanes=lanes, stream_warmup=warmup, window=window, batch_rows=rows)
    by_rank = [evaluated_positions(num_chars, config, rank, world) for rank in range(world)]
    for protocol in zip(*by_rank, strict=True):
        assert sorted(itertools.chain(*protocol)) == list(range(num_chars - 1))


@pytest.mark.parametrize("world", [2, 4])
def test_no_rank_evaluates_much_more_than_its_share(world):
    config = EvalConfig(stream_lanes=3, stream_warmup=8, window=70, batch_rows=4)
    by_rank = [evaluated_positions(320, config, rank, world) for rank in range(world)]
    assert all(len(positions) < 0.7 * 320 for rank in by_rank for positions in rank)


def launch(folder, world):
    """Starts the worker in `world` processes, one of them as it is; returns what each wrote, in rank order."""
    ended_well([*(torchrun(world) if world > 1 else []), ROOT / "tests/sharding_worker.py", folder], folder)
    return [json.loads((folder / f"world-{world}-rank-{rank}.json").read_text()) for rank in range(world)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("sharding")
    worker.prepare_texts(made)
    return made


@pytest.fixture(scope="module")
def launched(folder):
    """world -> rank -> run name -> figures."""
    return {world: launch(folder, world) for world in WORLDS}


def launches(test):
    """Marks a test that needs the three launches, of which the first such test waits for all."""
    return pytest.mark.slow(pytest.mark.timeout(900)(test))


def by_rank(launched, world, name):
    """The run's figures on each rank."""
    ranks = [figures[name] for figures in launched[world]]
    assert [figures["processes"] for figures in ranks] == [world] * world
    return ranks


def bounds(folder):
    """[start, stop) of the text's splits."""
    config = worker.run_config(folder, (), "none")
    return split_bounds(len((folder / "words.txt").read_text()), config.data.split)


class Message(NamedTuple):
    """A collective, as worker.Traffic notes it."""

    phase: str
    updates: int
    operation: str
    kind: str
    bytes: int


def ways(cell, mode):
    """All (world, accumulation steps, run name) that must give one curve."""
    for world in sorted(WORLDS):
        for parts in worker.accumulation_splits(world):
            yield world, parts, f"{cell}-{mode}-{parts}"


@launches
@pytest.mark.parametrize(("cell", "mode"), KINDS)
def test_any_number_of_processes_and_any_accumulation_give_the_same_curves(launched, cell, mode):
    (one,) = by_rank(launched, 1, f"{cell}-{mode}-1")
    assert len(one["loss"]) == len(one["grad_norm"]) == STEPS
    assert len(one["stream"]) == len(one["windows"]) == STEPS // HALF
    assert one["loss"][-1] < 0.95 * one["loss"][0]
    largest = dict.fromkeys(("loss", "grad_norm", "stream", "windows"), 0.0)
    for world, parts, name in ways(cell, mode):
        for curve in largest:
            differences = [largest_difference(rank[curve], one[curve]) for rank in by_rank(launched, world, name)]
            assert max(differences) <= TOLERANCE, (world, parts, curve)
            largest[curve] = max(largest[curve], *differences)
    print(f"{cell} {mode}: largest relative differences over {STEPS} steps {largest}")


@launches
@pytest.mark.parametrize(("cell", "mode"), KINDS)
def test_the_ranks_read_disjoint_windows_that_are_the_single_process_s_batch(launched, folder, cell, mode):
    plan = window_plan(worker.run_config(folder, [f"data.windows={mode}"], "none"), bounds(folder)["train"][1])
    batches = [plan.batch(step).starts.tolist() for step in range(STEPS)]
    for world, _, name in ways(cell, mode):
        ranks = by_rank(launched, world, name)
        for step in range(STEPS):
            shares = [rank["starts"][step] for rank in ranks]
            assert list(itertools.chain(*shares)) == batches[step]
            assert len(set().union(*shares)) == worker.BATCH


@launches
@pytest.mark.parametrize("name", worker.TRAFFIC_RUNS)
@pytest.mark.parametrize("world", [2, 4])
def test_only_gradients_flags_and_sums_cross_between_ranks(launched, world, name):
    assert launched[1][0][f"traffic-{name}"]["messages"] == []
    for figures in (rank[f"traffic-{name}"] for rank in launched[world]):
        messages = [Message(*message) for message in figures["messages"]]
        gradient_bytes = figures["parameters"] * (2 if name == "compressed" else 4)
        for step in range(worker.TRAFFIC_STEPS):
            ahead = [m for m in messages if m.updates == step and m.phase in ("loop", "train_step")]
            gradients = [m for m in ahead if m.bytes >= SMALL]
            assert {(m.phase, m.operation) for m in gradients} == {("train_step", "allreduce_.default")}
            assert len(gradients) > 1 or not step  # DDP cuts its buckets after the first update
            assert sum(m.bytes for m in gradients) == gradient_bytes
            small = sum(m.bytes for m in ahead if m.bytes < SMALL)
            assert small < SMALL < min(figures["window_chars"], figures["state_bytes"])
        # The loss and gradient norm of an update, float32; nats, count, stop, shortage, float64, a protocol.
        reduced, last = "allreduce_.default", worker.TRAFFIC_STEPS
        logs = [(step + 1, reduced, "torch.float32", 8) for step in range(last)]
        assert [m[1:] for m in messages if m.phase == "log"] == logs
        evaluations = [(step, reduced, "torch.float64", 32) for step in (last - 1, last - 1, last, last)]
        assert [m[1:] for m in messages if m.phase == "evaluate"] == evaluations
        # A step checkpoint, with the first best and at the end, is of the whole run: carried state and generators too.
        assert {m.updates for m in messages if m.phase == "save"} == {last - 1, last}
        assert all(m.bytes < SMALL for m in messages if m.phase == "loop")


@launches
@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 1)])
@pytest.mark.parametrize(("cell", "mode"), KINDS)
def test_a_run_goes_on_in_another_number_of_processes_as_if_uninterrupted(launched, cell, mode, before, after):
    (whole,) = by_rank(launched, 1, f"{cell}-{mode}-whole")
    begun = by_rank(launched, before, f"{cell}-{mode}-begun")
    resumed = by_rank(launched, after, f"{cell}-{mode}-resumed")
    assert all(rank["first_step"] == HALF + 1 for rank in resumed)

    left = np.concatenate([rank["state_after"] for rank in begun])  # (B, parts, L, H)
    found = np.concatenate([rank["state_before"] for rank in resumed])
    assert left.shape[0] == worker.BATCH
    assert np.abs(left).max(axis=(1, 2, 3)).min() > 0.1
    np.testing.assert_array_equal(found, left)

    read = [list(itertools.chain(*(rank["starts"][k] for rank in resumed))) for k in range(STEPS - HALF)]
    assert read == whole["starts"][HALF:STEPS]
    difference = largest_difference(begun[0]["loss"] + resumed[0]["loss"], whole["loss"])
    print(f"{cell} {mode}, {before} then {after} processes: largest relative difference {difference}")
    assert difference <= TOLERANCE


@launches
def test_after_a_change_in_their_number_the_ranks_draw_other_dropout_masks_and_the_log_says_so(launched):
    resumed = by_rank(launched, 4, "dropout-resumed")
    assert len({rank["generator"] for rank in resumed}) == 4
    assert "2 process(es) before, 4 now" in resumed[0]["messages"][0]
    assert "random generators are reseeded" in resumed[0]["messages"][0]


@launches
def test_with_the_same_number_dropout_goes_on_bit_for_bit_and_nothing_is_said(launched):
    for whole, begun, resumed in zip(
        *(by_rank(launched, 2, f"dropout-{name}") for name in ("whole", "begun", "resumed")), strict=True
    ):
        assert begun["loss"] + resumed["loss"] == whole["loss"]
        assert resumed["weights"] == whole["weights"]
        assert not any("reseeded" in message for message in resumed["messages"])
    masks = by_rank(launched, 2, "dropout-whole")
    assert masks[0]["generator"] != masks[1]["generator"]
