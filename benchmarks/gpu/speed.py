"""Phase `speed`: cuDNN's cells alone, the trainer's characters/s eager and replayed, and where a step's time goes."""

import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import seconds_of
from benchmarks.gpu.results import Results, Value
from benchmarks.gpu.setup import Setup, train
from train.loop.cuda_graph import CudaCapture
from train.loop.flops import flops_per_char, peak_flops
from train.loop.trainer import Trainer

# Label -> config file and options: the seed's sizes, two wider ones, and the recipes.
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpu-quick.yaml": ("gpu-quick.yaml", {}),
    "shakespeare.yaml": ("shakespeare.yaml", {}),
    "plain.yaml (GRU 2 x 256)": ("plain.yaml", {}),
    "lstm.yaml (LSTM 2 x 256)": ("lstm.yaml", {}),
    "LSTM 2 x 512": ("lstm.yaml", {"model__hidden_dim": 512}),
    "LSTM 2 x 1024": ("lstm.yaml", {"model__hidden_dim": 1024}),
}


def cells(setup: Setup) -> Value:
    """us a time step of one LSTM layer of torch's with as wide an input, the floor: forward, and both ways."""
    found: Value = {}
    length = setup.size(128, 8)
    sizes = itertools.product((torch.float16, torch.bfloat16, torch.float32), (256, 512, 1024), (32, 64, 128, 256))
    for dtype, width, count in sizes if setup.on_gpu else [(torch.float32, 16, 8)]:
        rnn = torch.nn.LSTM(width, width).to(setup.device, dtype)
        x = torch.randn((length, count, width), device=setup.device, dtype=dtype, requires_grad=True)
        gradient, wanted = torch.randn_like(x), [x, *rnn.parameters()]
        functions = [partial(rnn, x), partial(_both, rnn, x, wanted, gradient)]
        us = [1e6 * _median_s(_replayed(setup, function)) / length for function in functions]
        found[f"{str(dtype)[6:]} {width} x {count} rows"] = [round(value, 2) for value in us]
    return {"forward, both": found}


def _both(rnn: torch.nn.LSTM, x: Tensor, wanted: list[Tensor], gradient: Tensor) -> None:
    torch.autograd.grad(rnn(x)[0], wanted, gradient)


def _median_s(function: Callable[[], object]) -> float:
    """The median seconds of a call, after one that is not counted."""
    return statistics.median([seconds_of(function) for _ in range(11)][1:])


def _replayed(setup: Setup, function: Callable[[], object]) -> Callable[[], object]:
    """The function as a CUDA graph, so that only the device is timed."""
    if not setup.on_gpu:
        return function
    capture = CudaCapture(torch.cuda.Stream())

    def step() -> None:
        function()

    capture.warm_up(step)
    return capture.capture(step)


def _trainer(setup: Setup, name: str, precision: str, graph: bool, log_every: int) -> Trainer:
    """A trainer that has made its first steps."""
    file, options = SIZES[name]
    options = options if setup.on_gpu else {}
    config = setup.config(file, train__mixed_precision=precision, log__every=log_every, **options)
    trainer = setup.trainer(config, graph=graph)
    train(trainer, 10)
    return trainer


def throughput(setup: Setup, name: str, *, precision: str, graph: bool) -> Value:
    """The trainer's own loop: characters/s, share of the bf16 peak, host time and memory."""
    if setup.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    trainer = _trainer(setup, name, precision, graph, 10)
    config, count = trainer.config, setup.size(40, 5)
    seconds = seconds_of(lambda: train(trainer, count)) / count
    chars = config.data.batch_size * config.data.seq_len / seconds
    flops = chars * flops_per_char(config.model, len(trainer.data.vocab))
    peak = peak_flops(setup.device, "bf16")
    return {
        "chars/s": round(chars),
        "ms a step": round(1e3 * seconds, 3),
        "us a time step": round(1e6 * seconds / config.data.seq_len, 2),
        "TFLOP/s": round(flops / 1e12, 3),
        "% of bf16 peak": round(100 * flops / peak, 2) if peak else None,
        "host us a step": _host_us(trainer),
        "MiB": round(torch.cuda.max_memory_allocated() / 2**20) if setup.on_gpu else None,
    }


def _host_us(trainer: Trainer, count: int = 8) -> float:
    """us until the host is done with a step, while the device may still be at it: of so few steps that none waits."""
    began = time.perf_counter()
    for _ in range(count):
        trainer.next_step()
        trainer.train_step()
    return round(1e6 * (time.perf_counter() - began) / count)


def idle(setup: Setup, name: str, *, precision: str, graph: bool, count: int = 10) -> Value:
    """How long the GPU is idle in a step, how many kernels it runs, and the dearest kernels and host calls."""
    trainer = _trainer(setup, name, precision, graph, 10**6)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if setup.on_gpu else [])]
    with profile(activities=activities) as profiler:
        wall = seconds_of(lambda: train(trainer, count))
    kernels = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    spans = sorted((e.time_range.start, e.time_range.end) for e in kernels)
    by_name: dict[str, float] = {}
    for event in kernels:
        by_name[event.name] = by_name.get(event.name, 0.0) + event.time_range.elapsed_us()
    host = sorted(profiler.key_averages(), key=lambda a: -a.self_cpu_time_total)[:6]
    return {
        "ms a step, profiled": round(1e3 * wall / count, 3),
        "GPU idle": f"{100 * (1 - busy_us(spans) / 1e6 / wall):.0f} %" if setup.on_gpu else None,
        "kernels a step": round(len(kernels) / count, 1),
        "kernels": [f"{by_name[n] / count:.0f} us {n[:60]}" for n in sorted(by_name, key=lambda n: -by_name[n])[:6]],
        "host": [f"{a.self_cpu_time_total / count:.0f} us x{a.count / count:g} {a.key[:40]}" for a in host],
    }


def busy_us(spans: list[tuple[float, float]]) -> float:
    """The time that at least one of the spans covers. spans: sorted by their beginning."""
    busy, end = 0.0, float("-inf")
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy


def run(setup: Setup, results: Results) -> None:
    """All measurements."""
    precisions = ("fp16", "bf16") if setup.on_gpu else ("no",)
    for name in SIZES:
        for precision in precisions:
            for graph in (True, False):
                label = f"{name}, {precision}, {'replayed' if graph else 'eager'}"
                results.check(label, partial(throughput, setup, name, precision=precision, graph=graph))
    for name in ("gpu-quick.yaml", "shakespeare.yaml"):
        for graph in (True, False):
            label = f"idle: {name}, {'replayed' if graph else 'eager'}"
            results.check(label, partial(idle, setup, name, precision=precisions[0], graph=graph))
    results.check("cells", partial(cells, setup))
