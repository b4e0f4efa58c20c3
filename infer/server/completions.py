"""POST /v1/completions: turns a validated request into jobs, and their output into a response."""

import asyncio
import base64
import dataclasses
import json
import math
import time
from collections.abc import AsyncIterator
from typing import Any

import numpy as np

from charrnn.errors import VocabError
from charrnn.vocab import Unknown, Vocab
from infer.engine import fresh_seed
from infer.server.errors import ApiError
from infer.server.pool import Pool
from infer.server.protocol import CompletionRequest
from infer.server.ticket import Changes, Ticket, size_of

# Scored characters of one response; each takes about 100 bytes of JSON, plus 100 per alternative.
_MOST_SCORES = 1 << 20


class Logprobs:
    """OpenAI's `logprobs` object of one choice, from (id, log probability, top log probabilities) triples."""

    def __init__(self, vocab: Vocab) -> None:
        self._vocab, self._decode, self._offset = vocab, vocab.decoder(), 0

    def take(self, scores: list[Any]) -> dict[str, list[Any]]:
        """Return the object for the next characters."""
        lists: dict[str, list[Any]] = {name: [] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}
        for i, logprob, top in scores:
            lists["tokens"].append(self._token(i))
            lists["token_logprobs"].append(logprob)
            likeliest = None if top is None else {self._token(j): lp for j, lp in top} | {self._token(i): logprob}
            lists["top_logprobs"].append(likeliest)
            lists["text_offset"].append(self._offset)
            self._offset += len(self._decode(i))
        return lists

    def _token(self, i: int) -> str:
        if self._vocab.kind == "chars":
            return self._vocab.symbols[i]
        return chr(i) if i < 0x80 else f"bytes:\\x{i:02x}"


class Completion:
    """One request being processed.

    Args:
        request: The validated request.
        pool: The workers of its model.
        request_id: For the response.
        timeout: In seconds from `began`.
        began: Time of arrival, by the event loop's clock.
    """

    def __init__(self, request: CompletionRequest, pool: Pool, request_id: str, timeout: float, began: float) -> None:
        self.request, self._pool, self._began, self._deadline = request, pool, began, began + timeout
        self._vocab = pool.vocab
        self.head = {"id": request_id, "object": "text_completion", "created": int(time.time()), "model": pool.name}
        self._ready = asyncio.Event()
        self._prompts = [self._ids(prompt) for prompt in request.prompts]
        self._tickets: list[Ticket] = []
        self.prompt_chars = sum(len(ids) - lead for ids, lead in self._prompts)
        self._check_scores()
        self.chars = 0
        count = len(self._prompts) * request.choices
        self._logprobs = None if request.logprobs is None else [Logprobs(self._vocab) for _ in range(count)]

    def _ids(self, prompt: str | tuple[int, ...]) -> tuple[np.ndarray[Any, Any], int]:
        """Return the ids to read, and how many of the first are not part of the prompt."""
        ids = encoded(self._vocab, prompt, self.request.unknown)
        if self.request.state is not None:
            return ids, 0
        begun = self._vocab.begun(ids)
        return begun, len(begun) - len(ids)

    def _check_scores(self) -> None:
        """Raises: ApiError if more characters would be scored than a response may hold."""
        request = self.request
        if request.logprobs is None and request.choices == request.n:
            return
        scores = len(self._prompts) * request.choices * request.max_tokens
        scores += request.choices * self.prompt_chars if request.echo and request.logprobs is not None else 0
        if scores > _MOST_SCORES:
            message = f"{scores:,} characters would be scored, more than {_MOST_SCORES:,}; lower max_tokens or n"
            raise ApiError(400, message, "best_of" if request.logprobs is None else "logprobs")

    def submit(self) -> None:
        """Submit the jobs to the workers. Raises: ApiError if the queue is full."""
        request = self.request
        messages = [self._message(ids, lead) for ids, lead in self._prompts]
        self._pool.check_room(len(messages) * request.choices, sum(map(size_of, messages)))
        for message in messages:
            self._tickets.append(self._pool.submit(message, request.stream, self._ready))

    def _message(self, ids: np.ndarray[Any, Any], lead: int) -> dict[str, Any]:
        """Return the job of one prompt, as sent to a worker."""
        request = self.request
        seed = fresh_seed() if request.seed is None else request.seed
        own_stream = request.state is not None and request.seed is None and request.choices == 1
        return {
            "ids": base64.b64encode(ids.astype("<u4").tobytes()).decode(),
            "lead": 1 if request.state is not None else lead,
            "state": request.state,
            "length": request.max_tokens,
            "options": dataclasses.asdict(request.options),
            # One for each choice; none for one choice that goes on with the random stream of its state.
            "seeds": [] if own_stream else [seed + i for i in range(request.choices)],
            "stop": request.stop,
            # best_of ranks by log probability.
            "logprobs": 0 if request.logprobs is None and request.choices > request.n else request.logprobs,
            "score_prompt": request.echo and request.logprobs is not None,
            "return_state": request.return_state,
        }

    def cancel(self) -> None:
        """Cancel the request's jobs, unless they are over."""
        for ticket in self._tickets:
            ticket.cancel()

    async def changes(self) -> AsyncIterator[Changes]:
        """Yield new output of each choice by its index; if the request is not streamed, once, at the end."""
        while not all(ticket.done for ticket in self._tickets):
            try:
                async with asyncio.timeout_at(self._deadline):
                    await self._ready.wait()
            except TimeoutError:
                limit = self._deadline - self._began
                raise ApiError(503, f"not done in {limit:g} s (--timeout); ask for less", code="timeout") from None
            self._ready.clear()
            waits = not (self.request.stream or any(ticket.error for ticket in self._tickets))
            if waits and not all(ticket.finished for ticket in self._tickets):
                continue
            taken = enumerate(ticket.take() for ticket in self._tickets)
            changes = {p * self.request.choices + i: change for p, found in taken for i, change in found.items()}
            self.chars += sum(change["chars"] for change in changes.values())
            if changes:  # the event may have been set for output that was taken already
                yield changes

    def choice(self, index: int, change: dict[str, Any], first: bool) -> dict[str, Any]:
        """Return a choice in OpenAI's format; the first of each index includes the echoed prompt."""
        ids, lead = self._prompts[index // self.request.choices]
        echoed = self._vocab.decode(ids[lead:].tolist()) if first and self.request.echo else ""
        shown = {
            "index": index,
            "text": echoed + change["text"],
            "logprobs": self._logprobs[index].take(change.get("scores", [])) if self._logprobs else None,
            "finish_reason": change.get("finish"),
        }
        return shown | ({"state": change["state"]} if "state" in change else {})

    def usage(self) -> dict[str, int]:
        """Return the characters read and generated."""
        return {
            "prompt_tokens": self.prompt_chars,
            "completion_tokens": self.chars,
            "total_tokens": self.prompt_chars + self.chars,
        }

    async def complete(self) -> dict[str, Any]:
        """Return the response of a request that is not streamed."""
        request, choices = self.request, []
        (outputs,) = [changes async for changes in self.changes()]
        for p in range(len(self._prompts)):
            indices = [p * request.choices + i for i in range(request.choices)]
            if request.choices > request.n:
                indices = sorted(indices, key=lambda index: _mean_logprob(outputs[index]), reverse=True)[: request.n]
            choices += [self.choice(index, outputs[index], first=True) for index in indices]
        choices = [choice | {"index": index} for index, choice in enumerate(choices)]
        return self.head | {"choices": choices, "usage": self.usage()}

    async def stream(self, changes: AsyncIterator[Changes], first: Changes) -> AsyncIterator[str]:
        """Yield server-sent events. first: the first of `changes`."""
        begun = set[int]()
        head = json.dumps(self.head)[:-1]
        tail = ', "usage": null}\n\n' if self.request.include_usage else "}\n\n"
        try:
            while first:
                for index, change in first.items():
                    choice = self.choice(index, change, first=index not in begun)
                    begun.add(index)
                    yield f'data: {head}, "choices": [{json.dumps(choice)}]{tail}'
                first = await anext(changes, {})
            if self.request.include_usage:
                yield f"data: {json.dumps(self.head | {'choices': [], 'usage': self.usage()})}\n\n"
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield f"data: {json.dumps(error.body())}\n\n"


def encoded(vocab: Vocab, prompt: str | tuple[int, ...], unknown: Unknown) -> np.ndarray[Any, Any]:
    """Return a prompt's ids, (N,). Raises: ApiError for characters or ids not in the vocabulary."""
    if isinstance(prompt, str):
        try:
            return vocab.encode(prompt, unknown)
        except VocabError as error:
            message = str(error).replace("--unknown skip", 'unknown: "skip"')
            raise ApiError(422, message, "prompt", "unknown_characters") from None
    if prompt and not 0 <= min(prompt) <= max(prompt) < len(vocab):
        raise ApiError(422, f"the ids are not all in the vocabulary's [0, {len(vocab)})", "prompt")
    return np.array(prompt, vocab.dtype)


def _mean_logprob(output: dict[str, Any]) -> float:
    """Return the mean log probability of the generated characters, by which best_of ranks; -inf without any."""
    scores = output["scores"][len(output["scores"]) - output["chars"] :] if output["chars"] else []
    return sum(score[1] for score in scores) / len(scores) if scores else -math.inf
