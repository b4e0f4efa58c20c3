"""How fast this machine trains, measured in the first seconds of a run: what the recipe sizes a run by."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from charrnn.config import ModelConfig, OptimConfig
from charrnn.model import CharRNN, NextCharLoss, detach
from train.flops import flops_per_char
from train.optimizer import make_optimizer

ROWS, SEQ_LEN = 16, 64
_GPU_ROWS = 128
_WARMUP_STEPS, _LEAST_STEPS, _SECONDS = 3, 5, 1.0
# Below this share of the cores' time, something else is running on them.
_UNDISTURBED = 0.85


@dataclass(frozen=True)
class Speed:
    """What one process achieves.

    Attributes:
        flops: FLOP/s of training steps.
        shared: Whether other processes take much of the CPU time of its threads.
        fewer_threads: How many times as fast one thread is, 1 unless `shared`.
    """

    flops: float
    shared: bool = False
    fewer_threads: float = 1.0


def training_speed(model: ModelConfig, vocab_size: int, accelerator: Accelerator) -> Speed:
    """Measures training steps of a network of that shape for about a second. Changes no random state.

    Of the steps after a warm-up the quicker quartile counts: a short disturbance is not the machine's speed.
    """
    on_cpu = accelerator.device.type == "cpu"
    rows = ROWS if on_cpu else _GPU_ROWS
    with torch.random.fork_rng(devices=[] if on_cpu else [accelerator.device]):
        network = CharRNN(model, vocab_size)
        loss_module = NextCharLoss(network).to(accelerator.device)
        optimizer = make_optimizer(network, OptimConfig())
        window = torch.randint(vocab_size, (rows, SEQ_LEN + 1), device=accelerator.device)
        state = network.zero_state(rows, accelerator.device)

        def step() -> None:
            nonlocal state
            with accelerator.autocast():
                loss, after = loss_module(window, state)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            state = detach(after)
            if not on_cpu:
                torch.cuda.synchronize(accelerator.device)

        seconds, busy = _timed(step, _SECONDS)
        shared = on_cpu and busy < _UNDISTURBED
        fewer = 1.0
        if shared and (threads := torch.get_num_threads()) > 1:
            torch.set_num_threads(1)
            fewer = seconds / _timed(step, _SECONDS / 2)[0]
            torch.set_num_threads(threads)
    return Speed(rows * SEQ_LEN * flops_per_char(model, vocab_size) / seconds, shared, fewer)


def _timed(step: Callable[[], None], limit_s: float) -> tuple[float, float]:
    """Seconds of a step, the lower quartile, and the share of a core that the machine's threads had meanwhile."""
    for _ in range(_WARMUP_STEPS):
        step()
    times: list[float] = []
    began, cpu_began = time.perf_counter(), time.process_time()
    while len(times) < _LEAST_STEPS or time.perf_counter() - began < limit_s:
        before = time.perf_counter()
        step()
        times.append(time.perf_counter() - before)
    busy = (time.process_time() - cpu_began) / (time.perf_counter() - began) / torch.get_num_threads()
    return statistics.quantiles(times, n=4)[0], busy
