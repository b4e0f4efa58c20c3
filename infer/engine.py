"""Engine: a model file made ready to run, from one step of the network up to streamed text.

Letters: B batch, T characters in a call, L num_layers, H hidden_dim, V vocabulary size, N characters of a prompt or to
draw.
"""

import contextlib
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from charrnn import sampling
from charrnn.errors import ModelFileError, SamplingError, listing
from charrnn.sampling import SamplingOptions
from charrnn.vocab import Unknown, Vocab
from infer.cores import free_cores
from infer.model_file.loader import brief, default_model, open_model
from infer.model_file.session import MEMORY_BYTES, is_memory, told
from infer.text_writer import TextWriter

Logits = NDArray[np.float32]
Ids = NDArray[np.int64]
State = tuple[NDArray[np.float32], ...]

# A longer prompt is read in several calls, so that the logits of its every position never lie in memory at once.
_PREFILL_CHARS = 4096
# Characters of a run of the graph's loop: few enough that text seems to flow, and that Ctrl-C and a stop text act at
# once; as many as make the time between two runs not matter.
_RUN_S = 0.03
_FIRST_RUN_CHARS = 8
_MOST_RUN_CHARS = 128
# See docs/performance.md.
_BYTES_FOR_THREADS = 1_500_000
_MOST_THREADS = 4


class Engine:
    """A charrnn model file, loaded.

    path: the model file; None is the shipped default. threads: CPU threads an operator may use; None is as many as help
    a model of that size to write `streams` texts at once, and as other processes leave cores for, mostly 1. The text
    does not depend on it.
    draws: whether the file draws characters by itself, as those from format version 2 on do.
    vocab: what it reads and writes. config, metrics, corpus: the run that made it. metadata: as in the file.
    Raises: ModelFileError when the file is missing, damaged, not charrnn's, or too new.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None = None, threads: int | None = None, streams: int = 1
    ) -> None:
        path = default_model() if path is None else Path(path)
        self.threads: int = fitting_threads(path, streams) if threads is None else threads
        file = open_model(path, self.threads)
        self.path: Path = file.path
        self.vocab: Vocab = file.vocab
        self.config: dict[str, Any] = file.config
        self.metrics: dict[str, Any] = file.metrics
        self.corpus: dict[str, Any] = file.corpus
        self.metadata: dict[str, str] = file.metadata
        self.draws: bool = file.draws
        self._run = file.session.run
        self._states = file.states
        self._outputs = ["logits", *(f"{name}_next" for name in file.states)]
        self._state_shape = (file.num_layers, file.hidden_dim)

    def zero_state(self, batch: int) -> State:
        """The state before the first character: (h,) or (h, c), zeros, each (L, B, H)."""
        num_layers, hidden_dim = self._state_shape
        return tuple(np.zeros((num_layers, batch, hidden_dim), np.float32) for _ in self._states)

    def step(self, ids: NDArray[Any], state: State) -> tuple[Logits, State]:
        """Runs T characters through the network, all rows at once.

        ids: (B, T) integers in [0, V), B and T at least 1. state: each (L, B, H).
        Returns: logits (B, T, V), those at t being of the character after t, and the state after the last one.
        Raises: ValueError for ids of another type, shape or range, or a state of another type or shape; MemoryError
        for more rows or characters than the memory of a session holds; ModelFileError for a graph that does not run.
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
        num_layers, hidden_dim = self._state_shape
        if kinds := {str(np.asarray(part).dtype) for part in state} - {"float32"}:
            raise ValueError(f"the state must be float32, not {', '.join(sorted(kinds))}")
        shapes = [part.shape for part in state]
        if shapes != [(num_layers, batch, hidden_dim)] * len(self._states):
            raise ValueError(f"the state must be {len(self._states)} x {(num_layers, batch, hidden_dim)}, not {shapes}")
        return dict(zip(self._states, state, strict=True))

    def _call(self, outputs: list[str], feeds: dict[str, Any]) -> list[Any]:
        """Runs the session. Raises: MemoryError; ModelFileError when a graph that loaded cannot be run after all."""
        try:
            return self._run(outputs, feeds)
        except Exception as error:  # onnxruntime's exceptions share no base class of their own
            if is_memory(error):
                raise MemoryError(f"{feeds['ids'].shape} ids take more memory than the model may") from None
            raise ModelFileError(
                f"{self.path}: its graph does not run ({brief(told(error))}); export it again"
            ) from None

    def prefill(self, ids: NDArray[Any]) -> tuple[Logits, State]:
        """Reads a prompt from the zero state. ids: (N,), N at least 1. Returns: logits (1, V) after it, the state."""
        state = self.zero_state(1)
        logits, state = self.step(ids[None, :_PREFILL_CHARS], state)  # (1, T, V)
        for start in range(_PREFILL_CHARS, len(ids), _PREFILL_CHARS):
            logits, state = self.step(ids[None, start : start + _PREFILL_CHARS], state)
        return logits[:, -1], state

    def draw(
        self, ids: NDArray[Any], state: State, uniforms: NDArray[np.float64], options: SamplingOptions
    ) -> tuple[Ids, State]:
        """Draws N characters a row by the graph's own loop, in one run of the session.

        ids: (B, 1), the last characters, which the state (each (L, B, H)) does not know yet. uniforms: (B, N) in
        [0, 1), N at least 1. Returns: (B, N) ids, and the state before the last of them.
        Raises: SamplingError for a model whose logits are not finite. The file must draw (`draws`), and the options
        must be without a repetition penalty, which the graph does not know.
        """
        greedy = options.temperature == 0
        feeds = {"ids": ids, "uniforms": uniforms, **self._state_feeds(state, len(ids))}
        feeds["temperature"] = np.array(1.0 if greedy else options.temperature)
        feeds["top_k"] = np.array(1 if greedy else min(options.top_k, len(self.vocab)), np.int64)
        feeds["top_p"], feeds["min_p"] = np.array(float(options.top_p)), np.array(float(options.min_p))
        logits, *state_next, drawn = self._call([*self._outputs, "drawn"], feeds)
        if not (np.isfinite(logits).all() and all(np.isfinite(part).all() for part in state_next)):
            raise sampling.not_finite()
        return drawn, tuple(state_next)

    def decode(
        self,
        last: NDArray[Any],
        state: State,
        length: int,
        options: Sequence[SamplingOptions],
        streams: Sequence[np.random.Generator],
        history: Sequence[NDArray[Any]] | None = None,
    ) -> tuple[Ids, State]:
        """Generate `length` characters for each of B rows, which may differ in everything.

        A row's characters depend on its own `last`, state, options, stream and history alone, not on the other rows
        or on how a text is divided into calls.

        Args:
            last: (B,), each row's last character, which its state does not include yet.
            state: (h,) or (h, c), each (L, B, H).
            length: Characters to generate, at least 1.
            options: B options, one per row.
            streams: B random generators; row b takes `length` uniforms from `streams[b]`.
            history: B arrays of the ids before (any length, `last` included), on which a row's repetition penalty
                looks back; None is `last` alone.

        Returns:
            ids (B, length), and the state before the last of them (so that `ids[:, -1]` is the next call's `last`).

        Raises:
            SamplingError: if the logits are not finite.
        """
        uniforms = np.stack([stream.random(length) for stream in streams])  # (B, length)
        history = [ids[None] for ids in last] if history is None else history
        before = [sampling.History(1, ids, row) for ids, row in zip(history, options, strict=True)]
        ids = np.empty((len(last), length), np.int64)
        last = np.asarray(last)[:, None]  # (B, 1)
        for i in range(length):
            logits, state = self.step(last, state)  # (B, 1, V)
            for b, (seen, row) in enumerate(zip(before, options, strict=True)):
                shares = sampling.shares_of(seen.penalise(logits[b]), row)  # (1, V)
                ids[b, i] = sampling.draw(shares, uniforms[b, i : i + 1])[0]
                seen.add(ids[b, i : i + 1])
            last = ids[:, i : i + 1]
        return ids, state

    def generate(
        self,
        prompt: str = "",
        length: int = 500,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        repetition_window: int = 64,
        *,
        seed: int | None = None,
        stop: str | None = None,
        past_end: bool = False,
        unknown: Unknown = "error",
    ) -> Iterator[str]:
        """Text that goes on from `prompt` (which is not repeated), in pieces, each computed when it is asked for.

        A piece is what comes out in some hundredths of a second, and at least a character.

        The arguments are checked, and the prompt is read, at the call. An empty prompt starts from a newline, or from
        the vocabulary's first entry if it has no newline; with documents, any prompt is the beginning of one, and
        starts from the end of the one before. None of these is part of the text.

        length: characters to write (bytes for a byte vocabulary). temperature to repetition_window: as in
        charrnn.sampling.SamplingOptions. seed: the same seed, the same text; None draws a new one.
        stop: the text ends before the first occurrence of this; what may be its beginning is held back.
        past_end: go on where a document ends, and with its end in the text; else the text ends before it.
        unknown: what to do with characters of the prompt that the vocabulary lacks: error, skip or replace.
        Raises: SamplingError for an option out of range; VocabError for unknown characters.
        """
        options = SamplingOptions(temperature, top_k, top_p, min_p, repetition_penalty, repetition_window)
        rows = self._rows(prompt, 1, length, options, seed, stop, past_end, unknown)
        return (piece for (piece,) in rows if piece)

    def generate_batch(
        self,
        prompt: str = "",
        num_samples: int = 1,
        length: int = 500,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        repetition_window: int = 64,
        *,
        seed: int | None = None,
        stop: str | None = None,
        past_end: bool = False,
        unknown: Unknown = "error",
    ) -> list[str]:
        """`num_samples` texts that go on from `prompt`, computed side by side; the other arguments as in `generate`.

        Text i is what `generate` writes with seed + i.
        """
        num_samples = sampling.whole_number(num_samples, "num_samples")
        if not 1 <= num_samples <= self._most_samples():
            raise SamplingError(
                f"num_samples must be 1 to {self._most_samples():,} for this model and its memory, not {num_samples}"
            )
        options = SamplingOptions(temperature, top_k, top_p, min_p, repetition_penalty, repetition_window)
        rows = self._rows(prompt, num_samples, length, options, seed, stop, past_end, unknown)
        return ["".join(pieces) for pieces in zip(*rows, strict=True)]

    def _rows(
        self,
        prompt: str,
        batch: int,
        length: int,
        options: SamplingOptions,
        seed: int | None,
        stop: str | None,
        past_end: bool,
        unknown: Unknown,
    ) -> Iterator[list[str]]:
        """For every run of characters, the text that it brings out in each of the B streams; at last what was held."""
        self._check_stop(stop)
        length = sampling.whole_number(length, "length")
        first_seed = fresh_seed() if seed is None else sampling.whole_number(seed, "seed")
        prompt_ids = self._prompt_ids(prompt, unknown)
        drawn = self.drawn(prompt_ids, length, options, range(first_seed, first_seed + batch))
        writers = [TextWriter(self.vocab, () if stop is None else (stop,), past_end) for _ in range(batch)]

        def rows() -> Iterator[list[str]]:
            for ids in drawn:
                yield [writer.feed(row) for writer, row in zip(writers, ids.tolist(), strict=True)]
                if all(writer.ended for writer in writers):
                    return
            yield [writer.end() for writer in writers]

        return rows()

    def drawn(
        self,
        prompt: NDArray[Any],
        length: int,
        options: SamplingOptions,
        seeds: Sequence[int],
        *,
        stepped: bool = False,
    ) -> Iterator[Ids]:
        """`length` characters after a prompt for each of B seeds, (B, n) ids at a time.

        prompt: (N,), N at least 1. stepped: draw in numpy, a character at a time, also where the file could draw by
        itself. The ids are the same: what is done to the weights is, operator by operator, and what is done to the
        logits differs by a rounding of float64 at most.
        Raises: SamplingError, at the call, for a length or a seed below 0.
        """
        # All but the last character are read once for all rows; with the last the drawing begins.
        state = self.prefill(prompt[:-1])[1] if len(prompt) > 1 else self.zero_state(1)
        state = tuple(np.repeat(part, len(seeds), axis=1) for part in state)  # each (L, B, H)
        last = np.full((len(seeds), 1), prompt[-1], np.int64)
        if self.draws and options.repetition_penalty == 1 and not stepped:
            return self._drawn_by_loop(last, state, length, options, sampling.random_streams(length, seeds))
        logits, state = self.step(last, state)  # (B, 1, V)
        ids = sampling.generate(self.step, state, logits[:, 0], length, options, seeds, prompt)
        return (row[:, None] for row in ids)

    def _drawn_by_loop(
        self, ids: Ids, state: State, length: int, options: SamplingOptions, streams: list[np.random.Generator]
    ) -> Iterator[Ids]:
        """Runs the graph's loop for as many characters at once as take about `_RUN_S`. ids: (B, 1)."""
        size, remaining = _FIRST_RUN_CHARS, length
        while remaining:
            size = min(size, remaining)
            uniforms = np.stack([stream.random(size) for stream in streams])  # (B, size)
            began = perf_counter()
            drawn, state = self.draw(ids, state, uniforms, options)
            seconds = perf_counter() - began
            ids, remaining = drawn[:, -1:], remaining - size
            yield drawn
            if seconds < _RUN_S / 2:
                size = min(2 * size, _MOST_RUN_CHARS)
            elif seconds > _RUN_S:
                size = max(size // 2, 1)

    def _most_samples(self) -> int:
        """As many rows as the memory of a session surely holds: their states, before and after, and their logits."""
        num_layers, hidden_dim = self._state_shape
        state = 4 * num_layers * hidden_dim * len(self._states)
        return max(1, MEMORY_BYTES // (4 * state + 64 * len(self.vocab) + 4096))

    def _prompt_ids(self, prompt: str, unknown: Unknown) -> NDArray[Any]:
        if not isinstance(prompt, str):
            raise SamplingError(f"the prompt must be a str, not {type(prompt).__name__}")
        return self.vocab.begun(self.vocab.encode(prompt, unknown))

    def _check_stop(self, stop: str | None) -> None:
        if stop is not None and not isinstance(stop, str):
            raise SamplingError(f"the stop text must be a str, not {type(stop).__name__}")
        if stop == "":
            raise SamplingError("the stop text is empty; leave it out to write the whole length")
        missing = self.vocab.unknown_in(stop or "")
        if missing:
            names = listing([repr(character) for character in missing])
            raise SamplingError(f"the stop text can never be written: the model's vocabulary lacks {names}")


def fitting_threads(path: Path, streams: int) -> int:
    """How many threads to use for a model file: a second one helps from about 1.5 MB of weights on, or many streams.

    Never more than cores are free: threads wait for each other at every operator, so one that shares its core with
    another process makes all of them slower than one thread would be.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    size = 0
    with contextlib.suppress(OSError):  # opening it will say why
        size = path.stat().st_size
    if size * min(streams, 8) < _BYTES_FOR_THREADS:
        return 1
    return max(1, round(min(cores, _MOST_THREADS, free_cores())))


def fresh_seed() -> int:
    """A seed that nobody chose."""
    return secrets.randbits(32)
