"""A run that is killed, stopped or preempted, and resumed, ends as the run without faults, bit for bit."""

import ast
import random
import signal
from collections import Counter

import pytest
from launches import ROOT, python
from training import make_trainer, tiny_config

from benchmarks.reliability import chains, faults, inject, launch
from train.checkpoint.format import load_newest

SLIDING_GRU = launch.CONFIG.replace("windows: carry", "windows: sliding").replace("rnn: LSTM", "rnn: GRU")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return launch.Workspace(tmp_path_factory.mktemp("runs"))


def all_survived(trials):
    assert [t.wrong for t in trials if t.wrong] == []
    return trials


def faults_of(workspace, run):
    return inject.read_events(workspace.events(run), "fault")


def every_step_once(outcome):
    return [r["step"] for r in outcome["log"] if "train/loss" in r] == list(range(1, 301))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_killed_22_times_ends_bit_exact(workspace):
    draw = random.Random(3)
    phases = {"step": 5, "write": 4, "evaluation": 4, "pruning": 4, "replacement": 2}
    injected = [faults.kill_in(phase, draw) for phase, times in phases.items() for _ in range(times)]
    injected += [faults.kill_anywhere(draw) for _ in range(3)]
    draw.shuffle(injected)
    trials = all_survived(chains.chain(workspace, "killed", injected))
    assert len(trials) == 22

    recorded = faults_of(workspace, "killed")
    assert Counter(f["phase"] for f in recorded if f["phase"]) == phases
    assert sum(f["where"].startswith("SIGKILL to") for f in recorded) == 3
    assert len({f["where"] for f in recorded}) > 15
    assert "dropout: 0.2" in (workspace.folder / "killed" / "config.yaml").read_text()
    killed = chains.outcome(workspace.folder / "killed")
    assert killed == chains.reference(workspace, 1)
    assert every_step_once(killed)
    assert [r["step"] for r in killed["log"] if "val/stream/loss" in r] == list(range(3, 301, 3))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_restarted_ranks_end_bit_exact(tmp_path):
    draw, workspace = random.Random(4), launch.Workspace(tmp_path, SLIDING_GRU)
    places = [("step", 0), ("evaluation", 1), ("write", 0), ("step", 1)]
    injected = [chains.Injection(faults.struck(signal.SIGKILL, phase, draw, rank)) for phase, rank in places]
    trials = all_survived(chains.chain_of_restarts(workspace, "killed", injected))
    assert [(f["phase"], f["rank"]) for f in faults_of(workspace, "killed")] == places
    assert all(t.cost.ended_s < 15 for t in trials)
    assert every_step_once(chains.outcome(workspace.folder / "killed"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_stopped_rank_is_reported_and_the_other_exits(workspace):
    draw = random.Random(5)
    trials = all_survived(chains.chain(workspace, "stopped", [faults.stop_rank(draw) for _ in range(2)], 2))
    assert {f["rank"] for f in faults_of(workspace, "stopped")} == {0, 1}
    assert all(t.cost.ended_s < 15 for t in trials)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_preempted_ranks_lose_no_step_and_exit_with_the_code(workspace):
    draw = random.Random(6)
    signals = [(signal.SIGTERM, 75, "rank"), (signal.SIGUSR1, 75, "rank"), (signal.SIGTERM, 75, "launcher")]
    injected = [faults.stop_signal(*s, draw) for s in [*signals, (signal.SIGINT, 130, "launcher")]]
    trials = all_survived(chains.chain(workspace, "preempted", injected, 2))
    assert [t.cost.steps for t in trials] == [0] * 4


@pytest.mark.slow
def test_the_program_prints_trials_and_survivals():
    done = python("-m", "benchmarks.reliability", "--times", "1", "--only", "pruning")
    assert done.returncode == 0, done.stderr
    *_, row = done.stdout.splitlines()
    name, _, _, tried, survived, chars, _, ended_s = row.strip("| ").split(" | ")
    assert (name, tried, survived) == ("SIGKILL in pruning", "1", "1"), done.stderr
    assert int(chars.split()[0].replace(",", "")) > 0
    assert float(ended_s.split()[0]) < 20


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
        (2, "fault", {"step": 7}),
        (5, "exit", {"rank": 1, "code": 69}),
        (6, "start", {"rank": 1, "checkpoints": {}}),
        (6, "start", {"checkpoints": {"step-00000004": 10, "step-00000006": 20, ".writing-best": 5}}),
        (7, "fit", {"step": 4}),
        (8, "fault", {"step": 9}),
        (8.5, "ended", {"step": 10, "code": 75}),
        (9, "start", {"checkpoints": {"step-00000010": 10}}),
        (10, "fit", {"step": 10}),
        (11, "exit", {"code": 0}),
        (12, "ended", {"step": 300, "code": 0}),
    )
    assert chains.costs(noted) == [chains.Cost(3, 5, 1, 3.0), chains.Cost(0, 0, 0, 0.5)]
    assert chains.Cost(3).chars == 3 * 8 * 16


@pytest.mark.parametrize(
    ("cost", "wrong"),
    [
        (chains.Cost(4, 600, 0, 19.0), ""),
        (chains.Cost(5), "5 steps were lost, more than 4"),
        (chains.Cost(passed_over=1), "a checkpoint that bore its name was not complete"),
        (chains.Cost(ended_s=21.0), "the processes took 21 s to end, more than 20"),
    ],
)
def test_a_fault_that_costs_too_much_is_not_survived(cost, wrong):
    assert chains._too_much(cost, 4) == wrong


def test_every_fault_has_a_name_and_a_row_in_the_docs():
    rows = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert len({f.name for f in faults.FAULTS}) == len(faults.FAULTS) == 19
    for fault in faults.FAULTS:
        assert f"| {fault.name} | {fault.how} | {fault.survived_if} |" in rows


# ---- names of the product that the faults depend on


@pytest.mark.parametrize("name", [inject.FIT, *(phase.function for phase in inject.PHASES.values())])
def test_functions_that_faults_strike_in_exist(name):
    owner, attribute = inject.locate(name)
    assert callable(getattr(owner, attribute))


def test_expected_messages_are_in_the_sources():
    sources = [path for package in ("charrnn", "train") for path in (ROOT / package).rglob("*.py")]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sources]
    texts = [
        n.value for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)
    ]
    for name, template in launch.MESSAGES.items():
        for part in filter(None, map(str.strip, template.split("{}"))):
            assert any(part in text for text in texts), f"{name}: nobody prints {part!r}"
