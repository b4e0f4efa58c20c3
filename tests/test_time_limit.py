"""The time budget by a clock that the test sets: where the learning rate ends, and when the run does."""

import itertools

import pytest
from training import ListRecorder, make_trainer, tiny_config

from charrnn.config import load_config
from charrnn.errors import ConfigError
from train.loop.schedule import Schedule
from train.loop.trainer import Trainer

LIMIT = 30.0
FINAL = 0.1


class Clock:
    """Every update takes the next of `step_s`, every evaluation `eval_s`."""

    def __init__(self, monkeypatch, step_s, eval_s=0.0):
        self.now, self.ends = 100.0, []
        durations = itertools.cycle(step_s)
        step, evaluate = Trainer.train_step, Trainer.evaluate

        def timed_step(trainer):
            step(trainer)
            self.now += next(durations)
            self.ends.append(self.now)

        def timed_evaluation(trainer):
            fresh = trainer.progress.evaluated_step != trainer.progress.step
            evaluate(trainer)
            self.now += eval_s * fresh

        monkeypatch.setattr(Trainer, "train_step", timed_step)
        monkeypatch.setattr(Trainer, "evaluate", timed_evaluation)

    def __call__(self):
        return self.now


def budget(folder, *settings):
    fixed = ["train.max_steps=0", f"train.time_limit={LIMIT}", f"optim.final_lr={FINAL}", "eval.every=0"]
    return tiny_config(folder, [*fixed, *settings])


def rates(trainer):
    return [r["train/lr"] for r in trainer.recorder.records if "train/lr" in r]


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("step_s", [[0.7], [0.6, 0.65, 0.7, 0.62], [1.5]])
def test_the_last_update_has_the_schedules_end_and_ends_within_one_update_of_the_budget(
    tmp_path, monkeypatch, schedule, step_s
):
    clock = Clock(monkeypatch, step_s)
    trainer = make_trainer(budget(tmp_path, f"optim.schedule={schedule}"), clock=clock)
    trainer.fit()
    assert rates(trainer)[-1] == pytest.approx(FINAL * trainer.config.optim.lr, rel=1e-12)
    assert LIMIT <= clock.ends[-1] - 100 < LIMIT + max(step_s)
    assert rates(trainer)[2:] == sorted(rates(trainer)[2:], reverse=True) or len(set(step_s)) > 1
    # No stretch of the run is spent at the end of the schedule.
    assert rates(trainer).count(rates(trainer)[-1]) <= 2


@pytest.mark.parametrize(
    ("step_s", "eval_s", "settings"),
    [([0.5] * 55 + [9.0] + [0.5] * 9, 0.0, []), ([0.5], 7.0, ["eval.every=19"])],
    ids=["a slow update", "a long evaluation"],
)
def test_what_overruns_the_budget_is_followed_by_one_update_at_the_schedules_end(
    tmp_path, monkeypatch, step_s, eval_s, settings
):
    clock = Clock(monkeypatch, step_s, eval_s)
    trainer = make_trainer(budget(tmp_path, *settings), clock=clock)
    trainer.fit()
    assert rates(trainer)[-1] == pytest.approx(FINAL * trainer.config.optim.lr, rel=1e-12)
    begun_late = [end for end, s in zip(clock.ends, itertools.cycle(step_s), strict=False) if end - s - 100 >= LIMIT]
    assert len(begun_late) == 1


def test_the_last_evaluation_comes_after_the_budget_and_is_of_the_last_update(tmp_path, monkeypatch):
    clock = Clock(monkeypatch, [0.5], eval_s=5.0)
    trainer = make_trainer(budget(tmp_path), clock=clock)
    trainer.fit()
    assert trainer.progress.evaluated_step == trainer.progress.step == len(clock.ends)
    assert clock.ends[-1] - 100 == pytest.approx(LIMIT, abs=0.5)
    assert clock.now == clock.ends[-1] + 5


def test_a_resumed_run_has_what_is_left_of_the_budget_and_a_finished_one_nothing(tmp_path, monkeypatch):
    config = budget(tmp_path, "checkpoint.every=5")
    clock = Clock(monkeypatch, [0.7])
    with pytest.raises(KeyboardInterrupt):
        make_trainer(config, ListRecorder(stop_at=18), clock=clock).fit()
    clock.now += 5000  # the machine was off
    clock.ends.clear()
    trainer = make_trainer(config, clock=clock)
    resumed_at, spent = clock.now, trainer.progress.elapsed_s
    assert spent == pytest.approx(15 * 0.7)
    trainer.fit()
    assert trainer.recorder.records[0]["time_s"] > spent
    assert LIMIT <= spent + clock.ends[-1] - resumed_at < LIMIT + 0.7
    assert rates(trainer)[-1] == pytest.approx(FINAL * config.optim.lr, rel=1e-12)
    clock.ends.clear()
    make_trainer(config, clock=clock).fit()
    assert not clock.ends


def schedule(**fields):
    """Of 100 steps, without warm-up; fields as section__key."""
    options = {"train.epochs": 0, "train.max_steps": 100, "optim.warmup_steps": 0}
    return Schedule(load_config(None, options | {k.replace("__", "."): v for k, v in fields.items()}), 10)


def test_an_evaluation_between_updates_does_not_count_as_the_length_of_one():
    timed = schedule(train__max_steps=0, train__time_limit=1000, optim__final_lr=0, optim__schedule="linear")
    for step, (begins, evaluated) in enumerate([(0.0, 0), (2.0, 0), (90.0, 1), (92.0, 0), (94.5, 0)]):
        timed.progress.step = step
        timed.progress.evaluated_step = step if evaluated else -1
        timed.begin_step(begins)
    assert timed.next_lr() == pytest.approx(0.002 * (1 - 96.5 / 1000))  # it will take 2 s


def test_steps_or_time_decay_whichever_is_further():
    timed = schedule(train__time_limit=100)
    timed.progress.step, timed.progress.elapsed_s = 50, 20
    assert timed.decay(0) == 0.5
    timed.progress.elapsed_s = 70
    assert timed.decay(5) == 0.75
    assert timed.decay(40) == 1
    assert timed.remaining_s(128 * 128) == 30  # by the nearer limit: a step a second
    assert timed.remaining_s(128 * 128 * 2) == 25


def test_evaluations_are_spread_evenly_over_steps_and_time():
    timed, at = schedule(eval__times=4, eval__every=0, train__time_limit=100, train__max_steps=1000), []
    for step in range(1, 101):
        timed.progress.step, timed.progress.elapsed_s = step, 2.0 * step  # the clock is the nearer limit
        if timed.evaluation_due():
            at.append(step)
            timed.evaluated(1.0)
    assert at == [13, 25, 38, 50]
    without = schedule(eval__every=0)
    without.progress.step = 99
    assert not without.evaluation_due()


@pytest.mark.parametrize(("every", "steps"), [("2s", [5, 9, 12]), (5, [5, 10, 12]), (0, [12])])
def test_records_and_checkpoints_come_by_steps_or_by_time(tmp_path, monkeypatch, every, steps):
    """By time, with the first step that begins after it."""
    clock = Clock(monkeypatch, [0.5])
    settings = [f"log.every={every}", f"checkpoint.every={every}", "eval.every=0"]
    trainer = make_trainer(tiny_config(tmp_path, settings), clock=clock)
    saved, save = [], trainer.checkpoints.save

    def noted(state, **kinds):
        saved.append(state.step)
        save(state, **kinds)

    monkeypatch.setattr(trainer.checkpoints, "save", noted)
    trainer.fit()
    assert [r["step"] for r in trainer.recorder.records if "train/loss" in r] == steps
    assert saved == steps


@pytest.mark.parametrize("every", ["soon", "10", "-1s", 1.5, -1, True])
def test_an_interval_is_steps_or_a_time_with_its_unit(every):
    with pytest.raises(ConfigError, match=r"^log\.every: .*(is no interval; write a number of steps, or a|neither a)"):
        load_config(None, {"log.every": every})
