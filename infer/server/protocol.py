"""Validation of completion requests: OpenAI's fields, and a few extensions.

https://platform.openai.com/docs/api-reference/completions/create. A token is a character, or a byte for a byte
vocabulary.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, get_args

from charrnn.errors import SamplingError, listing, printable
from charrnn.sampling import SamplingOptions
from charrnn.vocab import Unknown
from infer.server.errors import ApiError

MAX_CHOICES = 128
_MAX_STOPS = 4
_MAX_STOP_CHARS = 1000
_INTEGERS = {"max_tokens": (0, None), "n": (1, MAX_CHOICES), "best_of": (1, MAX_CHOICES), "logprobs": (0, 5),
             "seed": (0, 2**63 - 1), "top_k": (0, None)}  # fmt: skip
# Unsupported fields of OpenAI's API, and the values that have no effect.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "suffix": ("",), "logit_bias": ({},), "presence_penalty": (0,), "frequency_penalty": (0,),
}  # fmt: skip


@dataclass(frozen=True)
class CompletionRequest:
    """A validated request.

    Attributes:
        prompts: Texts, or ids of the vocabulary; each gets `n` choices.
        include_usage: Whether a stream ends with the usage.
        stop: A choice ends before the first occurrence of any of these.
        max_tokens: Characters to generate per choice; 0 only scores the prompt.
        best_of: Choices to generate, of which the `n` with the highest log probability are returned; None is n.
        logprobs: Report each character's log probability, and this many top ones; None reports none.
        return_state: Whether to return each choice's `state`.
        unknown: How to handle characters of the prompt that are not in the vocabulary.
        state: The `state` of an earlier choice, to continue it.
    """

    prompts: tuple[str | tuple[int, ...], ...]
    options: SamplingOptions
    include_usage: bool
    stop: tuple[str, ...] = ()
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
    """Parse and validate a request's body.

    Raises:
        ApiError: 400 with the field's name, for anything the API does not define.
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
        _check(name, value)
    _check_together(given, max_tokens_limit)
    try:
        options = SamplingOptions(**{name: given[name] for name in _SAMPLING & given.keys()})
    except SamplingError as error:
        raise ApiError(400, str(error), str(error).partition(" ")[0]) from None
    own = {name: given[name] for name in _OWN & given.keys()}
    if "stop" in own:
        own["stop"] = (own["stop"],) if isinstance(own["stop"], str) else tuple(own["stop"])
    prompts, include_usage = _prompts(given.get("prompt", "")), _include_usage(given)
    return CompletionRequest(prompts, options, include_usage, **own)


def parse_tokenize(body: bytes, name: str, kind: type) -> dict[str, Any]:
    """Parse a body with one field, a text or ids, and optionally a model; others are ignored, as in vLLM."""
    given = _json_object(body)
    value = given.get(name)
    if not isinstance(value, kind) or (kind is list and value and not _is_ids(value)):
        raise ApiError(400, f"{name} must be a {'string' if kind is str else 'list of ids'}", name)
    if given.get("model") is not None:
        _check("model", given["model"])
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


def _integer(low: int, high: int | None) -> tuple[Callable[[Any], bool], str]:
    limits = f"{low} or more" if high is None else f"{low} to {high}"
    return lambda v: type(v) is int and low <= v <= (v if high is None else high), f"an integer, {limits}"


# A predicate for each field's value, and its description.
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **{name: _integer(*limits) for name, limits in _INTEGERS.items()},
    **dict.fromkeys(
        ("temperature", "top_p", "min_p", "repetition_penalty"),
        (lambda v: type(v) is int or (type(v) is float and math.isfinite(v)), "a number"),
    ),
    **dict.fromkeys(("echo", "stream", "return_state"), (lambda v: type(v) is bool, "true or false")),
    **dict.fromkeys(("model", "user", "state"), (lambda v: isinstance(v, str), "a string")),
    "unknown": (lambda v: v in get_args(Unknown), f"one of {', '.join(get_args(Unknown))}"),
    "stop": (
        lambda v: (
            isinstance(v, str | list)
            and len(v := [v] if isinstance(v, str) else v) <= _MAX_STOPS
            and all(isinstance(s, str) and 0 < len(s) <= _MAX_STOP_CHARS for s in v)
        ),
        f"a string or up to {_MAX_STOPS}, each of 1 to {_MAX_STOP_CHARS} characters",
    ),
}


def _check(name: str, value: object) -> None:
    """Raises: ApiError for an invalid value."""
    holds, what = _RULES.get(name, (lambda _: True, ""))
    if not holds(value):
        raise ApiError(400, f"{name} must be {what}, not {json.dumps(value)[:80]}", name)


def _check_together(given: dict[str, Any], max_tokens_limit: int) -> None:
    """Raises: ApiError for fields that conflict, or exceed the server's limit."""
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
    """Normalize a string, ids, or a list of either."""
    one = [value] if isinstance(value, str) or _is_ids(value) else value
    if not isinstance(one, list) or not one or not all(isinstance(p, str) or _is_ids(p) for p in one):
        raise ApiError(400, "prompt must be a string, a list of strings, a list of ids, or a list of such", "prompt")
    if len(one) > MAX_CHOICES:
        raise ApiError(400, f"prompt has {len(one)} entries; at most {MAX_CHOICES} per request", "prompt")
    try:
        "".join(p for p in one if isinstance(p, str)).encode()
    except UnicodeEncodeError:
        raise ApiError(400, "prompt is not valid Unicode: it has half of a surrogate pair", "prompt") from None
    return tuple(p if isinstance(p, str) else tuple(p) for p in one)


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(i) is int for i in value)


def _include_usage(given: dict[str, Any]) -> bool:
    options = given.get("stream_options", {})
    if not isinstance(options, dict) or options.keys() - {"include_usage"}:
        raise ApiError(400, 'stream_options must be {"include_usage": true or false}', "stream_options")
    value = options.get("include_usage") or False
    if type(value) is not bool:
        raise ApiError(400, "stream_options.include_usage must be true or false", "stream_options")
    return value
