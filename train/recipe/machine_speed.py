"""Training speed of this machine, measured in the first seconds of a run, for the recipe."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from charrnn.config import ModelConfig, OptimConfig
from charrnn.cores import UNDISTURBED
from charrnn.model.rnn import CharRNN, NextCharLoss, detach
from train.loop.flops import flops_per_char
from train.loop.metrics import CpuShare
from train.loop.optimizer import make_optimizer

ROWS, SEQ_LEN = 16, 64
_GPU_ROWS = 128
_WARMUP_STEPS, _LEAST_STEPS, _SECONDS = 3, 5, 1.0


@dataclass(frozen=True)
class Speed:
    """Training speed of one process.

    Attributes:
        flops: FLOP/s of training steps.
        cpu_share: Fraction of its threads' time on the cores; other processes had the rest.
        one_thread: Speedup of one thread over all of them; 1 if the share is high.
    """

    flops: float
    cpu_share: float = 1.0
    one_thread: float = 1.0


def training_speed(model: ModelConfig, vocab_size: int, accelerator: Accelerator) -> Speed:
    """Measure training steps for about a second. Changes no random state.

    The lower quartile of the step times after a warm-up counts, which excludes short disturbances.

    Args:
        model: Shape of the model.
        vocab_size: V.
        accelerator: Device and precision.
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

        seconds, cpu_share = _timed(step, _SECONDS)
        one_thread = 1.0
        if on_cpu and cpu_share < UNDISTURBED and (threads := torch.get_num_threads()) > 1:
            torch.set_num_threads(1)
            one_thread = seconds / _timed(step, _SECONDS / 2)[0]
            torch.set_num_threads(threads)
    return Speed(rows * SEQ_LEN * flops_per_char(model, vocab_size) / seconds, cpu_share, one_thread)


def _timed(step: Callable[[], None], limit_s: float) -> tuple[float, float]:
    """Seconds per step (lower quartile), and the fraction of its threads' time that the process had on the cores."""
    for _ in range(_WARMUP_STEPS):
        step()
    times: list[float] = []
    began, cpu_share = time.perf_counter(), CpuShare()
    while len(times) < _LEAST_STEPS or time.perf_counter() - began < limit_s:
        before = time.perf_counter()
        step()
        times.append(time.perf_counter() - before)
    return statistics.quantiles(times, n=4)[0], cpu_share()
