"""Training speed of this machine, measured in the first seconds of a run, for the recipe."""

import statistics
import time

import torch
from accelerate import Accelerator

from charrnn.config import ModelConfig, OptimConfig
from charrnn.model.rnn import CharRNN, NextCharLoss, detach
from train.loop.flops import flops_per_char
from train.loop.optimizer import make_optimizer

ROWS, SEQ_LEN = 16, 64
_GPU_ROWS = 128
_WARMUP_STEPS, _LEAST_STEPS, _SECONDS = 3, 5, 1.0


def training_speed(model: ModelConfig, vocab_size: int, accelerator: Accelerator) -> float:
    """Measure training steps for about a second, in FLOP/s of this process. Changes no random state.

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
        times: list[float] = []
        began = before = time.perf_counter()
        while len(times) < _WARMUP_STEPS + _LEAST_STEPS or before - began < _SECONDS:
            with accelerator.autocast():
                loss, after = loss_module(window, state)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            state = detach(after)
            if not on_cpu:
                torch.cuda.synchronize(accelerator.device)
            now = time.perf_counter()
            times.append(now - before)
            before = now
    step_s = statistics.quantiles(times[_WARMUP_STEPS:], n=4)[0]
    return rows * SEQ_LEN * flops_per_char(model, vocab_size) / step_s
