"""Rows of a batch, each of one choice of a request.

Letters: B batch rows, T characters read, N characters generated, L num_layers, H hidden_dim, V vocabulary size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from charrnn.sampling import SamplingOptions, log_softmax, not_finite
from infer.engine import Engine
from infer.network import Ids, State
from infer.server.states import TextState
from infer.text_writer import TextWriter

# Most rows of one run of the graph: their states and intermediate results stay in a core's cache.
GROUP_ROWS = 64

# An id, its log probability (None for one that nothing comes before), and the likeliest ids with theirs.
Score = tuple[int, float | None, list[tuple[int, float]] | None]


@dataclass(eq=False)
class Job:
    """A prompt and the choices that continue it.

    Attributes:
        ids: (N,), N at least 1. All but the last are read before the first character is generated.
        lead: How many of the first ids are not part of the prompt: the start of a text, or the end of an earlier one.
        state: After the first `position` ids; each (L, 1, H).
        recent: Ids before `ids`, for the repetition penalty.
        continued: Whether `state` is the end of an earlier text, so that `ids` are not the complete context.
        streams: For each choice its seed, and how many numbers of its random stream were used before.
        logprobs: Number of top log probabilities to report with each character's; None reports none.
        score_prompt: Whether to report those of the prompt too.
        blocks: states.digests of `ids` but the last.
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
    blocks: list[bytes] = field(default_factory=list)
    prompt_scores: list[Score] = field(default_factory=list)


class Row:
    """One choice while it generates.

    Attributes:
        state: Before `last`, each (L, 1, H).
        last: The next input id.
        left: Characters left to generate.
        fresh: Whether it has generated none yet.
        ended: Whether its last event was returned.
    """

    def __init__(self, job: Job, index: int, engine: Engine) -> None:
        self.job, self.index = job, index
        self.seed, self.drawn = job.streams[index]
        generator = np.random.PCG64(self.seed)
        generator.advance(self.drawn)
        self.stream = np.random.Generator(generator)
        self.writer = TextWriter(engine.vocab, job.stop)
        self.state, self.last, self.left = job.state, int(job.ids[-1]), job.length
        self.fresh, self.ended = True, False
        self.recent = [*job.recent, *job.ids[-_window(job) :].tolist()][-_window(job) :]
        self._engine, self._scores = engine, list[Score]()
        # For choices that return their state: the last point with no text held back, and the ids since.
        self._anchor, self._since, self._anchor_count = (job.state, tuple(self.recent)), list[int](), 0

    @property
    def penalised(self) -> bool:
        """Whether the row has a repetition penalty, which the graph's loop does not implement."""
        return self.job.options.repetition_penalty != 1

    def feed(self, ids: list[int], logits: NDArray[Any] | None = None) -> dict[str, Any] | None:
        """Add sampled ids, after `state` was set to that before the last of them.

        Args:
            ids: N ids; those beyond `left` are ignored.
            logits: (N, V) they were sampled from, for a row that reports log probabilities.

        Returns:
            The event to send, if there is new text or the row ends.
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
        self.ended = finish is not None
        nothing_held = self.writer.count - self._anchor_count == len(self._since)
        if self.job.return_state and nothing_held and not self.ended:
            # A copy: the state is a view into that of the whole group, which an anchor would keep.
            self._anchor = tuple(part.copy() for part in self.state), self._recent_after(len(self._since))
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
        """Return the state at the end of the returned text, without ids generated beyond it."""
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


def run_rows(engine: Engine, rows: Sequence[Row], length: int) -> list[dict[str, Any]]:
    """Generate `length` characters for each of at most GROUP_ROWS rows, in one run of the graph.

    Returns:
        The rows' events.

    Raises:
        SamplingError, ModelFileError, MemoryError: as Engine.decode.
    """
    before = tuple(np.concatenate(parts, axis=1) for parts in zip(*(row.state for row in rows), strict=True))
    last = np.array([row.last for row in rows])  # (B,)
    history = [np.array(row.recent) for row in rows] if any(row.penalised for row in rows) else None
    options, streams = [row.job.options for row in rows], [row.stream for row in rows]
    drawn, after = engine.decode(last, before, length, options, streams, history)  # (B, N), each (L, B, H)
    logits = _logits(engine, rows, last, before, drawn)
    events = []
    for b, (row, ids) in enumerate(zip(rows, drawn.tolist(), strict=True)):
        row.state = tuple(part[:, b : b + 1] for part in after)
        if event := row.feed(ids, logits.get(b)):
            events.append(event)
    return events


def _logits(engine: Engine, rows: Sequence[Row], last: Ids, before: State, drawn: Ids) -> dict[int, NDArray[Any]]:
    """Return the logits, (N, V), of rows that report log probabilities, by a second pass over their ids."""
    chosen = [b for b, row in enumerate(rows) if row.job.logprobs is not None]
    if not chosen:
        return {}
    read = np.concatenate([last[chosen, None], drawn[chosen, :-1]], axis=1)  # (B', N)
    logits, _ = engine.step(read, tuple(part[:, chosen] for part in before))  # (B', N, V)
    return dict(zip(chosen, logits, strict=True))


def scored(logits: NDArray[Any], ids: Sequence[int], top: int) -> list[Score]:
    """Return log probabilities of ids, and the `top` highest at each position.

    Args:
        logits: (N, V), before temperature and filters.
        ids: N ids.
        top: Number of highest log probabilities.

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
