"""Rows that generate together, each for one choice of a request.

Letters: B batch rows, T characters read, N characters generated, L num_layers, H hidden_dim, V vocabulary size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from charrnn.sampling import SamplingOptions, log_softmax, not_finite
from infer.engine import Engine
from infer.network import Ids, State
from infer.server.states import TextState
from infer.text_writer import TextWriter

# Rows of one run of the graph: their states and what is computed of them stay in a core's cache.
GROUP_ROWS = 64

# An id, its log probability (None for one that nothing comes before), and the likeliest ids with theirs.
Score = tuple[int, float | None, list[tuple[int, float]] | None]


@dataclass(eq=False)
class Job:
    """A prompt, and the choices that go on from it.

    Attributes:
        ids: (N,), N at least 1. All but the last are read before the first character is generated.
        lead: How many of the first ids are not the prompt's own: the start of a text, or the end of an earlier one.
        state: After the first `position` ids; each (L, 1, H).
        recent: Ids before `ids`, for the repetition penalty.
        continued: Whether `state` is where an earlier text ended, so that `ids` are not all that was read.
        streams: For each choice its seed, and the numbers that were taken from its stream before.
        logprobs: How many of the likeliest ids to report with each one's log probability; None is no report at all.
        score_prompt: Whether to report the prompt's too.
    """

    id: int
    ids: Ids
    state: State
    length: int
    options: SamplingOptions
    streams: Sequence[tuple[int, int]]
    stop: tuple[str, ...] = ()
    recent: tuple[int, ...] = ()
    lead: int = 0
    continued: bool = False
    logprobs: int | None = None
    score_prompt: bool = False
    return_state: bool = False
    position: int = 0
    started: int = 0
    finished: int = 0
    cancelled: bool = False
    prompt_scores: list[Score] = field(default_factory=list)


class Row:
    """One choice while it generates."""

    def __init__(self, job: Job, index: int, engine: Engine) -> None:
        self.job, self.index = job, index
        self.seed, self.drawn = job.streams[index]
        generator = np.random.PCG64(self.seed)
        generator.advance(self.drawn)
        self.stream = np.random.Generator(generator)
        self.writer = TextWriter(engine.vocab, job.stop)
        self.last = int(job.ids[-1])
        self.left = job.length
        self.fresh = True
        self.recent = [*job.recent, *job.ids[-_window(job) :].tolist()][-_window(job) :]
        self._engine, self._scores = engine, list[Score]()
        # Where the text was when nothing was held back, and what came since; kept for choices that return their state.
        self._anchor, self._since, self._anchor_count = (job.state, tuple(self.recent)), list[int](), 0

    @property
    def penalised(self) -> bool:
        """Whether the row has a repetition penalty, for which the graph's own loop has no rule."""
        return self.job.options.repetition_penalty != 1

    def feed(self, ids: list[int], logits: NDArray[Any] | None, state: State | None) -> dict[str, Any] | None:
        """Take what was drawn, (N,).

        Args:
            ids: More than are `left` are ignored.
            logits: (N, V) that the ids were drawn from, for a row that reports them.
            state: Before the last of the ids, each (L, 1, H), for a row that returns where it ended.

        Returns:
            The event to send, if there is anything to say yet; there is when the row ends.
        """
        used = ids[: self.left]
        self.left -= len(used)
        self.last, self.fresh = ids[-1], False
        if self.penalised:
            self.recent = (self.recent + used)[-_window(self.job) :]
        if logits is not None:
            self._scores += scored(logits[: len(used)], used, self.job.logprobs or 0)
        self._since += used if self.job.return_state else []
        before = self.writer.count
        text = self.writer.feed(used)
        if not (self.left or self.writer.ended):
            text += self.writer.end()
        finish = "stop" if self.writer.ended else None if self.left else "length"
        if state is not None and finish is None and self.writer.count - self._anchor_count == len(self._since):
            self._anchor = tuple(part.copy() for part in state), self._recent_after(len(self._since))
            self._anchor_count, self._since = self.writer.count, []
        return self._event(text, self.writer.count - before, finish) if text or finish else None

    def _event(self, text: str, count: int, finish: str | None) -> dict[str, Any]:
        event: dict[str, Any] = {"id": self.job.id, "i": self.index, "text": text, "chars": count}
        if self.job.logprobs is not None:
            event["scores"], self._scores = self._scores[:count], self._scores[count:]
        if finish:
            event["finish"] = finish
            if self.job.return_state:
                event["state"] = self.text_state()
        return event

    def text_state(self) -> TextState:
        """Where the text that was returned ends; what was generated beyond it is left out."""
        count = self.writer.count - self._anchor_count
        state, recent = self._anchor
        if count:
            read = np.array([[recent[-1], *self._since[: count - 1]]])  # (1, T)
            state = self._engine.step(read, state)[1]
        return TextState(state, self._recent_after(count), self.seed, self.drawn + self.writer.count)

    def _recent_after(self, count: int) -> tuple[int, ...]:
        return (*self._anchor[1], *self._since[:count])[-_window(self.job) :]


def _window(job: Job) -> int:
    return job.options.repetition_window


class Batch:
    """B rows and their states."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._state = engine.zero_state(0)  # each (L, B, H)
        self.rows: list[Row] = []

    def join(self, rows: list[Row]) -> None:
        """Add rows, at the state that their prompts left."""
        if rows:
            parts = zip(self._state, *(row.job.state for row in rows), strict=True)
            self._state = tuple(np.concatenate(part, axis=1) for part in parts)
            self.rows += rows

    def drop(self, leaving: set[Row]) -> None:
        """Remove rows."""
        if leaving:
            kept = [b for b, row in enumerate(self.rows) if row not in leaving]
            self._state = tuple(part[:, kept] for part in self._state)
            self.rows = [self.rows[b] for b in kept]

    def run(self, length: int) -> list[dict[str, Any]]:
        """Generate `length` characters for every row; those that end leave.

        Returns:
            The rows' events.

        Raises:
            SamplingError, ModelFileError, MemoryError: as Engine.decode.
        """
        events, leaving = [], set[Row]()
        for start in range(0, len(self.rows), GROUP_ROWS):
            for row, event in self._run_group(slice(start, start + GROUP_ROWS), length):
                events.append(event)
                if "finish" in event:
                    leaving.add(row)
        self.drop(leaving)
        return events

    def _run_group(self, group: slice, length: int) -> Iterator[tuple[Row, dict[str, Any]]]:
        """`run` for some of the rows."""
        rows, before = self.rows[group], tuple(part[:, group] for part in self._state)
        last = np.array([row.last for row in rows])  # (B,)
        history = [np.array(row.recent) for row in rows] if any(row.penalised for row in rows) else None
        options, streams = [row.job.options for row in rows], [row.stream for row in rows]
        drawn, after = self._engine.decode(last, before, length, options, streams, history)  # (B, N)
        logits = self._logits(rows, last, before, drawn)
        for part, new in zip(self._state, after, strict=True):
            part[:, group] = new
        for b, (row, ids) in enumerate(zip(rows, drawn.tolist(), strict=True)):
            state = tuple(part[:, b : b + 1] for part in after) if row.job.return_state else None
            event = row.feed(ids, logits.get(b), state)
            if event is not None:
                yield row, event

    def _logits(self, rows: list[Row], last: Ids, before: State, drawn: Ids) -> dict[int, NDArray[Any]]:
        """What the characters of rows that report them were drawn from, (N, V) each, by reading them once more."""
        chosen = [b for b, row in enumerate(rows) if row.job.logprobs is not None]
        if not chosen:
            return {}
        read = np.concatenate([last[chosen, None], drawn[chosen, :-1]], axis=1)  # (B', N)
        logits, _ = self._engine.step(read, tuple(part[:, chosen] for part in before))  # (B', N, V)
        return dict(zip(chosen, logits, strict=True))


def scored(logits: NDArray[Any], ids: Sequence[int], top: int) -> list[Score]:
    """Log probabilities of ids, and of the `top` likeliest in each one's place.

    Args:
        logits: (N, V), before temperature and the like.
        ids: N ids.
        top: Likeliest ids to report.

    Raises:
        SamplingError: if the logits are not finite.
    """
    if not np.isfinite(logits).all():
        raise not_finite()
    wide = log_softmax(logits)  # (N, V)
    best = np.argsort(-wide, axis=-1, kind="stable")[:, :top]  # (N, top)
    values = np.take_along_axis(wide, best, axis=-1).tolist()
    chosen = wide[np.arange(len(ids)), ids].tolist()
    likeliest = [list(zip(t, v, strict=True)) for t, v in zip(best.tolist(), values, strict=True)]
    return list(zip(ids, chosen, likeliest, strict=True))
