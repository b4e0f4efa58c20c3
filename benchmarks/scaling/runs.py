"""The runs that scaling.py measures: the processes that train, started by torchrun, and the parent's end of them."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch

from benchmarks.machine import free_port
from benchmarks.random_text import make_trainer
from benchmarks.scaling.estimates import Answer, Figures, Message

_LOOK_AT_LAUNCHERS_S = 1.0


class Worker:
    """One rank of a run, which measures what it is told to."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.trainer = make_trainer(options)
        self.rank, self.count = self.trainer.collectives.rank, self.trainer.collectives.world_size
        self.parameters = list(self.trainer.model.parameters())
        self.sizes = [p.numel() * p.element_size() for p in self.parameters]
        buffer = torch.cat([torch.zeros_like(p).flatten() for p in self.parameters])
        self._exchange = lambda: torch.distributed.all_reduce(buffer)
        self._marks: dict[Any, float] = {}
        self._watch()

    def _watch(self) -> None:
        """Marks when the forward pass begins and ends, and when each parameter's gradient is there."""

        def mark(key: Any) -> None:
            self._marks[key] = time.perf_counter()

        self.trainer.loss_module.register_forward_pre_hook(lambda *_: mark("forward began"))
        self.trainer.loss_module.register_forward_hook(lambda *_: mark("forward ended"))
        for i, parameter in enumerate(self.parameters):
            parameter.register_post_accumulate_grad_hook(lambda _, i=i: mark(i))

    def turn(self, case: str, steps: int) -> Answer:
        """An untimed step, `steps` timed ones, an untimed step."""
        once = {"silent": self._silent, "allreduce": self._allreduce}.get(case, self._step)
        cpu_began = time.process_time()
        once()
        cpu, wall = time.process_time(), time.perf_counter()
        taken = [once() for _ in range(steps)]
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        once()
        cpu_s = time.process_time() - cpu_began
        ready = [fmean(times) for times in zip(*(gradients for _, gradients in taken), strict=True)]
        return Answer([seconds for seconds, _ in taken], cpu / wall, cpu_s, ready)

    def _step(self, agree: bool = True) -> tuple[Figures, list[float]]:
        """Times one turn of the training loop: the ranks agree to go on, and update.

        Before it, on their own, the two calls that bring the update's windows.
        """
        trainer = self.trainer
        began = time.perf_counter()
        batch = trainer.plan.batch(trainer.progress.step)
        trainer.train_ids.windows(batch.starts[trainer.rows], trainer.plan.seq_len + 1)
        step_began = time.perf_counter()
        if agree:
            trainer._go_on()
        trainer.train_step()
        ended = time.perf_counter()
        gradients = [self._marks[i] for i in range(len(self.parameters))]
        forward_ended, backward_ended = self._marks["forward ended"], max(gradients)
        seconds = {
            "input": step_began - began,
            "forward": forward_ended - self._marks["forward began"],
            "backward": backward_ended - forward_ended,
            "update": ended - backward_ended,
            "step": ended - step_began,
        }
        return seconds, [at - forward_ended for at in gradients]

    def _silent(self) -> tuple[Figures, list[float]]:
        with self.trainer.accelerator.no_sync(self.trainer.loss_module):
            return self._step(agree=False)

    def _allreduce(self) -> tuple[Figures, list[float]]:
        began = time.perf_counter()
        self._exchange()
        return {"step": time.perf_counter() - began}, []

    def message(self) -> Message:
        """The gradients, in the buckets that DDP arranged after its first step."""
        log = self.trainer.loss_module._get_ddp_logging_data()
        buckets = log["rebuilt_per_bucket_param_indices"].split(",")
        return Message(self.sizes, [[int(i) for i in bucket.split()] for bucket in buckets])


def work(port: int, options: dict[str, Any]) -> None:
    """A worker's life: says who it is, takes its turns, and leaves when the parent hangs up."""
    worker = Worker(options)
    with socket.create_connection(("127.0.0.1", port)) as connection, connection.makefile("rw") as stream:
        print(json.dumps({"rank": worker.rank, "count": worker.count}), file=stream, flush=True)
        for line in stream:
            order = json.loads(line)
            reply = worker.turn(**order) if order else worker.message()
            print(json.dumps(asdict(reply)), file=stream, flush=True)
    os._exit(0)  # without the tear-down in which torch's threads may abort the process


class Peer:
    """The parent's end of a worker."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._stream = connection, connection.makefile("rw")
        who = self.read()
        self.rank, self.count = who["rank"], who["count"]

    def read(self) -> Any:
        """The next reply. Raises: RuntimeError when the worker has ended."""
        line = self._stream.readline()
        if not line:
            raise RuntimeError("a worker ended; its last words are above")
        return json.loads(line)

    def tell(self, **order: Any) -> None:
        """Gives an order."""
        print(json.dumps(order), file=self._stream, flush=True)

    def hang_up(self) -> None:
        """Lets the worker leave."""
        self._connection.shutdown(socket.SHUT_RDWR)


@dataclass(frozen=True)
class Crew:
    """singles: the runs of one process. ranks: the processes of the one run, in order."""

    singles: list[Peer]
    ranks: list[Peer]

    def turn(self, case: str, steps: int) -> list[Answer]:
        """All processes of a case at once."""
        peers = {"one": self.singles[:1], "apart": self.singles}.get(case, self.ranks)
        for peer in peers:
            peer.tell(case=case, steps=steps)
        return [Answer(**peer.read()) for peer in peers]

    def message(self) -> Message:
        """The gradients; DDP must have made a step or two before."""
        self.ranks[0].tell()
        return Message(**self.ranks[0].read())


@contextlib.contextmanager
def hired(options: dict[str, Any], processes: int) -> Iterator[Crew]:
    """Both kinds of run, ready and waiting. options: of a run of one process; the other has as many rows a process."""
    together = {**options, "data.batch_size": options["data.batch_size"] * processes}
    launchers: list[subprocess.Popen[bytes]] = []
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            launchers += [_launch(1, port, options) for _ in range(processes)]
            launchers += [_launch(processes, port, together)]
            peers = _gather(server, 2 * processes, launchers)
        singles = [p for p in peers if p.count == 1]
        ranks = sorted((p for p in peers if p.count == processes), key=lambda p: p.rank)
        assert len(singles) == len(ranks) == processes, "torchrun started other processes than it was told to"
        yield Crew(singles, ranks)
        for peer in peers:
            peer.hang_up()
        for launcher in launchers:
            launcher.wait()
    finally:
        for launcher in launchers:
            launcher.terminate()
            launcher.wait()


def _launch(processes: int, port: int, options: dict[str, Any]) -> "subprocess.Popen[bytes]":
    """torchrun on the CPU: `accelerate launch --cpu --num_processes 2` starts one process (accelerate#2741)."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    command += [f"--master_port={free_port()}", "-m", "benchmarks.scaling.runs"]
    command += [json.dumps({"port": port, "options": options})]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=sys.stderr)


def _gather(server: socket.socket, count: int, launchers: "list[subprocess.Popen[bytes]]") -> list[Peer]:
    server.settimeout(_LOOK_AT_LAUNCHERS_S)
    peers: list[Peer] = []
    while len(peers) < count:
        if any(launcher.poll() is not None for launcher in launchers):
            raise RuntimeError("a worker ended before it was ready; its last words are above")
        with contextlib.suppress(TimeoutError):
            connection, _ = server.accept()
            connection.settimeout(None)
            peers.append(Peer(connection))
    return peers


if __name__ == "__main__":
    work(**json.loads(sys.argv[1]))
