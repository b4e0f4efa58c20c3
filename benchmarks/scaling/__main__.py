"""Weak scaling: what a training step costs when P processes share the work, and where the time goes.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --rnn GRU --hidden-dim 1024 --rows 16 --json

1 process with 1 thread against P processes with 1 thread each (P = --processes), with the same rows a process. The step
is the training program's own, from `Trainer`: the ranks agree to go on, and update; the text is random. Logging,
evaluation and checkpoints are left out.

How it is measured. torchrun starts 2P processes once: P runs of one process, and one run of P processes (gloo). They
take turns; who has none waits on a socket, asleep. In a round each case has one turn, and the order of the cases moves
on from round to round, so that a machine that grows slower or faster does so to all cases alike:

    one        the first of the one-process runs, the other cores idle
    apart      P one-process runs at once: they share caches, memory and clock, but exchange nothing (the control)
    silent     the P-process run under DDP's `no_sync`, and without the agreement: nothing is exchanged
    together   the P-process run as it trains
    allreduce  the P-process run exchanges a bare message of the gradients' size

A turn is `--steps` timed steps between two untimed ones: the first finds cold caches, the last keeps the machine busy
until the slowest process is done. A case's time in a round is the mean over its steps and processes. From one round
come the efficiency one / together, which is hardware (one / apart) times communication (apart / together), and the
communication that the backward pass does not hide, together - silent. Part of that is waiting for the slowest process:
how much, the steps of `silent` tell, as the mean of the longest of the processes' i-th steps less the mean of all.
Printed are medians and quartiles over rounds. A round in which other programs (or the host of a virtual machine) took
more than --others of a core is set aside, whatever its result, and measured again; the table says how many were.
--patience has it wait, before a round, for the others to rest.

How it is projected. A ring all-reduce of b bytes among N processes takes 2 (N-1)/N b / bandwidth + 2 (N-1) latency:
each of its 2 (N-1) stages sends b / N bytes (Patarasuk and Yuan, "Bandwidth Optimal All-reduce Algorithms for Clusters
of Workstations", 2009, https://doi.org/10.1016/j.jpdc.2008.09.002). A step is then the measured step of one process
plus, without overlap, the all-reduces of all buckets. With overlap, a bucket's all-reduce begins when its last gradient
is there, measured in the backward pass of one process, and the bucket before has gone through; only what lasts longer
than the backward pass is added. Every process is taken to have cores, memory and a network link of its own, and the
network to be the only cost: what gloo spends on copying and adding, and the wait for the slowest, are measured but not
projected. cuDNN hands over the gradients of all layers at once: on a GPU the figure without overlap is the nearer one.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from benchmarks.machine import machine
from benchmarks.random_text import config_options, write_text
from benchmarks.scaling.estimates import (
    CASES,
    Figures,
    Measured,
    Network,
    Round,
    case_figures,
    derived,
    projection,
    ring_bytes,
    summary,
)
from benchmarks.scaling.runs import Crew, hired
from charrnn.config import load_config
from charrnn.errors import CharRNNError

PROJECTED = (2, 4, 8, 16, 64)
# Disturbed rounds for each one that is wanted, before all are taken as they are.
MOST_ASIDE = 2
_QUIET_S = 2.0

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def measure(crew: Crew, steps: int, rounds: int, most_others: float, patience_s: float) -> Measured:
    """Rounds until `rounds` of them were undisturbed: others took at most `most_others` of a core.

    patience_s: how long to wait, in all, for others to grow quiet before a round.
    """
    deadline = time.perf_counter() + patience_s
    for case in CASES:
        crew.turn(case, 1)  # DDP arranges its buckets, torch its memory
    message = crew.message()
    kept: list[Round] = []
    aside: list[Round] = []
    while len(kept) < rounds and len(aside) < MOST_ASIDE * rounds:
        wait_for_quiet(most_others, deadline)
        first = (len(kept) + len(aside)) % len(CASES)
        done = measure_round(crew, CASES[first:] + CASES[:first], steps)
        undisturbed = done.figures.get("others", 0.0) <= most_others
        (kept if undisturbed else aside).append(done)
        print(
            f"round {len(kept)}/{rounds}{'' if undisturbed else ' again'}: efficiency "
            f"{derived(done.figures)['efficiency']:.3f}, others took {done.figures.get('others', 0.0):.2f} of a core",
            file=sys.stderr,
        )
    return Measured(message, kept, aside) if len(kept) == rounds else Measured(message, kept + aside, [])


def measure_round(crew: Crew, cases: Sequence[str], steps: int) -> Round:
    """One turn of each of `cases`, in this order."""
    figures: Figures = {}
    ready: list[float] = []
    began, busy, own = time.perf_counter(), busy_seconds(), 0.0
    for case in cases:
        sent = loopback_bytes()
        answers = crew.turn(case, steps)
        figures |= case_figures(case, answers)
        own += sum(a.cpu_s for a in answers)
        if case == "one":
            ready = answers[0].ready
        elif case == "together" and sent is not None:
            figures["wire"] = ((loopback_bytes() or 0) - sent) / len(answers) / (steps + 2)
    if busy is not None:
        figures["others"] = ((busy_seconds() or 0) - busy - own) / (time.perf_counter() - began)
    return Round(figures, ready)


def wait_for_quiet(most_others: float, deadline: float) -> None:
    """Returns once others took at most `most_others` of a core for a while, or at `deadline`. The workers sleep."""
    while (before := busy_seconds()) is not None and time.perf_counter() < deadline:
        time.sleep(_QUIET_S)
        if (busy_seconds() or 0) - before <= most_others * _QUIET_S:
            return


def busy_seconds() -> float | None:
    """Processor seconds that this machine has worked so far, or was kept from its own by the host; None as below."""
    path = Path("/proc/stat")
    if not path.exists():
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, path.read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def loopback_bytes() -> int | None:
    """Bytes that the loopback interface has sent so far, headers and others' included; None off Linux."""
    path = Path("/proc/net/dev")
    lines = path.read_text().splitlines() if path.exists() else []
    sent = [int(line.split(":")[1].split()[8]) for line in lines if line.strip().startswith("lo:")]
    return sent[0] if sent else None


def make_report(settings: dict[str, Any], measured: Measured) -> dict[str, Any]:
    """Everything that is printed; times in seconds, sizes in bytes."""
    network = Network(settings["bandwidth"] * 1e9 / 8, settings["latency_us"] * 1e-6)
    message, rounds = measured.message, [r.figures for r in measured.rounds]
    figures = summary(rounds)
    sent = ring_bytes(message.total, settings["processes"])
    step_s = figures["one.step"].median
    return {
        "settings": settings,
        "figures": {name: asdict(quartiles) for name, quartiles in figures.items()},
        "message": {
            "bytes": message.total,
            "bucket_bytes": message.bucket_sizes,
            "ring_bytes": sent,
            "wire_bytes": figures["wire"].median if "wire" in figures else None,
            "gbit_s": sent / figures["allreduce.step"].median * 8 / 1e9,
        },
        "projection": [projection(step_s, message, measured.ready, n, network) for n in PROJECTED],
        "rounds": rounds,
        "aside": [r.figures for r in measured.aside],
    }


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    parts = (_head, _cases, _parts, _efficiency, _message, _projected)
    return "\n\n".join("\n".join(part(report)) for part in parts)


def _head(report: dict[str, Any]) -> list[str]:
    m, s = report["machine"], report["settings"]
    return [
        f"machine   {m['cpu']}, {m['cores']} cores; torch {m['torch']}, accelerate {m['accelerate']}; {m['time']}",
        f"size      {s['rnn']} {s['num_layers']} x {s['hidden_dim']}, seq_len {s['seq_len']}, {s['rows']} rows and "
        "1 thread a process, fp32, gloo",
        f"measured  {len(report['rounds'])} rounds of {s['steps']} steps a case; median (quartiles) of rounds",
        f"others    {_others(report)}",
    ]


def _others(report: dict[str, Any]) -> str:
    if "others" not in report["figures"]:
        return "unknown what other programs took"
    most = max(figures["others"] for figures in report["rounds"])
    return f"other programs took up to {most:.2f} of a core; rounds set aside for more: {len(report['aside'])}"


def _cases(report: dict[str, Any]) -> list[str]:
    p = report["settings"]["processes"]
    names = {
        "one": "1 process",
        "apart": f"{p} processes, a run each (control)",
        "silent": f"{p} processes, one run, no exchange",
        "together": f"{p} processes, one run",
    }
    rows = [f"{'':<36} {'ms a step':<26} CPU a process"]
    for case, name in names.items():
        figures = report["figures"]
        rows.append(f"{name:<36} {_ms(figures[f'{case}.step']):<26} {figures[f'{case}.cpu']['median']:.2f}")
    return rows


def _parts(report: dict[str, Any]) -> list[str]:
    p = report["settings"]["processes"]
    rows = [
        ("of which, ms", "1 process", f"{p} processes"),
        ("input", "one.input", "silent.input"),
        ("compute", "one.compute", "silent.compute"),
        ("  forward", "one.forward", "silent.forward"),
        ("  backward", "one.backward", "silent.backward"),
        ("  clip, update", "one.update", "silent.update"),
        ("communication, exposed", "", "exposed"),
        ("  waiting for the slowest", "", "silent.skew"),
    ]
    figures = {name: _ms(quartiles) for name, quartiles in report["figures"].items()}
    return [f"{name:<36} {figures.get(one, one):<26} {figures.get(many, many)}" for name, one, many in rows]


def _efficiency(report: dict[str, Any]) -> list[str]:
    notes = {
        "efficiency": "1 process / one run: hardware x communication",
        "hardware": "1 process / control: what the cores share",
        "communication": "control / one run: exchange and waiting",
    }
    return [f"{name:<14} {_ratio(report['figures'][name]):<21} {note}" for name, note in notes.items()]


def _message(report: dict[str, Any]) -> list[str]:
    m = report["message"]
    sizes = ", ".join(f"{size:,}" for size in m["bucket_bytes"])
    wire = f"{m['wire_bytes']:,.0f}" if m["wire_bytes"] is not None else "unknown"
    return [
        f"message     {m['bytes']:,} bytes of gradients a step, in {len(m['bucket_bytes'])} bucket(s): {sizes}",
        f"on the wire {wire} bytes a process and step, headers included; a ring sends {m['ring_bytes']:,.0f}",
        f"all-reduce  {_ms(report['figures']['allreduce.step'])} ms for a bare message of that size: "
        f"{m['gbit_s']:.1f} Gbit/s each way",
    ]


def _projected(report: dict[str, Any]) -> list[str]:
    s = report["settings"]
    rows = [
        f"projected for {s['bandwidth']:g} Gbit/s and {s['latency_us']:g} us a message, "
        "each process with cores and a link of its own:",
        f"{'':>4} {'all-reduce, ms':>15} {'efficiency':>11} {'exposed, ms':>12} {'efficiency':>11}",
        f"{'N':>4} {'no overlap':>15} {'no overlap':>11} {'overlap':>12} {'overlap':>11}",
    ]
    for row in report["projection"]:
        rows.append(
            f"{row['processes']:>4} {row['allreduce_s'] * 1e3:>15.2f} {row['efficiency_without_overlap']:>11.3f} "
            f"{row['exposed_s'] * 1e3:>12.2f} {row['efficiency']:>11.3f}"
        )
    return rows


def _ms(quartiles: dict[str, float]) -> str:
    low, middle, high = (f"{quartiles[name] * 1e3:.2f}" for name in ("q1", "median", "q3"))
    return f"{middle} ({low} to {high})"


def _ratio(quartiles: dict[str, float]) -> str:
    return f"{quartiles['median']:.3f} ({quartiles['q1']:.3f} to {quartiles['q3']:.3f})"


@app.command()
def scaling(
    rnn: Annotated[Literal["GRU", "LSTM"], typer.Option(help="Recurrent cell.")] = "LSTM",
    hidden_dim: Annotated[int, typer.Option(help="Width of a layer's state.", min=1)] = 256,
    num_layers: Annotated[int, typer.Option(help="Recurrent layers.", min=1)] = 2,
    seq_len: Annotated[int, typer.Option(help="Characters of a window.", min=1)] = 128,
    rows: Annotated[int, typer.Option(help="Windows a process and step.", min=1)] = 32,
    processes: Annotated[int, typer.Option(help="Processes compared with one.", min=2)] = 2,
    steps: Annotated[int, typer.Option(help="Timed steps a turn.", min=1)] = 5,
    rounds: Annotated[int, typer.Option(help="Turns of each case.", min=2)] = 20,
    bandwidth: Annotated[float, typer.Option(help="Gbit/s of a process's link, for the projection.", min=0.001)] = 10.0,
    latency_us: Annotated[float, typer.Option(help="Microseconds a message takes whatever its size.", min=0)] = 50.0,
    others: Annotated[
        float, typer.Option(help="Share of a core; a round in which other programs take more is measured again.", min=0)
    ] = 0.05,
    patience: Annotated[float, typer.Option(help="Seconds to wait, in all, for other programs to rest.", min=0)] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, every round included.")] = False,
) -> None:
    """Measure weak scaling on this machine's cores, and project it to a network."""
    settings: dict[str, Any] = {
        "rnn": rnn,
        "hidden_dim": hidden_dim,
        "num_layers": num_layers,
        "seq_len": seq_len,
        "rows": rows,
        "processes": processes,
        "steps": steps,
        "rounds": rounds,
        "bandwidth": bandwidth,
        "latency_us": latency_us,
        "others": others,
        "patience": patience,
    }
    here = machine()
    with tempfile.TemporaryDirectory() as folder:
        options = config_options(Path(folder), settings)
        write_text(load_config(None, options), processes)
        with hired(options, processes) as crew:
            measured = measure(crew, steps, rounds, others, patience)
    if len(measured.rounds) > rounds:
        print(
            f"warning: fewer than {rounds} of {len(measured.rounds)} rounds were undisturbed, so all of them count and "
            "the figures are other programs' as well; measure again on a quiet machine",
            file=sys.stderr,
        )
    result = {"machine": here, **make_report(settings, measured)}
    print(json.dumps(result) if as_json else table(result))


def main() -> None:
    """Runs the command line; a user's fault is one line on stderr."""
    try:
        app()
    except CharRNNError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
