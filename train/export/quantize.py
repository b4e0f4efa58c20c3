"""Weights in 8 bits, as onnxruntime's MatMulIntegerToFloat takes them: symmetric around 0, a scale per column."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Precision = Literal["fp32", "int8"]


def quantize_columns(
    matrix: NDArray[np.float32], bias: NDArray[np.float32] | None = None
) -> tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.float32]]:
    """Round a matrix (K, N) to steps of -127 to 127 per column, and put its products' bias (N,) in units of the scale.

    Returns:
        steps (K, N), a value of the matrix being step * scale; scales (N,), above 0; and the bias (N,), zeros for None.
    """
    bias = np.zeros(matrix.shape[1], np.float32) if bias is None else bias
    # A column far below its bias is nothing beside it, and must not take the bias out of float32's range.
    scales = np.maximum(np.abs(matrix).max(axis=0) / 127, np.abs(bias) * np.float32(1e-15))  # (N,)
    scales = np.where(scales > np.finfo(np.float32).tiny, scales, 1).astype(np.float32)
    return np.rint(matrix / scales).astype(np.int8), scales, (bias / scales).astype(np.float32)


def quantize_embedding(
    embedding: NDArray[np.float32], matrix: NDArray[np.float32]
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Round an embedding to 8 bits per dimension, the scales of which go into the matrix that it multiplies.

    Args:
        embedding: (V, E).
        matrix: (E, G), `input0`.

    Returns:
        (V, E) uint8 around 128, in steps of 1/127 as the states are, and the matrix (E, G) that makes up for the
        scales.
    """
    largest = np.abs(embedding).max(axis=0)  # (E,)
    largest = np.where(largest > np.finfo(np.float32).tiny, largest, 1).astype(np.float32)
    steps = np.rint(embedding / largest * 127) + 128
    return steps.astype(np.uint8), matrix * largest[:, None]
