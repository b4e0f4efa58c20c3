"""A run that is killed, stopped or preempted, and started again, ends as the run that never was: bit for bit."""

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

from benchmarks.reliability import __main__ as program
from benchmarks.reliability import faults as blows
from benchmarks.reliability import inject as inside
from benchmarks.reliability import runs as lives
from train.checkpoint.format import load_newest

ROOT = Path(__file__).parent.parent
PROGRAM = ROOT / "benchmarks" / "reliability" / "__main__.py"

SLIDING_GRU = lives.CONFIG.replace("windows: carry", "windows: sliding").replace("rnn: LSTM", "rnn: GRU")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return lives.Runs(tmp_path_factory.mktemp("runs"))


def all_survived(trials):
    assert [t.wrong for t in trials if not t.survived] == []
    return trials


def faults_of(runs, run):
    return [e for e in inside.read_events(runs.events(run)) if e["event"] == "fault"]


def every_step_once(outcome):
    return [r["step"] for r in outcome.records if "train/loss" in r] == list(range(1, 301))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_killed_22_times_at_random_moments_ends_bit_for_bit_as_one_that_never_was(runs):
    draw = random.Random(3)
    phases = {"step": 5, "write": 4, "evaluation": 4, "pruning": 4}
    struck = [blows.kill_in(phase, draw) for phase, times in phases.items() for _ in range(times)]
    struck += [blows.kill_in("replacement", draw), blows.kill_between_renames(), blows.kill_at_start(draw)]
    struck += [blows.kill_from_outside(draw) for _ in range(2)]
    draw.shuffle(struck)
    trials = all_survived(blows.chain(runs, "killed", struck))
    assert len(trials) == 22

    faults = faults_of(runs, "killed")
    hit = Counter(f["phase"] for f in faults if f["action"] == "kill")
    assert hit == {**phases, "replacement": 2}
    assert sum(f["where"].endswith("temporary.rename(folder)") for f in faults) >= 1
    assert sum(f["where"].startswith("SIGKILL to") for f in faults) == 3
    assert len({f["where"] for f in faults}) > 15
    assert "dropout: 0.2" in (runs.run_dir("killed") / "config.yaml").read_text()
    killed, unharmed = lives.outcome(runs.run_dir("killed")), runs.unharmed(1)
    assert killed == unharmed
    assert every_step_once(killed)
    assert [r["step"] for r in killed.records if "val/stream/loss" in r] == list(range(3, 301, 3))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ranks_of_two_that_are_killed_and_restarted_end_as_those_that_never_were(tmp_path):
    draw, runs = random.Random(4), lives.Runs(tmp_path, SLIDING_GRU)
    places = [("step", 0), ("evaluation", 1), ("write", 0), ("step", 1)]
    struck = [blows.kill_rank_in(phase, rank, draw) for phase, rank in places]
    trials = all_survived(blows.chain_of_restarts(runs, "killed", struck))
    assert [(f["phase"], f["rank"]) for f in faults_of(runs, "killed")] == places
    assert all(t.damage.ended_s < 15 for t in trials)
    killed = lives.outcome(runs.run_dir("killed"))
    assert killed == runs.unharmed(2)
    assert every_step_once(killed)


@pytest.mark.slow
def test_a_stopped_rank_is_named_and_the_other_leaves(runs):
    draw = random.Random(5)
    struck = [blows.stop_in("step", 0, draw), blows.stop_in("evaluation", 1, draw)]
    trials = all_survived(blows.chain(runs, "stopped", struck, 2))
    assert all(t.damage.ended_s < 15 for t in trials)


@pytest.mark.slow
def test_a_preempted_run_of_two_has_a_checkpoint_of_its_last_step_and_its_code_on_every_rank(runs):
    draw = random.Random(6)
    signals = [(signal.SIGTERM, 75, "rank"), (signal.SIGUSR1, 75, "rank"), (signal.SIGTERM, 75, "launcher")]
    struck = [blows.stop_signal(*s, draw) for s in [*signals, (signal.SIGINT, 130, "launcher")]]
    trials = all_survived(blows.chain(runs, "preempted", struck, 2))
    assert [t.damage.steps for t in trials] == [0] * 4


@pytest.mark.slow
def test_the_second_interrupt_ends_a_hung_step_at_once(runs):
    (trial,) = all_survived(blows.chain(runs, "hung", [blows.second_interrupt(random.Random(7))]))
    assert trial.damage.ended_s < 3


@pytest.mark.slow
def test_the_program_prints_what_it_tried_and_what_was_survived():
    command = [sys.executable, str(PROGRAM), "--times", "1", "--only", "flipped", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["rows"]
    assert (row["fault"], row["tried"], row["survived"], row["wrong"]) == ("flipped byte", 1, 1, [])
    assert row["chars_again"]["max"] > 0
    assert row["checkpoint_bytes"]["max"] > 0


def test_a_newer_checkpoint_that_cannot_be_used_does_not_outlast_the_runs_own(tmp_path):
    make_trainer(tiny_config(tmp_path, ["train.max_steps=4", "checkpoint.keep=1", "eval.every=0"])).fit()
    (tmp_path / "run" / "step-00000900").mkdir()
    make_trainer(tiny_config(tmp_path, ["train.max_steps=6", "checkpoint.keep=1", "eval.every=0"])).fit()
    assert load_newest(tmp_path / "run").step == 6


# ---- the measuring itself


def three_lines(seen):
    seen.append(1)
    seen.append(2)
    seen.append(3)


@pytest.mark.parametrize(("share", "before"), [(0.0, 0), (0.34, 1), (0.99, 2)])
def test_a_fault_is_committed_before_the_line_that_its_share_names(monkeypatch, share, before):
    monkeypatch.setattr(inside, "_TRACED", (__file__,))
    seen, committed = [], []
    fault = inside.Fault("kill", call=2, point=share)
    struck = inside.at_point(three_lines, lambda *_: True, fault, lambda where: committed.append(len(seen) - 3))
    struck(seen)
    assert committed == []
    struck(seen)
    struck(seen)
    assert committed == [before]
    assert len(seen) == 9


@pytest.mark.parametrize(("text", "before"), [("append(2)", 1), ("no such line", 3)])
def test_a_fault_is_committed_before_the_line_that_its_text_names_or_at_the_end(monkeypatch, text, before):
    monkeypatch.setattr(inside, "_TRACED", (__file__,))
    seen, committed = [], []
    fault = inside.Fault("kill", call=1, point=text)
    inside.at_point(three_lines, lambda *_: True, fault, lambda where: committed.append(len(seen)))(seen)
    assert committed == [before]


def test_calls_that_do_not_count_are_not_struck(monkeypatch):
    monkeypatch.setattr(inside, "_TRACED", (__file__,))
    committed = []
    fault = inside.Fault("kill", call=1, point="append(1)")
    struck = inside.at_point(three_lines, lambda seen: bool(seen), fault, lambda where: committed.append(where))
    struck([])
    assert committed == []
    struck([0])
    assert len(committed) == 1


def events(*rows):
    return [{"event": name, "t": float(t), "rank": 0, **rest} for t, name, rest in rows]


def test_what_a_fault_cost_is_counted_from_what_was_noted():
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
    assert lives.damages(noted) == [lives.Damage(3, 5, 20, 3.0), lives.Damage(0, 0, 0, 0.5)]
    assert (lives.Damage(3, 5, 20).chars, lives.Damage(3, 5, 20).checkpoint_bytes) == (3 * 8 * 16, 25)


def test_a_tampering_costs_the_checkpoint_that_is_passed_over_and_nothing_else():
    noted = events(
        (0, "fault", {"step": 8, "action": "tamper"}),
        (1, "start", {"checkpoints": {"step-00001001": 7, "step-00000008": 10, "step-00000006": 20, ".writing-x": 5}}),
        (2, "fit", {"step": 6}),
    )
    assert lives.damages(noted) == [lives.Damage(2, 0, 10, None)]


def test_the_table_says_how_much_was_survived():
    kind = program.Kind("a fault", "how", "meant", lambda *_: [])
    trials = [
        blows.Trial(lives.Damage(2, 600, 400, 0.25), ""),
        blows.Trial(lives.Damage(4), "the run's end is another"),
    ]
    machine = {"time": "now", "cpu": "c", "cores": 2, "torch": "1", "accelerate": "2"}
    report = {"machine": machine, "seed": 0, "rows": [program.row(kind, trials, 1.0), program.row(kind, [], 0.0)]}
    lines = program.table(report).splitlines()
    assert lines[-2] == "| a fault | how | meant | 2 | 1 | 384 (512) | 500 (1,000) | 0.2 (0.2) |"
    assert lines[-1] == "| a fault | how | meant | 0 | 0 | none | none | none |"


def test_every_fault_has_a_name_of_its_own_and_says_how_and_what_for():
    found = program.kinds()
    assert len({k.name for k in found}) == len(found)
    assert all(k.how and k.meant for k in found)
