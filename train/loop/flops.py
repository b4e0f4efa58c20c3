"""The arithmetic of training a character, and the most that a device can do: what model FLOPs utilisation compares.

A multiplication and an addition are two operations (FLOPs). Counted are the matrix products that the mathematics needs,
not element-wise work, not anything computed twice. Source: Chowdhery et al., "PaLM", arXiv 2204.02311, appendix B.
"""

import time

import torch

from charrnn.config import ModelConfig

# The backward pass multiplies twice for each product of the forward pass: by the weights, and by the inputs.
_PASSES = 3
_GATES = {"GRU": 3, "LSTM": 4}

# Dense products on tensor cores, 1e12 FLOP/s in (16-bit floats, TF32 or, where there is none, fp32), as published in
# NVIDIA's data sheets of each product (https://www.nvidia.com/en-us/data-center/products/); values "with sparsity"
# are halved. Those of A100, H100 and H200 are also in torchtitan's tools/utils.py, those of V100 in Lightning's
# throughput.py. cuDNN's recurrent kernels compute fp32 models in TF32 by default. The first match counts.
_PUBLISHED = {
    "H200": (989.4, 494.7),
    "H100 PCIe": (756.0, 378.0),
    "H100 NVL": (835.0, 417.5),
    "H100": (989.4, 494.7),
    "A100": (312.0, 156.0),
    "L40S": (362.05, 183.0),
    "L4": (121.0, 60.0),
    "V100 PCIE": (112.0, 14.0),
    "V100": (125.0, 15.7),
    "T4": (65.0, 8.1),
}
_SIDE = 1024
_MEASURED_S = 0.2


def flops_per_char(model: ModelConfig, vocab_size: int) -> int:
    """FLOPs of training on one character: forward and backward, the embedding lookup not counted."""
    width = model.hidden_dim
    inputs = [model.embedding_dim] + [width] * (model.num_layers - 1)
    layers = sum(_GATES[model.rnn] * width * (size + width) for size in inputs)
    return 2 * _PASSES * (layers + width * vocab_size)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s of matrix products at best: measured on a CPU in 0.2 s, as published for a GPU; None if unknown.

    precision: "bf16", "fp16", or "no" for fp32.
    """
    if device.type == "cpu":
        return measured_peak(torch.bfloat16 if precision == "bf16" else torch.float32)
    return published_peak(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None


def published_peak(device_name: str, precision: str) -> float | None:
    """FLOP/s of the product `device_name` by its data sheet; None when it is not in the table, or a part of one."""
    words = device_name.replace("-", " ").split()
    for name, (half, full) in _PUBLISHED.items():
        if set(name.split()) <= set(words) and "MIG" not in words:
            return 1e12 * (full if precision == "no" else half)
    return None


def measured_peak(dtype: torch.dtype, seconds: float = _MEASURED_S) -> float:
    """FLOP/s of the best of many products of 1024 x 1024 matrices on the CPU, with torch's threads."""
    a = torch.ones(_SIDE, _SIDE, dtype=dtype)
    out = a @ a  # the first finds cold caches
    best = float("inf")
    began = now = time.perf_counter()
    while now - began < seconds:
        torch.mm(a, a, out=out)
        before, now = now, time.perf_counter()
        best = min(best, now - before)
    return 2 * _SIDE**3 / best
