"""Recurrent states beyond a request: serialized for the client, and in a prefix cache.

Letters: L num_layers, H hidden_dim.
"""

import base64
import binascii
import hashlib
import struct
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from infer.engine import Engine
from infer.network import State

# A prompt's state is cached after every BLOCK characters.
BLOCK = 256
_CACHE_BYTES = 32 << 20
_MAGIC = b"crn\x01"  # the last byte is the version
# magic, the model file's SHA-256, seed, characters drawn, ids that follow
_HEADER = struct.Struct("<4s32sQQH")
# |h| is at most 1 in either cell, and a rounding of onnxruntime's tanh above; an LSTM's cell grows by 1 a character.
_BOUNDS = (1.001, 1e6)
_MOST_DRAWN = 1 << 63


class StateError(ValueError):
    """An invalid `state`, or one of another model."""


@dataclass(frozen=True)
class TextState:
    """The end of a text.

    Attributes:
        state: (h,) or (h, c), each (L, 1, H), after all ids but the last.
        recent: The last ids, of which the last is not in `state` yet and the others are for the repetition penalty.
        seed: Seed of the random stream.
        drawn: How many of its numbers were used.
    """

    state: State
    recent: tuple[int, ...]
    seed: int
    drawn: int

    def encode(self, model: bytes) -> str:
        """Serialize to base64. model: the model file's SHA-256, 32 bytes."""
        header = _HEADER.pack(_MAGIC, model, self.seed, self.drawn, len(self.recent))
        parts = [header, np.array(self.recent, "<u4").tobytes(), *(part.astype("<f4").tobytes() for part in self.state)]
        return base64.b64encode(b"".join(parts)).decode()

    @classmethod
    def decode(cls, text: str, model: bytes, engine: Engine) -> "TextState":
        """Deserialize.

        Raises:
            StateError: for anything `encode` did not write, another model's state, or impossible values.
        """
        try:
            raw = base64.b64decode(text, validate=True)
            magic, sha256, seed, drawn, count = _HEADER.unpack_from(raw)
        except (binascii.Error, ValueError, struct.error):
            raise StateError("state is not one that this server returned") from None
        if magic != _MAGIC:
            raise StateError("state is of another format; read the text again as a prompt")
        if sha256 != model:
            raise StateError("state is of another model file; read the text again as a prompt")
        shapes = [part.shape for part in engine.zero_state(1)]
        sizes = [4 * count, *(4 * int(np.prod(shape)) for shape in shapes)]
        if not count or len(raw) != _HEADER.size + sum(sizes):
            raise StateError("state is damaged: its length does not fit the model")
        recent = np.frombuffer(raw, "<u4", count, _HEADER.size)
        numbers = np.frombuffer(raw, "<f4", offset=_HEADER.size + sizes[0]).astype(np.float32)
        state = tuple(part.reshape(shapes[0]) for part in np.split(numbers, len(shapes)))
        # Comparisons with NaN are false.
        in_bounds = all((np.abs(part) <= bound).all() for part, bound in zip(state, _BOUNDS, strict=False))
        if not in_bounds or drawn >= _MOST_DRAWN:
            raise StateError("state is damaged: it has values that no text leads to")
        if recent.max() >= len(engine.vocab):
            raise StateError("state is damaged: it has ids outside of the vocabulary")
        return cls(state, tuple(recent.tolist()), seed, drawn)


class PrefixCache:
    """LRU cache of the states after a prompt's full blocks of BLOCK ids, by the digest of those ids.

    Attributes:
        hits, misses: Lookups so far with and without a cached prefix.
    """

    def __init__(self, most_bytes: int = _CACHE_BYTES) -> None:
        self.hits = self.misses = 0
        self._left = most_bytes
        self._states: OrderedDict[bytes, State] = OrderedDict()

    def __len__(self) -> int:
        return len(self._states)

    def put(self, digest: bytes, state: State) -> None:
        """Cache the state, each (L, 1, H), after the ids of a digest."""
        if digest not in self._states:
            self._left -= _size(state)
        self._states[digest] = state
        self._states.move_to_end(digest)
        while self._left < 0:
            self._left += _size(self._states.popitem(last=False)[1])

    def longest(self, blocks: Sequence[bytes]) -> tuple[int, State | None]:
        """Find the longest cached prefix of a prompt by its `digests`.

        Returns:
            Its length and the state after it; (0, None) if there is none.
        """
        for i in range(len(blocks), 0, -1):
            if (state := self._states.get(blocks[i - 1])) is not None:
                self._states.move_to_end(blocks[i - 1])
                self.hits += 1
                return i * BLOCK, state
        self.misses += 1
        return 0, None


def digests(ids: NDArray[np.int64]) -> list[bytes]:
    """Return the digests of the first 1, 2, ... full blocks of ids, (N,)."""
    running = hashlib.blake2b(digest_size=16)
    found = []
    for start in range(0, len(ids) - BLOCK + 1, BLOCK):
        running.update(ids[start : start + BLOCK].tobytes())
        found.append(running.digest())
    return found


def _size(state: State) -> int:
    return sum(part.nbytes for part in state) + 500  # Python's own objects
