"""Validation of completion requests: OpenAI's fields, and a few extensions.

https://platform.openai.com/docs/api-reference/completions/create. A token is a character, or a byte for a byte
vocabulary.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
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


def parse(body: bytes, max_tokens_limit: int) -> CompletionRequest:
    """Parse and validate a request's body.

    Raises:
        ApiError: 400 with the field's name, for anything the API does not define.
    """
    given = _json_object(body)
    for name, neutral in _UNSUPPORTED.items():
        if name in given and given[name] is not None and given[name] not in neutral:
            raise ApiError(400, f"{name} is not supported; leave it out", name, "unsupported_parameter")
    if unknown := sorted(given.keys() - _RULES.keys() - _UNSUPPORTED.keys()):
        names = listing([repr(name[:80]) for name in unknown])
        message = f"unknown field(s): {names}; known: {', '.join(sorted(_RULES))}"
        raise ApiError(400, message, printable(unknown[0][:80]), "unknown_parameter")
    given = {name: value for name, value in given.items() if value is not None and name in _RULES}
    for name, value in given.items():
        _check(name, value)
    _check_together(given, max_tokens_limit)
    try:
        options = SamplingOptions(**{name: given.pop(name) for name in _SAMPLING & given.keys()})
    except SamplingError as error:
        raise ApiError(400, str(error), str(error).partition(" ")[0]) from None
    prompts = _prompts(given.pop("prompt", ""))
    include_usage = given.pop("stream_options", {}).get("include_usage") or False
    if "stop" in given:
        given["stop"] = (given["stop"],) if isinstance(given["stop"], str) else tuple(given["stop"])
    return CompletionRequest(prompts, options, include_usage, **given)


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


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(i) is int for i in value)


def _is_prompt(value: object) -> bool:
    return isinstance(value, str) or _is_ids(value)


_SAMPLING = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty"}
# Every field that the API has: a predicate for its value, and its description.
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **{name: _integer(*limits) for name, limits in _INTEGERS.items()},
    **dict.fromkeys(
        _SAMPLING - {"top_k"}, (lambda v: type(v) is int or (type(v) is float and math.isfinite(v)), "a number")
    ),
    **dict.fromkeys(("echo", "stream", "return_state"), (lambda v: type(v) is bool, "true or false")),
    **dict.fromkeys(("model", "user", "state"), (lambda v: isinstance(v, str), "a string")),
    "prompt": (
        lambda v: _is_prompt(v) or (isinstance(v, list) and bool(v) and all(map(_is_prompt, v))),
        "a string, a list of strings, a list of ids, or a list of such",
    ),
    "stream_options": (
        lambda v: (
            isinstance(v, dict) and v.keys() <= {"include_usage"} and isinstance(v.get("include_usage"), bool | None)
        ),
        '{"include_usage": true or false}',
    ),
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
    holds, what = _RULES[name]
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


def _prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
    """Normalize a string, ids, or a list of either."""
    prompts = [value] if _is_prompt(value) else value
    if len(prompts) > MAX_CHOICES:
        raise ApiError(400, f"prompt has {len(prompts)} entries; at most {MAX_CHOICES} per request", "prompt")
    try:
        "".join(p for p in prompts if isinstance(p, str)).encode()
    except UnicodeEncodeError:
        raise ApiError(400, "prompt is not valid Unicode: it has half of a surrogate pair", "prompt") from None
    return tuple(p if isinstance(p, str) else tuple(p) for p in prompts)
