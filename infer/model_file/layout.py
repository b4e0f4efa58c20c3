"""Names, shapes and values of the tensors inside a model file: what export writes and the validator expects.

Letters: V vocabulary size, E embedding_dim, H hidden_dim, L num_layers, G gates (3H for GRU, 4H for LSTM).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

STATES = {"GRU": ("h",), "LSTM": ("h", "c")}
NUM_GATES = {"GRU": 3, "LSTM": 4}


@dataclass(frozen=True)
class Sizes:
    """The sizes from which every shape in a file follows.

    Attributes:
        rnn: "GRU" or "LSTM".
        vocab_size: V.
        hidden_dim: H.
        num_layers: L.
        document_end: Id of the symbol before which the state is reset; None without documents.
    """

    rnn: str
    vocab_size: int
    hidden_dim: int
    num_layers: int
    document_end: int | None

    def __str__(self) -> str:
        return f"the {self.rnn} of its metadata ({self.num_layers} x {self.hidden_dim}, {self.vocab_size} symbols)"

    @property
    def states(self) -> tuple[str, ...]:
        """The names of the state's parts."""
        return STATES[self.rnn]

    @property
    def gates(self) -> int:
        """G."""
        return NUM_GATES[self.rnn] * self.hidden_dim


def constants(sizes: Sizes) -> dict[str, NDArray[Any]]:
    """Return the constants of a graph by name; a graph holds those that it uses."""
    h, v = sizes.hidden_dim, sizes.vocab_size
    integers: dict[str, Any] = {
        "axis_0": [0],
        "axis_1": [1],
        "axis_2": [2],
        "int64_max": [np.iinfo(np.int64).max],
        "zero": 0,
        "one": 1,
        "minus_1": -1,
        "minus_1s": [-1],
        "minus_1_width": [-1, h],
        "one_each": np.ones(sizes.num_layers),
        "switches_candidate": [sizes.gates - h, h],
        "all_symbols": v,
        "ranks": np.arange(v)[None],
    }
    doubles: dict[str, Any] = {
        "zero_f64": 0,
        "one_f64": 1,
        "least_temperature": 1e-200,
        "no_uniforms": np.zeros((1, 0)),
    }
    floats: dict[str, Any] = {
        "minus_infinity": -np.inf,
        "state_scale": 1 / 127,
        "no_scale": 1,
        "one_gains": np.ones(h),
    }
    found: dict[str, NDArray[Any]] = {name: np.array(value, np.int64) for name, value in integers.items()}
    found |= {name: np.array(value, np.float64) for name, value in doubles.items()}
    found |= {name: np.array(value, np.float32) for name, value in floats.items()}
    found |= {"true": np.array(True), "state_zero_point": np.array(128, np.uint8)}
    if sizes.document_end is not None:
        # (V, 1): 0 for the symbol before which the state is reset.
        found["keep_state"] = (np.arange(v) != sizes.document_end).astype(np.float32)[:, None]
    return found
