"""The fields of a completion request, checked one by one: OpenAI's, and a few of ours.

https://platform.openai.com/docs/api-reference/completions/create. A token is a character, or a byte for a byte
vocabulary.
"""

import json
import math
from dataclasses import dataclass, fields
from typing import Any, cast, get_args

from charrnn.errors import SamplingError, listing, printable
from charrnn.sampling import SamplingOptions
from charrnn.vocab import Unknown
from infer.server.errors import ApiError

MAX_CHOICES = 128
_MAX_STOPS = 4
_MAX_STOP_CHARS = 1000
_INTEGERS = {
    "max_tokens": (0, None), "n": (1, MAX_CHOICES), "best_of": (1, MAX_CHOICES), "logprobs": (0, 5),
    "seed": (0, 2**63 - 1), "top_k": (0, None),
}  # fmt: skip
_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty")
_FLAGS = ("echo", "stream", "return_state")
_STRINGS = ("model", "user", "state")
# Fields of OpenAI's API that would change the text, and the values with which they do not.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "suffix": ("",), "logit_bias": ({},), "presence_penalty": (0,), "frequency_penalty": (0,),
}  # fmt: skip


@dataclass(frozen=True)
class CompletionRequest:
    """One request's fields.

    Attributes:
        prompts: Texts, or ids of the vocabulary, to go on from; each gets `n` choices.
        max_tokens: Characters to generate per choice; 0 only scores the prompt.
        best_of: Choices to generate, of which the `n` likeliest are returned; None is n.
        stop: A choice ends before the first occurrence of any of these.
        logprobs: Report each character's log probability, and those of this many likeliest; None is neither.
        unknown: What to do with characters of the prompt that the vocabulary lacks.
        state: Where an earlier choice ended (its `state`), to go on from there.
        return_state: Whether each choice comes with its `state`.
        include_usage: Whether a stream ends with the counts of characters.
    """

    prompts: tuple[str | tuple[int, ...], ...]
    options: SamplingOptions
    stop: tuple[str, ...]
    include_usage: bool
    model: str | None = None
    max_tokens: int = 16
    n: int = 1
    best_of: int | None = None
    seed: int | None = None
    logprobs: int | None = None
    echo: bool = False
    stream: bool = False
    return_state: bool = False
    unknown: Unknown = "error"
    user: str | None = None
    state: str | None = None

    @property
    def choices(self) -> int:
        """Texts to generate per prompt."""
        return self.best_of or self.n


_OWN = {field.name for field in fields(CompletionRequest)} - {"prompts", "options", "include_usage"}
_SAMPLING = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty"}
_KNOWN = _OWN | _SAMPLING | {"prompt", "stream_options"}


def parse(body: bytes, max_tokens_limit: int) -> CompletionRequest:
    """Read a request's body.

    Raises:
        ApiError: 400 that names the field, for anything that is not exactly what the API defines.
    """
    given = _json_object(body)
    for name, neutral in _UNSUPPORTED.items():
        if name in given and given[name] is not None and given[name] not in neutral:
            raise ApiError(400, f"{name} is not supported; leave it out", name, "unsupported_parameter")
    if unknown := sorted(given.keys() - _KNOWN - _UNSUPPORTED.keys()):
        names = listing([repr(name[:80]) for name in unknown])
        message = f"unknown field(s): {names}; known: {', '.join(sorted(_KNOWN))}"
        raise ApiError(400, message, printable(unknown[0][:80]), "unknown_parameter")
    given = {name: value for name, value in given.items() if value is not None and name in _KNOWN}
    for name, value in given.items():
        _check_type(name, value)
    _check_together(given, max_tokens_limit)
    try:
        options = SamplingOptions(**{name: given[name] for name in _SAMPLING & given.keys()})
    except SamplingError as error:
        raise ApiError(400, str(error), str(error).partition(" ")[0]) from None
    plain = {name: given[name] for name in (_OWN - {"stop"}) & given.keys()}
    return CompletionRequest(
        prompts=_prompts(given.get("prompt", "")), options=options,
        stop=_stops(given.get("stop", [])), include_usage=_include_usage(given), **plain,
    )  # fmt: skip


def parse_tokenize(body: bytes, name: str, kind: type) -> dict[str, Any]:
    """Read a body that has one field, a text or ids, and may name a model; others are ignored, as vLLM does."""
    given = _json_object(body)
    value = given.get(name)
    if not isinstance(value, kind) or (kind is list and value and not _is_ids(value)):
        raise ApiError(400, f"{name} must be a {'string' if kind is str else 'list of ids'}", name)
    if given.get("model") is not None:
        _check_type("model", given["model"])
    return given


def _json_object(body: bytes) -> dict[str, Any]:
    try:
        given = json.loads(body.decode("utf-8"))
    except UnicodeDecodeError:
        raise ApiError(400, "the body is not valid UTF-8", code="invalid_utf8") from None
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {str(error)[:200]}", code="invalid_json") from None
    if not isinstance(given, dict):
        raise ApiError(400, f"the body must be a JSON object, not {type(given).__name__}", code="invalid_json")
    return given


def _check_type(name: str, value: object) -> None:
    if name in _INTEGERS:
        low, high = _INTEGERS[name]
        if type(value) is not int or value < low or (high is not None and value > high):
            limits = f"{low} or more" if high is None else f"{low} to {high}"
            raise ApiError(400, f"{name} must be an integer, {limits}, not {json.dumps(value)[:80]}", name)
    elif name in _NUMBERS:
        if type(value) not in (int, float) or (type(value) is float and not math.isfinite(value)):
            raise ApiError(400, f"{name} must be a number, not {json.dumps(value)[:80]}", name)
    elif name in _FLAGS:
        if type(value) is not bool:
            raise ApiError(400, f"{name} must be true or false, not {json.dumps(value)[:80]}", name)
    elif name in _STRINGS and not isinstance(value, str):
        raise ApiError(400, f"{name} must be a string, not {json.dumps(value)[:80]}", name)
    elif name == "unknown" and value not in get_args(Unknown):
        raise ApiError(
            400, f"unknown must be one of {', '.join(get_args(Unknown))}, not {json.dumps(value)[:80]}", name
        )


def _check_together(given: dict[str, Any], max_tokens_limit: int) -> None:
    """Rules between fields."""
    if given.get("max_tokens", 0) > max_tokens_limit:
        limit = f"this server's limit of {max_tokens_limit:,} (--max-tokens-limit)"
        raise ApiError(400, f"max_tokens is {given['max_tokens']:,}, above {limit}", "max_tokens")
    n, best_of = given.get("n", 1), given.get("best_of")
    if best_of is not None and best_of < n:
        raise ApiError(400, f"best_of ({best_of}) must be at least n ({n})", "best_of")
    if best_of is not None and best_of > n and given.get("stream"):
        raise ApiError(400, "best_of above n cannot be streamed, as the best is known at the end", "best_of")
    if "stream_options" in given and not given.get("stream"):
        raise ApiError(400, "stream_options needs stream: true", "stream_options")


def _prompts(value: object) -> tuple[str | tuple[int, ...], ...]:
    """A string, ids, or a list of either."""
    one = [value] if isinstance(value, str) or _is_ids(value) else value
    if not isinstance(one, list) or not one or not all(isinstance(p, str) or _is_ids(p) for p in one):
        raise ApiError(400, "prompt must be a string, a list of strings, a list of ids, or a list of such", "prompt")
    if len(one) > MAX_CHOICES:
        raise ApiError(400, f"prompt has {len(one)} entries; at most {MAX_CHOICES} per request", "prompt")
    for text in one:
        if isinstance(text, str) and any(0xD800 <= ord(char) < 0xE000 for char in text):
            raise ApiError(400, "prompt is not valid Unicode: it has half of a surrogate pair", "prompt")
    return tuple(p if isinstance(p, str) else tuple(p) for p in one)


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(i) is int for i in value)


def _stops(value: object) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    valid = isinstance(stops, list) and len(stops) <= _MAX_STOPS and all(isinstance(s, str) for s in stops)
    if not valid or not all(0 < len(s) <= _MAX_STOP_CHARS for s in cast(list[str], stops)):
        limits = f"a string or up to {_MAX_STOPS}, each of 1 to {_MAX_STOP_CHARS} characters"
        raise ApiError(400, f"stop must be {limits}", "stop")
    return tuple(cast(list[str], stops))


def _include_usage(given: dict[str, Any]) -> bool:
    options = given.get("stream_options", {})
    if not isinstance(options, dict) or options.keys() - {"include_usage"}:
        raise ApiError(400, 'stream_options must be {"include_usage": true or false}', "stream_options")
    value = options.get("include_usage") or False
    if type(value) is not bool:
        raise ApiError(400, "stream_options.include_usage must be true or false", "stream_options")
    return value
