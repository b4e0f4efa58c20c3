"""Weak scaling: what a training step costs when P processes share the work, and where the time goes.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --rnn GRU --hidden-dim 1024 --rows 16 --json

1 process with 1 thread against P processes with 1 thread each (P = --processes), with the same rows a process. The step
is the training program's own, from `Trainer`: the ranks synchronise, and step; the text is random. Logging, evaluation
and checkpoints are left out.

How it is measured. torchrun starts 2P processes once: P runs of one process, and one run of P processes (gloo). They
take turns; who has none waits on a socket, asleep. In a round each case has one turn, and the order of the cases
rotates from round to round, so that a machine that grows slower or faster does so to all cases alike:

    one        the first of the one-process runs, the other cores idle
    apart      P one-process runs at once: they share caches, memory and clock, but exchange nothing (the control)
    silent     the P-process run under DDP's `no_sync`, and without the synchronisation: nothing is exchanged
    together   the P-process run as it trains
    allreduce  the P-process run exchanges a bare message of the gradients' size

A turn is `--steps` timed steps between two untimed ones: the first finds cold caches, the last keeps the machine busy
until the slowest process is done. A case's time in a round is the mean over its steps and processes. From one round
come the efficiency one / together, which is hardware (one / apart) times communication (apart / together), and the
communication that the backward pass does not hide, together - silent, of which waiting for the slowest process is part.
Printed are medians and quartiles over rounds.

How it is projected. A ring all-reduce of b bytes among N processes takes 2 (N-1)/N b / bandwidth + 2 (N-1) latency:
each of its 2 (N-1) stages sends b / N bytes (Patarasuk and Yuan, "Bandwidth Optimal All-reduce Algorithms for Clusters
of Workstations", 2009, https://doi.org/10.1016/j.jpdc.2008.09.002). A step is then the measured step of one process
plus the all-reduces of all buckets, none of which overlaps with the backward pass. Every process is taken to have
cores, memory and a network link of its own, and the network to be the only cost: what gloo spends on copying and
adding, and the wait for the slowest, are measured but not projected.
"""

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import Cell, Quartiles, columns, machine, machine_line, run
from benchmarks.scaling.estimates import CASES, Metrics, Network, case_metrics, derived, projection, ring_bytes, summary
from benchmarks.scaling.workers import Workers, workers
from benchmarks.training import options_of, write_random_text

PROJECTED = (2, 4, 8, 16, 64)
_WIDTHS = (4, 16, 12)


def measure(started: Workers, steps: int, rounds: int) -> list[Metrics]:
    """Measures rounds; in each of them every case has one turn of `steps` timed steps."""
    for case in CASES:
        started.turn(case, 1)  # DDP arranges its buckets, torch its memory
    measured = []
    for number in range(rounds):
        first, metrics = number % len(CASES), Metrics()
        for case in CASES[first:] + CASES[:first]:
            metrics |= case_metrics(case, started.turn(case, steps))
        measured.append(metrics)
        print(f"round {number + 1}/{rounds}: efficiency {derived(metrics)['efficiency']:.3f}", file=sys.stderr)
    return measured


def make_report(settings: dict[str, Any], buckets: list[int], rounds: list[Metrics]) -> dict[str, Any]:
    """Returns everything that is printed; times in seconds, sizes in bytes."""
    network = Network(settings["bandwidth"] * 1e9 / 8, settings["latency_us"] * 1e-6)
    metrics = summary(rounds)
    sent, step_s = ring_bytes(sum(buckets), settings["processes"]), metrics["one.step"].median
    return {
        "settings": settings,
        "metrics": {name: asdict(spread) for name, spread in metrics.items()},
        "message": {
            "bytes": sum(buckets),
            "bucket_bytes": buckets,
            "ring_bytes": sent,
            "gbit_s": sent / metrics["allreduce.step"].median * 8 / 1e9,
        },
        "projection": [projection(step_s, buckets, n, network) for n in PROJECTED],
        "rounds": rounds,
    }


def table(report: dict[str, Any]) -> str:
    """Formats the report."""
    s, message = report["settings"], report["message"]
    metrics = {name: Quartiles(**values) for name, values in report["metrics"].items()}
    p, sizes = s["processes"], ", ".join(f"{size:,}" for size in message["bucket_bytes"])
    lines = [
        machine_line(report["machine"]),
        f"size     {s['rnn']} {s['num_layers']} x {s['hidden_dim']}, seq_len {s['seq_len']}, "
        f"{s['batch_size']} rows and 1 thread a process, fp32, gloo",
        f"measured {len(report['rounds'])} rounds of {s['steps']} steps a case; median (quartiles) of rounds",
        "",
    ]
    for name, metric in (
        ("1 process, ms a step", "one.step"),
        (f"{p} processes, a run each (control)", "apart.step"),
        (f"{p} processes, one run, no exchange", "silent.step"),
        (f"{p} processes, one run", "together.step"),
        ("exposed communication", "exposed"),
        ("input, 1 process", "one.input"),
        ("bare all-reduce of the gradients", "allreduce.step"),
    ):
        lines.append(f"{name:<36} {metrics[metric].show('.2f', 1e3)}")
    lines.append("")
    for name, note in (
        ("efficiency", "1 process / one run: hardware x communication"),
        ("hardware", "1 process / control: what the cores share"),
        ("communication", "control / one run: exchange and waiting"),
    ):
        lines.append(f"{name:<14} {metrics[name].show('.3f'):<25} {note}")
    lines += [
        "",
        f"message     {message['bytes']:,} bytes of gradients a step, in {len(message['bucket_bytes'])} bucket(s): "
        f"{sizes}; {message['gbit_s']:.1f} Gbit/s each way",
        f"projected for {s['bandwidth']:g} Gbit/s and {s['latency_us']:g} us a message, each process with cores and a "
        "link of its own:",
        "",
        columns(["N", "all-reduce, ms", "efficiency"], _WIDTHS),
    ]
    for row in report["projection"]:
        cells = [row["processes"], f"{row['allreduce_s'] * 1e3:.2f}", f"{row['efficiency']:.3f}"]
        lines.append(columns(cells, _WIDTHS))
    return "\n".join(lines)


def scaling(
    rnn: Annotated[Cell, typer.Option(help="Recurrent cell.")] = Cell.LSTM,
    hidden_dim: Annotated[int, typer.Option(help="Width of a layer's state.", min=1)] = 256,
    num_layers: Annotated[int, typer.Option(help="Recurrent layers.", min=1)] = 2,
    seq_len: Annotated[int, typer.Option(help="Characters of a window.", min=1)] = 128,
    rows: Annotated[int, typer.Option(help="Windows a process and step.", min=1)] = 32,
    processes: Annotated[int, typer.Option(help="Processes compared with one.", min=2)] = 2,
    steps: Annotated[int, typer.Option(help="Timed steps a turn.", min=1)] = 5,
    rounds: Annotated[int, typer.Option(help="Turns of each case.", min=2)] = 20,
    bandwidth: Annotated[float, typer.Option(help="Gbit/s of a process's link, for the projection.", min=0.001)] = 10.0,
    latency_us: Annotated[float, typer.Option(help="Microseconds a message takes whatever its size.", min=0)] = 50.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, every round included.")] = False,
) -> None:
    """Measure weak scaling on this machine's cores, and project it to a network."""
    size: dict[str, Any] = {"rnn": rnn, "hidden_dim": hidden_dim, "num_layers": num_layers}
    size |= {"seq_len": seq_len, "batch_size": rows}
    settings = size | {"processes": processes, "steps": steps, "rounds": rounds, "bandwidth": bandwidth}
    settings |= {"latency_us": latency_us}
    here = machine()
    with tempfile.TemporaryDirectory() as folder:
        options = options_of(Path(folder), **size)
        write_random_text(options, processes)
        with workers(options, processes) as started:
            taken = measure(started, steps, rounds)
            buckets = started.buckets()
    result = {"machine": here, **make_report(settings, buckets, taken)}
    print(json.dumps(result) if as_json else table(result))


if __name__ == "__main__":
    run(scaling)
