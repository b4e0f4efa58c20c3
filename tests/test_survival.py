"""A run that is killed, stopped or preempted, and resumed, ends as the run without faults, bit for bit."""

import ast
import inspect
import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from training import make_trainer, tiny_config

from benchmarks.reliability import chains, faults, harness, inject, injections, targets
from train.checkpoint.format import load_newest

ROOT = Path(__file__).parent.parent
PROGRAM = ROOT / "benchmarks" / "reliability" / "__main__.py"

SLIDING_GRU = harness.CONFIG.replace("windows: carry", "windows: sliding").replace("rnn: LSTM", "rnn: GRU")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return harness.Workspace(tmp_path_factory.mktemp("runs"))


def all_survived(trials):
    assert [t.wrong for t in trials if t.wrong] == []
    return trials


def faults_of(workspace, run):
    return [e for e in inject.read_events(workspace.events(run)) if e["event"] == "fault"]


def every_step_once(outcome):
    return [r["step"] for r in outcome.records if "train/loss" in r] == list(range(1, 301))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_killed_22_times_ends_bit_exact(workspace):
    draw = random.Random(3)
    phases = {"step": 5, "write": 4, "evaluation": 4, "pruning": 4}
    injected = [injections.kill_in(phase, draw) for phase, times in phases.items() for _ in range(times)]
    injected += [
        injections.kill_in("replacement", draw),
        injections.kill_between_renames(),
        injections.kill_at_start(draw),
    ]
    injected += [injections.kill_from_outside(draw) for _ in range(2)]
    draw.shuffle(injected)
    trials = all_survived(chains.chain(workspace, "killed", injected))
    assert len(trials) == 22

    recorded = faults_of(workspace, "killed")
    hit = Counter(f["phase"] for f in recorded if f["action"] == "kill")
    assert hit == {**phases, "replacement": 2}
    assert sum(f["where"].endswith("temporary.rename(folder)") for f in recorded) >= 1
    assert sum(f["where"].startswith("SIGKILL to") for f in recorded) == 3
    assert len({f["where"] for f in recorded}) > 15
    assert "dropout: 0.2" in (workspace.run_dir("killed") / "config.yaml").read_text()
    killed, reference = harness.outcome(workspace.run_dir("killed")), workspace.reference(1)
    assert killed == reference
    assert every_step_once(killed)
    assert [r["step"] for r in killed.records if "val/stream/loss" in r] == list(range(3, 301, 3))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_restarted_ranks_end_bit_exact(tmp_path):
    draw, workspace = random.Random(4), harness.Workspace(tmp_path, SLIDING_GRU)
    places = [("step", 0), ("evaluation", 1), ("write", 0), ("step", 1)]
    injected = [chains.Injection(injections.drawn("kill", phase, draw, rank)) for phase, rank in places]
    trials = all_survived(chains.chain_of_restarts(workspace, "killed", injected))
    assert [(f["phase"], f["rank"]) for f in faults_of(workspace, "killed")] == places
    assert all(t.cost.ended_s < 15 for t in trials)
    killed = harness.outcome(workspace.run_dir("killed"))
    assert killed == workspace.reference(2)
    assert every_step_once(killed)


@pytest.mark.slow
def test_a_stopped_rank_is_reported_and_the_other_exits(workspace):
    draw = random.Random(5)
    injected = [injections.stop_in("step", 0, draw), injections.stop_in("evaluation", 1, draw)]
    trials = all_survived(chains.chain(workspace, "stopped", injected, 2))
    assert all(t.cost.ended_s < 15 for t in trials)


@pytest.mark.slow
def test_preempted_ranks_lose_no_step_and_exit_with_the_code(workspace):
    draw = random.Random(6)
    signals = [(signal.SIGTERM, 75, "rank"), (signal.SIGUSR1, 75, "rank"), (signal.SIGTERM, 75, "launcher")]
    injected = [injections.stop_signal(*s, draw) for s in [*signals, (signal.SIGINT, 130, "launcher")]]
    trials = all_survived(chains.chain(workspace, "preempted", injected, 2))
    assert [t.cost.steps for t in trials] == [0] * 4


@pytest.mark.slow
def test_the_second_interrupt_ends_a_hung_step_at_once(workspace):
    (trial,) = all_survived(chains.chain(workspace, "hung", [injections.second_interrupt(random.Random(7))]))
    assert trial.cost.ended_s < 3


@pytest.mark.slow
def test_the_program_prints_trials_and_survivals():
    command = [sys.executable, str(PROGRAM), "--times", "1", "--only", "flipped", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["rows"]
    assert (row["fault"], row["tried"], row["survived"], row["wrong"]) == ("flipped byte", 1, 1, [])
    assert row["chars_again"]["max"] > 0
    assert row["checkpoint_bytes"]["max"] > 0


def test_an_unusable_newer_checkpoint_displaces_no_usable_one(tmp_path):
    make_trainer(tiny_config(tmp_path, ["train.max_steps=4", "checkpoint.keep=1", "eval.every=0"])).fit()
    (tmp_path / "run" / "step-00000900").mkdir()
    make_trainer(tiny_config(tmp_path, ["train.max_steps=6", "checkpoint.keep=1", "eval.every=0"])).fit()
    assert load_newest(tmp_path / "run").step == 6


# ---- the measuring itself


def events(*rows):
    return [{"event": name, "t": float(t), "rank": 0, **rest} for t, name, rest in rows]


def test_costs_are_counted_from_the_events():
    noted = events(
        (0, "start", {"checkpoints": {}}),
        (1, "fit", {"step": 0}),
        (2, "fault", {"step": 7, "action": "kill"}),
        (5, "exit", {"rank": 1, "code": 69}),
        (6, "start", {"rank": 1, "checkpoints": {}}),
        (6, "start", {"checkpoints": {"step-00000004": 10, "step-00000006": 20, ".writing-best": 5}}),
        (7, "fit", {"step": 4}),
        (8, "fault", {"step": 9, "action": "signal"}),
        (8.5, "ended", {"step": 10, "code": 75}),
        (9, "start", {"checkpoints": {"step-00000010": 10}}),
        (10, "fit", {"step": 10}),
        (11, "exit", {"code": 0}),
        (12, "ended", {"step": 300, "code": 0}),
    )
    assert harness.costs(noted) == [harness.Cost(3, 5, 20, 3.0), harness.Cost(0, 0, 0, 0.5)]
    assert (harness.Cost(3, 5, 20).chars, harness.Cost(3, 5, 20).checkpoint_bytes) == (3 * 8 * 16, 25)


def test_tampering_costs_the_checkpoint_that_is_passed_over():
    noted = events(
        (0, "fault", {"step": 8, "action": "tamper"}),
        (1, "start", {"checkpoints": {"step-00001001": 7, "step-00000008": 10, "step-00000006": 20, ".writing-x": 5}}),
        (2, "fit", {"step": 6}),
    )
    assert harness.costs(noted) == [harness.Cost(2, 0, 10, None)]


def test_every_fault_has_a_name_and_a_row_in_the_docs():
    rows = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert len({f.name for f in faults.FAULTS}) == len(faults.FAULTS) == 33
    for fault in faults.FAULTS:
        assert f"| {fault.name} | {fault.how} | {fault.survived_if} |" in rows


# ---- names of the product that the faults depend on


@pytest.mark.parametrize("name", targets.FUNCTIONS)
def test_functions_that_faults_strike_in_exist(name):
    owner, attribute = targets.locate(name)
    assert callable(getattr(owner, attribute))
    assert name not in ("step", "write", "replacement", "evaluation", "pruning") or name in injections.CALLS


def test_renames_have_a_line_between_them():
    owner, attribute = targets.locate("replacement")
    lines = inspect.getsource(getattr(owner, attribute)).splitlines()
    (second,) = [i for i, line in enumerate(lines) if targets.BETWEEN_RENAMES in line]
    assert any(".rename(aside)" in line for line in lines[:second])


def test_expected_messages_are_in_the_sources():
    sources = [path for package in ("charrnn", "train") for path in (ROOT / package).rglob("*.py")]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sources]
    texts = [
        n.value for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)
    ]
    for name, template in targets.MESSAGES.items():
        for part in filter(None, map(str.strip, template.split("{}"))):
            assert any(part in text for text in texts), f"{name}: nobody prints {part!r}"
