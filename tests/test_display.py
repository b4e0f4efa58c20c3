"""What a user sees while a run goes on."""

import io

import pytest
from rich.console import Console

from train.tracking.console import ConsoleHandler, Display, format_duration

RECORD = {"train/loss": 1.8324, "train/bpc": 2.6436, "train/chars_per_s": 18032.4, "train/lr": 0.002}
EVALUATION = {
    "val/stream/loss": 1.5, "val/stream/bpc": 2.164, "val/windows/loss": 1.52, "val/windows/bpc": 2.193,
    "sample": "ROMEO:\n[bold]What?",
}  # fmt: skip


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (40.6, "41s"), (59.6, "1m00s"), (192, "3m12s"), (7500, "2h05m"), (360000, "4d04h"), (-3, "0s")],
)
def test_durations_read_well(seconds, text):
    assert format_duration(seconds) == text


def plain(clock):
    out = io.StringIO()
    console = Console(file=out, width=40)
    return out, Display(5000, 490, lambda: 0.05, lambda speed: 3.4e6 / speed, console=console, clock=clock)


def test_without_a_terminal_a_record_is_one_whole_line():
    clock = Clock()
    out, display = plain(clock)
    with display:
        clock.now += 10
        display.update({"step": 250, **RECORD})
    assert out.getvalue() == (
        "step 250/5,000  epoch 0.51  loss 1.8324  2.644 bits/char  18,032 chars/s  lr 2.00e-03  left 3m09s\n"
    )


def test_without_a_terminal_only_training_lines_are_thinned():
    clock = Clock()
    out, display = plain(clock)
    with display:
        for step in range(1, 101):
            clock.now += 0.1
            display.update({"step": step, **RECORD})
            if step % 25 == 0:
                display.update({"step": step, **EVALUATION})
    lines = out.getvalue().splitlines()
    assert sum(line.startswith("step") and "validation" not in line for line in lines) == 2
    assert sum("validation  stream 1.5000 nats 2.1640 bits  windows 1.5200" in line for line in lines) == 4
    assert lines.count("  | [bold]What?") == 4


def test_a_terminal_shows_a_bar_with_all_metrics():
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, force_terminal=True, width=160)
    with Display(5000, 490, lambda: 0.05, lambda speed: 190, console=console, clock=clock) as display:
        clock.now += 10
        display.update({"step": 250, **RECORD})
        ConsoleHandler(console).show("a word [in brackets]")
        display._bar.refresh()
    shown = out.getvalue()
    for part in ("250/5,000", "epoch 0.51", "loss 1.8324", "2.644 bits/char", "18,032 chars/s", "lr 2.00e-03", "3m10s"):
        assert part in shown, part
    assert "a word [in brackets]" in shown


def test_a_resumed_run_shows_its_step_before_the_first_record():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=160)
    with Display(5000, 490, lambda: 0.4, lambda speed: 190, start_step=2000, console=console):
        pass
    assert "step 2,000/5,000" in out.getvalue()


def test_the_bar_fits_80_columns():
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, force_terminal=True, width=80)
    with Display(500_000, 4900, lambda: 0.25, lambda speed: 1_216_800, console=console, clock=clock) as display:
        clock.now += 400_000
        display.update({"step": 123_456, **RECORD, "train/chars_per_s": 12_345_678.0})
        display._bar.refresh()
        shown = out.getvalue()
    for part in ("━━", "123,456/500,000", "epoch 25.20", "12,345,678 chars/s", "lr 2.00e-03", "left 14d02h"):
        assert part in shown, part


@pytest.mark.parametrize("dumb", [True, False])
def test_the_bar_is_for_terminals_that_can_redraw(monkeypatch, dumb):
    monkeypatch.setenv("TERM", "dumb" if dumb else "xterm")
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with Display(5000, 490, lambda: 0.05, lambda speed: 190, console=console) as display:
        display.update({"step": 250, **RECORD})
    assert ("━━" not in out.getvalue()) == dumb
    assert out.getvalue().startswith("step 250/5,000") == dumb


def test_a_sample_cannot_steer_the_terminal():
    out, display = plain(Clock())
    with display:
        display.update({"step": 1, "sample": "a\x1b[2Jb\x9b\u3000c\n:smile:"})
    assert out.getvalue() == "  | a\\x1b[2Jb\\x9b\u3000c\n  | :smile:\n"
