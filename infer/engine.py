"""Engine: a loaded model file that generates text.

Letters: B batch, L num_layers, H hidden_dim, N characters of a prompt or to generate.
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
from charrnn.cores import cores, free_cores
from charrnn.errors import SamplingError, listing
from charrnn.sampling import SamplingOptions
from charrnn.vocab import Unknown
from infer.model_file.loader import default_model
from infer.network import Ids, Network, State
from infer.text_writer import TextWriter

# Characters of a run of the graph's loop: few enough that text seems to flow, and that Ctrl-C and a stop text act at
# once; as many as make the time between two runs not matter.
_RUN_S = 0.03
_FIRST_RUN_CHARS = 8
_MOST_RUN_CHARS = 128
# See docs/performance.md.
_BYTES_FOR_THREADS = 1_500_000
_MOST_THREADS = 4


class Engine(Network):
    """A charrnn model file, loaded.

    Args:
        path: The model file; None is the shipped default.
        threads: CPU threads an operator may use; None is as many as help a model of that size to generate `streams`
            texts at once, and as other processes leave cores for, mostly 1. The text does not depend on it.
        streams: Texts to generate at once, by which `threads` is chosen.

    Raises:
        ModelFileError: if the file is missing, damaged, not charrnn's, or of another version.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None = None, threads: int | None = None, streams: int = 1
    ) -> None:
        path = default_model() if path is None else Path(path)
        super().__init__(path, default_threads(path, streams) if threads is None else threads)

    def drawn(
        self,
        prompt: NDArray[Any],
        length: int,
        options: SamplingOptions,
        seeds: Sequence[int],
        *,
        in_graph: bool = True,
    ) -> Iterator[Ids]:
        """Generate `length` characters after a prompt for each of B seeds, (B, n) ids at a time.

        Args:
            prompt: (N,), N at least 1.
            length: Characters to generate.
            options: How they are sampled.
            seeds: One per row.
            in_graph: As in `decode`.

        Raises:
            SamplingError: at the call, for a length or a seed below 0.
        """
        streams = sampling.random_streams(length, seeds)
        # All but the last character are read once for all rows; generating begins with the last.
        state = self.prefill(prompt[:-1])[1] if len(prompt) > 1 else self.zero_state(1)

        def runs(state: State) -> Iterator[Ids]:
            """Decode as many characters at once as take about `_RUN_S`. state: each (L, B, H)."""
            last, rows = np.full(len(seeds), prompt[-1], np.int64), [options] * len(seeds)
            history: Any = None if options.repetition_penalty == 1 else np.tile(prompt, (len(seeds), 1))  # (B, N)
            size, remaining = _FIRST_RUN_CHARS, length
            while remaining:
                size = min(size, remaining)
                began = perf_counter()
                ids, state = self.decode(last, state, size, rows, streams, history, in_graph=in_graph)
                seconds = perf_counter() - began
                last, remaining = ids[:, -1], remaining - size
                if history is not None:
                    history = np.concatenate([history, ids], axis=1)[:, -options.repetition_window or None :]
                yield ids
                if seconds < _RUN_S / 2:
                    size = min(2 * size, _MOST_RUN_CHARS)
                elif seconds > _RUN_S:
                    size = max(size // 2, 1)

        return runs(tuple(np.repeat(part, len(seeds), axis=1) for part in state))

    def generate(
        self,
        prompt: str = "",
        length: int = 500,
        options: SamplingOptions = SamplingOptions(),  # noqa: B008  frozen
        *,
        seed: int | None = None,
        stop: str | None = None,
        past_end: bool = False,
        unknown: Unknown = "error",
    ) -> Iterator[str]:
        """Generate text after `prompt` (which is not repeated), in pieces, each computed when it is asked for.

        A piece is what is generated in some hundredths of a second, and at least a character. The arguments are
        checked, and the prompt is read, at the call. An empty prompt starts from a newline, or from the vocabulary's
        first entry if it has no newline; with documents, any prompt is the beginning of one, and starts from the end
        of the one before. None of these is part of the text.

        Args:
            prompt: The text before.
            length: Characters to generate (bytes for a byte vocabulary).
            options: How they are sampled.
            seed: The same seed gives the same text; None takes a new one.
            stop: The text ends before the first occurrence of this; what may be its beginning is held back.
            past_end: Go on where a document ends, and with its end in the text; else the text ends before it.
            unknown: What to do with characters of the prompt that the vocabulary lacks: error, skip or replace.

        Raises:
            SamplingError: for an argument out of range.
            VocabError: for unknown characters.
        """
        rows = self._rows(prompt, 1, length, options, seed, stop, past_end, unknown)
        return (piece for (piece,) in rows if piece)

    def generate_batch(
        self,
        prompt: str = "",
        num_samples: int = 1,
        length: int = 500,
        options: SamplingOptions = SamplingOptions(),  # noqa: B008  frozen
        *,
        seed: int | None = None,
        stop: str | None = None,
        past_end: bool = False,
        unknown: Unknown = "error",
    ) -> list[str]:
        """Generate `num_samples` texts after `prompt`, side by side; the other arguments are those of `generate`.

        Text i is what `generate` returns with seed + i.
        """
        num_samples = sampling.whole_number(num_samples, "num_samples")
        if not 1 <= num_samples <= self.max_rows():
            raise SamplingError(
                f"num_samples must be 1 to {self.max_rows():,} for this model and its memory, not {num_samples}"
            )
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
        """Yield the text that each run of characters adds to each of B streams; at last what was held back."""
        self._check_texts(prompt, stop)
        length = sampling.whole_number(length, "length")
        first_seed = fresh_seed() if seed is None else sampling.whole_number(seed, "seed")
        prompt_ids = self.vocab.begun(self.vocab.encode(prompt, unknown))
        drawn = self.drawn(prompt_ids, length, options, range(first_seed, first_seed + batch))
        writers = [TextWriter(self.vocab, [] if stop is None else [stop], past_end) for _ in range(batch)]

        def rows() -> Iterator[list[str]]:
            for ids in drawn:
                yield [writer.feed(row) for writer, row in zip(writers, ids.tolist(), strict=True)]
                if all(writer.ended for writer in writers):
                    return
            yield [writer.end() for writer in writers]

        return rows()

    def _check_texts(self, prompt: str, stop: str | None) -> None:
        for name, text in (("prompt", prompt), ("stop text", "-" if stop is None else stop)):
            if not isinstance(text, str):
                raise SamplingError(f"the {name} must be a str, not {type(text).__name__}")
        if stop == "":
            raise SamplingError("the stop text is empty; leave it out to write the whole length")
        if missing := self.vocab.unknown_in(stop or ""):
            names = listing([repr(character) for character in missing])
            raise SamplingError(f"the stop text can never be written: the model's vocabulary lacks {names}")


def default_threads(path: Path, streams: int) -> int:
    """Return how many threads to use: a second one helps from about 1.5 MB of weights on, or with many streams.

    Never more than cores are free: threads wait for each other at every operator, so one that shares its core with
    another process makes all of them slower than one thread would be.

    Args:
        path: The model file.
        streams: Texts that are generated at once.
    """
    size = 0
    with contextlib.suppress(OSError):  # opening it will report why
        size = path.stat().st_size
    if size * min(streams, 8) < _BYTES_FOR_THREADS:
        return 1
    return max(1, round(min(cores(), _MOST_THREADS, free_cores())))


def fresh_seed() -> int:
    """Return a random seed."""
    return secrets.randbits(32)
