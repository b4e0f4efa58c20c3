"""Network: a loaded model file as a function of ids and states, and the loop that samples ids.

Letters: B batch, T characters in a call, L num_layers, H hidden_dim, V vocabulary size, N characters of a prompt or to
generate.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from charrnn import sampling
from charrnn.errors import ModelFileError
from charrnn.sampling import SamplingOptions
from infer.model_file.loader import ModelFile, open_model
from infer.model_file.metadata import brief
from infer.model_file.session import MEMORY_BYTES, is_out_of_memory, reason

Logits = NDArray[np.float32]
Ids = NDArray[np.int64]
State = tuple[NDArray[np.float32], ...]

# A longer prompt is read in several calls, so that the logits of its every position never lie in memory at once.
_PREFILL_CHARS = 4096


class Network(ModelFile):
    """A model file, loaded.

    Args:
        path: The model file.
        threads: CPU threads an operator may use.

    Attributes:
        threads: As given; the others are ModelFile's.

    Raises:
        ModelFileError: if the file is missing, damaged, not charrnn's, or of another version.
    """

    def __init__(self, path: Path, threads: int) -> None:
        super().__init__(**vars(open_model(path, threads)))
        self.threads = threads
        self._outputs = ["logits", *(f"{name}_next" for name in self.sizes.states)]

    def zero_state(self, batch: int) -> State:
        """Return the state before the first character: (h,) or (h, c), zeros, each (L, B, H)."""
        shape = (self.sizes.num_layers, batch, self.sizes.hidden_dim)
        return tuple(np.zeros(shape, np.float32) for _ in self.sizes.states)

    def step(self, ids: NDArray[Any], state: State) -> tuple[Logits, State]:
        """Run T characters through the network, all rows at once.

        Args:
            ids: (B, T) integers in [0, V), B and T at least 1.
            state: Each (L, B, H).

        Returns:
            logits (B, T, V), those at t being of the character after t, and the state after the last one.

        Raises:
            ValueError: for ids of another type, shape or range, or a state of another type or shape.
            MemoryError: for more rows or characters than the memory of a session holds.
            ModelFileError: for a graph that does not run.
        """
        ids = np.asarray(ids)
        if ids.dtype.kind not in "iu":
            raise ValueError(f"ids must be integers, not {ids.dtype}")
        ids = np.ascontiguousarray(ids, np.int64)  # (B, T)
        if ids.ndim != 2 or not ids.size:
            raise ValueError(f"ids must be (B, T) with B and T at least 1, not {ids.shape}")
        # As unsigned numbers the negative ids, which onnxruntime would count from the end, are too large as well.
        if ids.view(np.uint64).max() >= len(self.vocab):
            raise ValueError(f"ids must lie in [0, {len(self.vocab)}); found {ids.min()} to {ids.max()}")
        logits, *state_next = self._call(self._outputs, {"ids": ids, **self._state_feeds(state, len(ids))})
        return logits, tuple(state_next)

    def _state_feeds(self, state: State, batch: int) -> dict[str, NDArray[np.float32]]:
        names, shape = self.sizes.states, (self.sizes.num_layers, batch, self.sizes.hidden_dim)
        if kinds := {str(np.asarray(part).dtype) for part in state} - {"float32"}:
            raise ValueError(f"the state must be float32, not {', '.join(sorted(kinds))}")
        shapes = [part.shape for part in state]
        if shapes != [shape] * len(names):
            raise ValueError(f"the state must be {len(names)} x {shape}, not {shapes}")
        return dict(zip(names, state, strict=True))

    def _call(self, outputs: list[str], feeds: dict[str, Any]) -> list[Any]:
        """Run the session. Raises: MemoryError; ModelFileError when a graph that loaded cannot be run after all."""
        try:
            return self.session.run(outputs, feeds)
        except Exception as error:  # onnxruntime's exceptions share no base class of their own
            if is_out_of_memory(error):
                raise MemoryError(f"{feeds['ids'].shape} ids take more memory than the model may") from None
            raise ModelFileError(
                f"{self.path}: its graph does not run ({brief(reason(error))}); export it again"
            ) from None

    def prefill(self, ids: NDArray[Any]) -> tuple[Logits, State]:
        """Read a prompt from the zero state.

        Args:
            ids: (N,), N at least 1.

        Returns:
            logits (1, V) after it, and the state there.
        """
        state = self.zero_state(1)
        logits, state = self.step(ids[None, :_PREFILL_CHARS], state)  # (1, T, V)
        for start in range(_PREFILL_CHARS, len(ids), _PREFILL_CHARS):
            logits, state = self.step(ids[None, start : start + _PREFILL_CHARS], state)
        return logits[:, -1], state

    def decode(
        self,
        last: NDArray[Any],
        state: State,
        length: int,
        options: Sequence[SamplingOptions],
        streams: Sequence[np.random.Generator],
        history: Sequence[NDArray[Any]] | None = None,
        *,
        in_graph: bool = True,
    ) -> tuple[Ids, State]:
        """Generate `length` characters for each of B rows, which may differ in everything.

        A row's characters depend on its own `last`, state, options, stream and history alone, not on the other rows
        or on how a text is divided into calls. The graph's loop samples, or numpy, a character at a time, if a row has
        a repetition penalty, which the graph does not have.

        Args:
            last: (B,), each row's last character, which its state does not include yet.
            state: (h,) or (h, c), each (L, B, H).
            length: Characters to generate, at least 1.
            options: B options, one per row.
            streams: B random generators; row b takes `length` uniforms from `streams[b]`.
            history: B arrays of the ids before (any length, `last` included), on which a row's repetition penalty
                looks back; None is `last` alone.
            in_graph: Whether to use the graph's loop where it can be used. The ids are the same without it.

        Returns:
            ids (B, length), and the state before the last of them (so that `ids[:, -1]` is the next call's `last`).

        Raises:
            SamplingError: if the logits are not finite.
        """
        uniforms = np.stack([stream.random(length) for stream in streams])  # (B, length)
        last = np.asarray(last, np.int64)[:, None]  # (B, 1)
        if in_graph and all(row.repetition_penalty == 1 for row in options):
            return self._decode_in_graph(last, state, uniforms, options)
        return self._decode_stepped(last, state, uniforms, options, list(last) if history is None else history)

    def _decode_in_graph(
        self, last: Ids, state: State, uniforms: NDArray[np.float64], options: Sequence[SamplingOptions]
    ) -> tuple[Ids, State]:
        """`decode` by one run of the session. last: (B, 1). uniforms: (B, N)."""
        feeds: dict[str, Any] = {"ids": last, "uniforms": uniforms, **self._state_feeds(state, len(last))}
        feeds["temperature"] = np.array([row.temperature or 1.0 for row in options])
        top_k = [min(row.top_k, len(self.vocab)) if row.temperature else 1 for row in options]
        feeds["top_k"] = np.array(top_k, np.int64)  # the default integer is of 32 bits on Windows before numpy 2
        feeds["top_p"] = np.array([row.top_p for row in options])
        feeds["min_p"] = np.array([row.min_p for row in options])
        logits, *after, ids = self._call([*self._outputs, "drawn"], feeds)
        if not (np.isfinite(logits).all() and all(np.isfinite(part).all() for part in after)):
            raise sampling.not_finite()
        return ids, tuple(after)

    def _decode_stepped(
        self,
        last: Ids,
        state: State,
        uniforms: NDArray[np.float64],
        options: Sequence[SamplingOptions],
        history: Sequence[NDArray[Any]],
    ) -> tuple[Ids, State]:
        """`decode` a character at a time, sampled in numpy. last: (B, 1). uniforms: (B, N)."""
        groups: dict[SamplingOptions, list[int]] = {}  # rows by their options
        for b, row in enumerate(options):
            groups.setdefault(row, []).append(b)
        seen = {row: sampling.History([history[b] for b in rows], row) for row, rows in groups.items()}
        ids = np.empty(uniforms.shape, np.int64)
        for i in range(uniforms.shape[1]):
            logits, state = self.step(last, state)  # (B, 1, V)
            for row, rows in groups.items():
                shares = sampling.shares_of(seen[row].penalise(logits[rows, 0]), row)  # (b, V)
                ids[rows, i] = sampling.draw(shares, uniforms[rows, i])
                seen[row].add(ids[rows, i])
            last = ids[:, i : i + 1]
        return ids, state

    def max_rows(self) -> int:
        """Return how many rows the memory of a session surely holds: states before and after, and logits."""
        state = 4 * self.sizes.num_layers * self.sizes.hidden_dim * len(self.sizes.states)
        return max(1, MEMORY_BYTES // (4 * state + 64 * len(self.vocab) + 4096))
