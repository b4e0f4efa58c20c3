"""Weights in 8 or 4 bits, as onnxruntime's MatMulIntegerToFloat and MatMulNBits take them.

Symmetric around 0. Source of the layouts: onnxruntime's ContribOperators.md.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Precision = Literal["fp32", "int8", "int4"]
BITS = {"int8": 8, "int4": 4}
BLOCK = 32


@dataclass(frozen=True)
class Packed:
    """A matrix (K, N) in `bits` bits.

    blocks: (N, K / block_size, block_size * bits / 8) uint8; scales: (N * K / block_size,) float32. A value is
    (stored - 2 ** (bits - 1)) * scale.
    """

    blocks: NDArray[np.uint8]
    scales: NDArray[np.float32]
    bits: int
    block_size: int


@dataclass(frozen=True)
class Columns:
    """A matrix (K, N) and the bias (N,) of its products in 8 bits, by column.

    steps: (K, N) int8; scales: (N,) float32, above 0; bias: (N,) float32. A value of the matrix is step * scale, and
    one of the bias is bias * scale.
    """

    steps: NDArray[np.int8]
    scales: NDArray[np.float32]
    bias: NDArray[np.float32]


def by_column(matrix: NDArray[np.float32], bias: NDArray[np.float32] | None = None) -> Columns:
    """Rounds a matrix (K, N) to steps of -127 to 127. bias: (N,), kept in float32; None is zeros."""
    bias = np.zeros(matrix.shape[1], np.float32) if bias is None else bias
    # A column far below its bias is nothing beside it, and must not take the bias out of float32's range.
    scales = np.maximum(np.abs(matrix).max(axis=0) / 127, np.abs(bias) * np.float32(1e-15))  # (N,)
    scales = np.where(scales > np.finfo(np.float32).tiny, scales, 1).astype(np.float32)
    return Columns(np.rint(matrix / scales).astype(np.int8), scales, (bias / scales).astype(np.float32))


def pack_columns(matrix: NDArray[np.float32], precision: Precision, block_size: int = BLOCK) -> Packed:
    """Rounds a matrix (K, N) to the nearest of 2 ** bits - 1 evenly spaced values around 0, by column and block."""
    bits = BITS[precision]
    inner, columns = matrix.shape
    num_blocks = -(-inner // block_size)
    padded = np.zeros((columns, num_blocks * block_size), np.float32)
    padded[:, :inner] = matrix.T
    blocks = padded.reshape(columns, num_blocks, block_size)
    middle = 2 ** (bits - 1)
    scales = np.abs(blocks).max(axis=2, keepdims=True) / (middle - 1)  # (N, K / block, 1)
    steps = np.divide(blocks, scales, out=np.zeros_like(blocks), where=scales > 0)
    stored = (np.rint(steps) + middle).astype(np.uint8)
    if bits == 4:  # two values a byte, the first in the lower half
        stored = stored[..., 0::2] | stored[..., 1::2] << 4
    return Packed(stored, scales.astype(np.float32).reshape(-1), bits, block_size)
