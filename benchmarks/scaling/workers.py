"""The processes that benchmarks.scaling measures, started by torchrun, and the parent's connections to them."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection
from statistics import fmean
from typing import Any

import torch

from benchmarks.common import free_port
from benchmarks.scaling.estimates import Message, Metrics, Turn
from benchmarks.training import make_trainer, synchronize
from charrnn.config import load_config

_CHECK_LAUNCHERS_S = 1.0


class Worker:
    """One rank of a run, which measures the cases it is asked for."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.trainer = make_trainer(load_config(None, options))
        self.parameters = list(self.trainer.model.parameters())
        self.sizes = [p.numel() * p.element_size() for p in self.parameters]
        self._buffer = torch.cat([torch.zeros_like(p).flatten() for p in self.parameters])
        self._marks: dict[Any, float] = {}

        def mark(key: Any) -> None:
            self._marks[key] = time.perf_counter()

        self.trainer.update.loss_module.register_forward_pre_hook(lambda *_: mark("forward began"))
        self.trainer.update.loss_module.register_forward_hook(lambda *_: mark("forward ended"))
        for i, parameter in enumerate(self.parameters):
            parameter.register_post_accumulate_grad_hook(lambda _, i=i: mark(i))

    def turn(self, case: str, steps: int) -> Turn:
        """Takes an untimed step, `steps` timed ones and an untimed one."""
        once = {"silent": self._silent, "allreduce": self._allreduce}.get(case, self._step)
        once()
        cpu, wall = time.process_time(), time.perf_counter()
        taken = [once() for _ in range(steps)]
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        once()
        ready = [fmean(times) for times in zip(*(gradients for _, gradients in taken), strict=True)]
        return Turn([seconds for seconds, _ in taken], cpu / wall, ready)

    def _step(self, agree: bool = True) -> tuple[Metrics, list[float]]:
        """Times one iteration of the training loop, and before it, apart, the two calls that read its windows."""
        trainer = self.trainer
        began = time.perf_counter()
        batch = trainer.data.plan.batch(trainer.progress.step)
        trainer.data.train.windows(batch.starts[trainer.data.rows], trainer.data.plan.seq_len + 1)
        step_began = time.perf_counter()
        if agree:
            synchronize(trainer)
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

    def _silent(self) -> tuple[Metrics, list[float]]:
        with self.trainer.accelerator.no_sync(self.trainer.update.loss_module):
            return self._step(agree=False)

    def _allreduce(self) -> tuple[Metrics, list[float]]:
        began = time.perf_counter()
        torch.distributed.all_reduce(self._buffer)
        return {"step": time.perf_counter() - began}, []

    def message(self) -> Message:
        """Returns the gradients, in the buckets that DDP arranged after its first step."""
        module: Any = self.trainer.update.loss_module
        log = module._get_ddp_logging_data()
        buckets = log["rebuilt_per_bucket_param_indices"].split(",")
        return Message(self.sizes, [[int(i) for i in bucket.split()] for bucket in buckets])


def work(port: int, options: dict[str, Any]) -> None:
    """Runs a worker until the parent closes its connection."""
    worker = Worker(options)
    with Client(("127.0.0.1", port)) as parent, contextlib.suppress(EOFError):
        parent.send((worker.trainer.control.collectives.world_size, worker.trainer.control.collectives.rank))
        while True:
            order = parent.recv()
            parent.send(worker.turn(*order) if order else worker.message())
    os._exit(0)  # without the tear-down in which torch's threads may abort the process


@dataclass(frozen=True)
class Workers:
    """singles: the runs of one process. ranks: the processes of the one run, in order."""

    singles: list[Connection]
    ranks: list[Connection]

    def turn(self, case: str, steps: int) -> list[Turn]:
        """Runs all processes of a case at once."""
        asked = {"one": self.singles[:1], "apart": self.singles}.get(case, self.ranks)
        for worker in asked:
            worker.send((case, steps))
        return [worker.recv() for worker in asked]

    def message(self) -> Message:
        """Returns the gradients; DDP must have made a step or two before."""
        self.ranks[0].send(())
        message: Message = self.ranks[0].recv()
        return message


@contextlib.contextmanager
def workers(options: dict[str, Any], processes: int) -> Iterator[Workers]:
    """Starts both kinds of run, and ends them after the block.

    Args:
        options: Of a run of one process; the run of several has as many rows a process.
        processes: Of the run of several, and runs of one.

    Raises:
        RuntimeError: When a worker ends before it is ready.
    """
    together = options | {"data.batch_size": options["data.batch_size"] * processes}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        launchers = []
        for count, run in [*[(1, options)] * processes, (processes, together)]:
            launchers.append(_launch(count, server.getsockname()[1], run))
            stack.callback(_end, launchers[-1])
        connected = sorted(_accept(server, 2 * processes, launchers, stack), key=lambda worker: worker[0])
        assert [count for (count, _), _ in connected] == [1] * processes + [processes] * processes
        yield Workers([c for _, c in connected[:processes]], [c for _, c in connected[processes:]])
        for _, connection in connected:
            connection.close()
        for launcher in launchers:
            launcher.wait()


def _launch(processes: int, port: int, options: dict[str, Any]) -> "subprocess.Popen[bytes]":
    """Starts torchrun: `accelerate launch --cpu --num_processes 2` starts one process (accelerate#2741)."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    command += [f"--master_port={free_port()}", "-m", "benchmarks.scaling.workers"]
    command += [json.dumps({"port": port, "options": options})]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=sys.stderr)


def _end(launcher: "subprocess.Popen[bytes]") -> None:
    launcher.terminate()
    launcher.wait()


def _accept(
    server: socket.socket, count: int, launchers: "list[subprocess.Popen[bytes]]", stack: contextlib.ExitStack
) -> list[tuple[tuple[int, int], Connection]]:
    """Returns ((processes of its run, rank), connection) of each worker."""
    server.settimeout(_CHECK_LAUNCHERS_S)
    found: list[tuple[tuple[int, int], Connection]] = []
    while len(found) < count:
        if any(launcher.poll() is not None for launcher in launchers):
            raise RuntimeError("a worker ended before it was ready; its output is above")
        with contextlib.suppress(TimeoutError):
            accepted, _ = server.accept()
            accepted.setblocking(True)
            connection = stack.enter_context(Connection(accepted.detach()))
            found.append((connection.recv(), connection))
    return found


if __name__ == "__main__":
    work(**json.loads(sys.argv[1]))
