"""Weak scaling: what a training step costs when P processes share the work, and where the time goes.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --rnn GRU --hidden-dim 1024 --rows 16 --processes 4

P ranks of one thread each (gloo) make the training program's own steps, with the same rows a rank, on random text;
logging, evaluation and checkpoints are left out. In a round each case has one turn, and the order of the cases rotates
from round to round, so that a machine that grows slower or faster does so to all cases alike:

    one        rank 0 under DDP's `no_sync`; the others wait at a barrier, asleep
    apart      all ranks like that at once: they share caches, memory and clock, but exchange nothing (the control)
    together   all ranks as they train: they synchronise, and step
    allreduce  a bare message of the gradients' size

A turn is `--steps` timed steps between two untimed ones: the first finds cold caches, the last keeps the machine busy
until the slowest rank is done. A case's time in a round is the mean over its steps and ranks. From one round come the
efficiency one / together, which is hardware (one / apart) times communication (apart / together). Printed are medians
and quartiles over rounds.

How it is projected. A ring all-reduce of b bytes among N processes takes 2 (N-1)/N b / bandwidth + 2 (N-1) latency:
each of its 2 (N-1) stages sends b / N bytes (Patarasuk and Yuan, "Bandwidth Optimal All-reduce Algorithms for Clusters
of Workstations", 2009, https://doi.org/10.1016/j.jpdc.2008.09.002). A step is then the measured step of one process
plus the all-reduces of all buckets, none of which overlaps with the backward pass. Every process is taken to have
cores, memory and a network link of its own, and the network to be the only cost.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer

from benchmarks.common import (
    Cell,
    HiddenDim,
    NumLayers,
    Rnn,
    SeqLen,
    columns,
    free_port,
    machine_line,
    quartiles,
    ratios,
    run,
    seconds_of,
)
from benchmarks.training import make_trainer, options_of, write_random_text
from charrnn.config import load_config
from train.loop.trainer import Trainer

CASES = ("one", "apart", "together", "allreduce")
_PROJECTED = (2, 4, 8, 16, 64)
_WIDTHS = (4, 16, 12)
_FOLDER = "CHARRNN_SCALING"  # of the text, told to the ranks

Times = dict[str, list[float]]  # name -> seconds, one a round


class Rank:
    """One rank, which takes the cases' turns with the others."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.rank, self.world = trainer, dist.get_rank(), dist.get_world_size()
        self.parameters = list(trainer.model.parameters())
        self.buffer = torch.cat([torch.zeros_like(p).flatten() for p in self.parameters])

    def turn(self, case: str, steps: int) -> float:
        """Takes an untimed step, `steps` timed ones and an untimed one; returns the seconds of a step, on all ranks."""
        trainer, before = self.trainer, self.trainer.progress.step
        alone = trainer.accelerator.no_sync(trainer.update.loss_module)
        dist.barrier()
        seconds: list[float] = []
        with contextlib.nullcontext() if case in ("together", "allreduce") else alone:
            if case != "one" or self.rank == 0:
                seconds = [seconds_of(lambda: self._step(case)) for _ in range(steps + 2)][1:-1]
        trainer.progress.step = before  # the ranks agree on the batch
        taken: list[Any] = [None] * self.world
        dist.all_gather_object(taken, seconds)
        return fmean(s for of_rank in taken for s in of_rank)

    def _step(self, case: str) -> None:
        if case == "allreduce":
            dist.all_reduce(self.buffer)
            return
        if case == "together":
            self.trainer.next_step()
        self.trainer.train_step()

    def input_seconds(self) -> float:
        """Reads one batch's windows."""
        data = self.trainer.data
        starts = data.plan.batch(0).starts[data.rows]
        return seconds_of(lambda: data.train.windows(starts, data.plan.seq_len + 1))

    def measure(self, steps: int, rounds: int) -> Times:
        """Measures rounds; in each of them every case has one turn of `steps` timed steps."""
        for case in CASES:
            self.turn(case, 1)  # DDP arranges its buckets, torch its memory
        taken: Times = {name: [] for name in (*CASES, "input")}
        for number in range(rounds):
            first = number % len(CASES)
            for case in CASES[first:] + CASES[:first]:
                taken[case].append(self.turn(case, steps))
            taken["input"].append(self.input_seconds())
        return taken

    def buckets(self) -> list[int]:
        """Returns the bytes of gradients in each bucket that DDP arranged after its first step."""
        module: Any = self.trainer.update.loss_module
        indices = module._get_ddp_logging_data()["rebuilt_per_bucket_param_indices"].split(",")
        sizes = [p.numel() * p.element_size() for p in self.parameters]
        return [sum(sizes[int(i)] for i in bucket.split()) for bucket in indices]


def ring_seconds(size: float, processes: int, bandwidth: float, latency: float) -> float:
    """Returns the time of a ring all-reduce of `size` bytes at `bandwidth` bytes/s and `latency` seconds a message."""
    return 2 * (processes - 1) * (size / processes / bandwidth + latency)


def table(taken: Times, buckets: Sequence[int], processes: int, bandwidth: float, latency_us: float) -> list[str]:
    """Formats the report. buckets: bytes of each. bandwidth: Gbit/s."""
    lines = []
    for name, case in (
        ("1 process, ms a step", "one"),
        (f"{processes} processes, no exchange (control)", "apart"),
        (f"{processes} processes", "together"),
        ("input", "input"),
        ("bare all-reduce of the gradients", "allreduce"),
    ):
        lines.append(f"{name:<36} {quartiles(taken[case]).show('.2f', 1e3)}")
    lines.append("")
    for name, over, under, note in (
        ("efficiency", "one", "together", "1 process / all: hardware x communication"),
        ("hardware", "one", "apart", "1 process / control: what the cores share"),
        ("communication", "apart", "together", "control / all: exchange and waiting"),
    ):
        lines.append(f"{name:<14} {ratios(taken[over], taken[under]).show('.3f'):<25} {note}")
    step_s, size = quartiles(taken["one"]).median, sum(buckets)
    rate = 2 * (processes - 1) / processes * size / quartiles(taken["allreduce"]).median * 8 / 1e9
    lines += [
        "",
        f"message  {size:,} bytes of gradients a step, in {len(buckets)} bucket(s); {rate:.1f} Gbit/s each way",
    ]
    lines += [f"projected for {bandwidth:g} Gbit/s and {latency_us:g} us a message", ""]
    lines.append(columns(["N", "all-reduce, ms", "efficiency"], _WIDTHS))
    for n in _PROJECTED:
        allreduce = sum(ring_seconds(b, n, bandwidth * 1e9 / 8, latency_us * 1e-6) for b in buckets)
        lines.append(columns([n, f"{allreduce * 1e3:.2f}", f"{step_s / (step_s + allreduce):.3f}"], _WIDTHS))
    return lines


def launch(folder: Path, size: dict[str, Any], processes: int) -> int:
    """Writes the text and starts this command again in each rank; returns torchrun's exit code."""
    write_random_text(options_of(folder, **size))
    # `accelerate launch --cpu --num_processes 2` starts one process (accelerate#2741).
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    command += [f"--master_port={free_port()}", "-m", "benchmarks.scaling", *sys.argv[1:]]
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", _FOLDER: str(folder)}
    return subprocess.run(command, env=os.environ | environment).returncode


def scaling(
    rnn: Rnn = Cell.LSTM,
    hidden_dim: HiddenDim = 256,
    num_layers: NumLayers = 2,
    seq_len: SeqLen = 128,
    rows: Annotated[int, typer.Option(help="Windows a process and step.", min=1)] = 32,
    processes: Annotated[int, typer.Option(help="Processes compared with one.", min=2)] = 2,
    steps: Annotated[int, typer.Option(help="Timed steps a turn.", min=1)] = 5,
    rounds: Annotated[int, typer.Option(help="Turns of each case.", min=2)] = 20,
    bandwidth: Annotated[float, typer.Option(help="Gbit/s of a process's link, for the projection.", min=0.001)] = 10.0,
    latency_us: Annotated[float, typer.Option(help="Microseconds a message takes whatever its size.", min=0)] = 50.0,
) -> None:
    """Measure weak scaling on this machine's cores, and project it to a network."""
    size = {"rnn": rnn, "hidden_dim": hidden_dim, "num_layers": num_layers, "seq_len": seq_len}
    size |= {"batch_size": rows * processes}
    if _FOLDER not in os.environ:
        with tempfile.TemporaryDirectory() as folder:
            raise typer.Exit(launch(Path(folder), size, processes))
    rank = Rank(make_trainer(load_config(None, options_of(Path(os.environ[_FOLDER]), **size))))
    taken, buckets = rank.measure(steps, rounds), rank.buckets()
    if rank.rank == 0:
        print(machine_line())
        print(
            f"size     {rnn} {num_layers} x {hidden_dim}, seq_len {seq_len}, {rows} rows and 1 thread a process, "
            "fp32, gloo"
        )
        print(f"measured {rounds} rounds of {steps} steps a case; median (quartiles) of rounds\n")
        print("\n".join(table(taken, buckets, processes, bandwidth, latency_us)), flush=True)
    dist.barrier()
    os._exit(0)  # without the tear-down in which torch's threads may abort the process


if __name__ == "__main__":
    run(scaling)
