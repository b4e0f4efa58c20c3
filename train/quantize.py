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


def by_column(matrix: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Rounds a matrix (K, N) to steps (K, N) of -127 to 127 and scales (N,): a value is about step * scale."""
    scales = np.abs(matrix).max(axis=0) / 127  # (N,)
    steps = np.divide(matrix, scales, out=np.zeros_like(matrix), where=scales > 0)
    return np.rint(steps).astype(np.int8), scales.astype(np.float32)


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
