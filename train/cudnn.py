"""Which recurrent kernel torch requests from cuDNN, as a pure function of shapes, type and GPU.

Source: aten/src/ATen/native/cudnn/RNN.cpp of torch 2.11 to 2.13, functions `get_algo`, `use_rnn_persist_small_h`,
`use_persist_common_heuristics` and `use_persist_device_heuristics`. Persistent kernels keep the recurrent matrix in
registers from one time step to the next: Diamos et al., "Persistent RNNs", ICML 2016.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

import torch

from charrnn.config import RunConfig


class Algorithm(StrEnum):
    """Values of cudnnRNNAlgo_t that torch chooses between."""

    STANDARD = "standard"
    PERSIST_STATIC = "persist static"
    PERSIST_SMALL_H = "persist static small H"


@dataclass(frozen=True)
class Gpu:
    """What the choice depends on: the compute capability and the number of streaming multiprocessors."""

    capability: tuple[int, int]
    multiprocessors: int

    @classmethod
    def current(cls) -> "Gpu":
        """The current CUDA device."""
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return cls((properties.major, properties.minor), properties.multi_processor_count)


@dataclass(frozen=True)
class Call:
    """One call of torch.lstm or torch.gru with padded input. Letters as everywhere: B rows, T seq_len."""

    rnn: Literal["GRU", "LSTM"]
    input_size: int
    hidden_size: int
    num_layers: int
    rows: int
    seq_len: int
    dtype: torch.dtype


def algorithm(call: Call, gpu: Gpu, *, backward: bool = False) -> Algorithm:
    """The kernel that torch requests for the forward pass of `call`, or for its backward pass."""
    if gpu.capability[0] >= 6 and call.dtype != torch.float64 and call.hidden_size <= (128 if backward else 192):
        return Algorithm.PERSIST_SMALL_H
    if call.dtype == torch.float16 and _fits(call) and _is_faster(call, gpu):
        return Algorithm.PERSIST_STATIC
    return Algorithm.STANDARD


def _fits(call: Call) -> bool:
    return (
        call.num_layers == 1 and call.hidden_size <= 1024 and call.hidden_size % 128 == 0 and call.input_size % 128 == 0
    )


def _is_faster(call: Call, gpu: Gpu) -> bool:
    """By torch's measurements: the batch sizes, and on Volta the lengths, for which it enables the kernel."""
    major, minor = gpu.capability
    rows, length = call.rows, call.seq_len
    if major == 7 and minor != 5:
        suitable = rows == 8 or (rows % 16 == 0 and rows not in (80, 112))
        return suitable and any(length >= t and rows <= b for t, b in ((40, 128), (20, 96), (10, 32)))
    return (
        major >= 8 and minor != 6 and gpu.multiprocessors >= 98 and call.rnn == "LSTM" and rows % 8 == 0 and rows <= 128
    )


def training_calls(config: RunConfig, dtype: torch.dtype, processes: int = 1) -> list[Call]:
    """The recurrent calls of a micro-batch in training on a GPU, which runs layers one by one where it must.

    Args:
        config: The run's.
        dtype: The type that the recurrent kernels multiply in.
        processes: Ranks that share the global batch.
    """
    model = config.model
    rows = config.data.batch_size // (processes * config.train.accumulation_steps)
    separate = model.layer_norm or model.dropout > 0 or model.num_layers == 1
    inputs = [model.embedding_dim] + [model.hidden_dim] * (model.num_layers - 1) if separate else [model.embedding_dim]
    layers = 1 if separate else model.num_layers
    return [Call(model.rnn, size, model.hidden_dim, layers, rows, config.data.seq_len, dtype) for size in inputs]
