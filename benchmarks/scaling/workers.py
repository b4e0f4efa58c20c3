"""The processes that benchmarks.scaling measures, started by torchrun, and the parent's connections to them."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection
from typing import Any

import torch

from benchmarks.common import free_port, seconds_of
from benchmarks.scaling.estimates import Metrics
from benchmarks.training import make_trainer, synchronize
from charrnn.config import load_config

_CHECK_LAUNCHERS_S = 1.0


class Worker:
    """One rank of a run, which measures the cases it is asked for."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.trainer = make_trainer(load_config(None, options))
        self._parameters = list(self.trainer.model.parameters())
        self._buffer = torch.cat([torch.zeros_like(p).flatten() for p in self._parameters])

    def turn(self, case: str, steps: int) -> list[Metrics]:
        """Takes an untimed step, `steps` timed ones, whose seconds it returns, and an untimed one."""
        once = {"silent": self._silent, "allreduce": self._allreduce}.get(case, self._step)
        return [once() for _ in range(steps + 2)][1:-1]

    def _step(self, agree: bool = True) -> Metrics:
        """Times one iteration of the training loop, and before it, apart, the two calls that read its windows."""
        trainer = self.trainer

        def read() -> None:
            batch = trainer.data.plan.batch(trainer.progress.step)
            trainer.data.train.windows(batch.starts[trainer.data.rows], trainer.data.plan.seq_len + 1)

        def step() -> None:
            if agree:
                synchronize(trainer)
            trainer.train_step()

        return {"input": seconds_of(read), "step": seconds_of(step)}

    def _silent(self) -> Metrics:
        with self.trainer.accelerator.no_sync(self.trainer.update.loss_module):
            return self._step(agree=False)

    def _allreduce(self) -> Metrics:
        return {"step": seconds_of(lambda: torch.distributed.all_reduce(self._buffer))}

    def buckets(self) -> list[int]:
        """Returns the bytes of gradients in each bucket that DDP arranged after its first step."""
        module: Any = self.trainer.update.loss_module
        indices = module._get_ddp_logging_data()["rebuilt_per_bucket_param_indices"].split(",")
        sizes = [p.numel() * p.element_size() for p in self._parameters]
        return [sum(sizes[int(i)] for i in bucket.split()) for bucket in indices]


def work(port: int, options: dict[str, Any]) -> None:
    """Runs a worker until the parent closes its connection."""
    worker = Worker(options)
    with Client(("127.0.0.1", port)) as parent, contextlib.suppress(EOFError):
        parent.send((worker.trainer.control.collectives.world_size, worker.trainer.control.collectives.rank))
        while True:
            order = parent.recv()
            parent.send(worker.turn(*order) if order else worker.buckets())
    os._exit(0)  # without the tear-down in which torch's threads may abort the process


@dataclass(frozen=True)
class Workers:
    """singles: the runs of one process. ranks: the processes of the one run, in order."""

    singles: list[Connection]
    ranks: list[Connection]

    def turn(self, case: str, steps: int) -> list[list[Metrics]]:
        """Runs all processes of a case at once."""
        asked = {"one": self.singles[:1], "apart": self.singles}.get(case, self.ranks)
        for worker in asked:
            worker.send((case, steps))
        return [worker.recv() for worker in asked]

    def buckets(self) -> list[int]:
        """Returns the bytes of each bucket; DDP must have made a step or two before."""
        self.ranks[0].send(())
        sizes: list[int] = self.ranks[0].recv()
        return sizes


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
