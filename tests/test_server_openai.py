"""infer serve as the `openai` package sees it: a client that nobody here wrote."""

import json
import time
from http.client import HTTPConnection

import httpx
import numpy as np
import openai
import pytest
from openai import OpenAI
from tiny_models import write_model

from benchmarks.serving import serving
from charrnn.vocab import Vocab
from infer import Engine, SamplingOptions

PROMPT = "ROMEO:\n"


@pytest.fixture(scope="module")
def files(model_folder):
    return {
        "chars": write_model(model_folder / "chars.onnx", precision="int8"),
        "bytes": write_model(model_folder / "b.onnx", Vocab.of_bytes(), rnn="LSTM"),
    }


@pytest.fixture(scope="module")
def served(files):
    models = [part for name, file in files.items() for part in ("--model", f"{name}={file}")]
    with serving(*models, "--max-streams", 8, "--max-queue", 8, "--max-tokens-limit", 5_000_000) as server:
        yield server


@pytest.fixture(scope="module")
def engines(files):
    return {name: Engine(file) for name, file in files.items()}


@pytest.fixture(scope="module")
def client(served):
    return OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=30)


@pytest.fixture
def ask(client):
    def ask(**fields):
        known = {"prompt": PROMPT, "model": "chars", "seed": 1, "max_tokens": 20} | fields
        extra = {name: known.pop(name) for name in list(known) if name in EXTRA}
        return client.completions.create(**known, extra_body=extra)

    return ask


EXTRA = ("top_k", "min_p", "repetition_penalty", "unknown", "state", "return_state")


def test_models_are_listed_by_name(client):
    assert [model.id for model in client.models.list()] == ["chars", "bytes"]
    assert client.models.retrieve("bytes").object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


@pytest.mark.parametrize("model", ["chars", "bytes"])
def test_the_text_is_what_generate_writes(ask, engines, model):
    made = ask(model=model, max_tokens=150, temperature=0.9, top_k=12, repetition_penalty=1.1)
    (choice,) = made.choices
    wanted = engines[model].generate(PROMPT, 150, SamplingOptions(0.9, 12, repetition_penalty=1.1), seed=1)
    assert choice.text == "".join(wanted)
    assert (choice.finish_reason, choice.logprobs, made.model) == ("length", None, model)
    assert made.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": 7, "completion_tokens": 150, "total_tokens": 157,
    }  # fmt: skip


def test_a_stream_brings_the_same_text(ask):
    whole = ask(max_tokens=3000).choices[0].text
    chunks = list(ask(max_tokens=3000, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks[:-1]) == whole
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert len(chunks) > 3
    assert (chunks[-1].choices, chunks[-1].usage.total_tokens) == ([], 3007)
    assert {c.usage for c in chunks[:-1]} == {None}


def test_prompts_and_choices_are_numbered(ask, engines):
    made = ask(prompt=["a", "b"], n=3)
    assert [c.index for c in made.choices] == list(range(6))
    wanted = [text for prompt in "ab" for text in engines["chars"].generate_batch(prompt, 3, 20, seed=1)]
    assert [c.text for c in made.choices] == wanted
    assert made.usage.prompt_tokens == 2
    texts = dict.fromkeys(range(6), "")
    for chunk in ask(prompt=["a", "b"], n=3, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert list(texts.values()) == wanted


def test_a_prompt_may_be_ids(ask, engines):
    ids = engines["chars"].vocab.encode(PROMPT).tolist()
    assert ask(prompt=ids, echo=True).choices[0].text == ask(echo=True).choices[0].text
    assert [c.text for c in ask(prompt=[ids, ids[:3]]).choices] == [c.text for c in ask(prompt=[PROMPT, "ROM"]).choices]


def test_stop_texts_end_the_text(ask):
    whole = ask(max_tokens=200).choices[0].text
    (choice,) = ask(max_tokens=200, stop=[whole[50:53], whole[20:24], "~~"]).choices
    assert choice.text == whole[: min(whole.find(whole[50:53]), whole.find(whole[20:24]))]
    assert choice.finish_reason == "stop"
    streamed = list(ask(max_tokens=200, stop=whole[50:53], stream=True))
    assert "".join(c.choices[0].text for c in streamed) == whole.partition(whole[50:53])[0]


@pytest.mark.parametrize("model", ["chars", "bytes"])
def test_echo_and_logprobs_score_the_prompt(ask, engines, model):
    engine, text = engines[model], "ROMEO: come"
    ids = engine.vocab.encode(text).astype(np.int64)
    logits = engine.step(ids[None, :-1], engine.zero_state(1))[0][0].astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    (choice,) = ask(model=model, prompt=text, echo=True, logprobs=1, max_tokens=0).choices
    assert (choice.text, choice.logprobs.tokens) == (text, list(text))
    assert choice.logprobs.token_logprobs[0] is choice.logprobs.top_logprobs[0] is None
    np.testing.assert_allclose(choice.logprobs.token_logprobs[1:], log_p[np.arange(10), ids[1:]], atol=1e-5)
    tops = [max(top.values()) for top in choice.logprobs.top_logprobs[1:]]
    np.testing.assert_allclose(tops, log_p.max(-1), atol=1e-5)
    assert choice.logprobs.text_offset == list(range(11))


def test_logprobs_of_a_stream_are_those_of_the_whole(ask):
    whole = ask(logprobs=3, max_tokens=400, echo=True).choices[0].logprobs
    chunks = [c.choices[0].logprobs for c in ask(logprobs=3, max_tokens=400, echo=True, stream=True)]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [x for chunk in chunks for x in getattr(chunk, name)] == getattr(whole, name)
    assert {len(top) for top in whole.top_logprobs[1:]} <= {3, 4}


def test_best_of_returns_the_likeliest(ask):
    every = ask(n=6, logprobs=0).choices
    mean = {c.text: np.mean(c.logprobs.token_logprobs) for c in every}
    best = [c.text for c in ask(best_of=6, n=2).choices]
    assert best == sorted(mean, key=mean.get, reverse=True)[:2]


def test_a_text_goes_on_from_the_state_of_another_request(ask):
    whole = ask(max_tokens=120).choices[0].text
    first = ask(max_tokens=50, return_state=True).choices[0]
    rest = ask(prompt=None, state=first.state, seed=None, max_tokens=70).choices[0]
    assert first.text + rest.text == whole
    # With text after it, and an option of its own.
    after = ask(prompt="the ", state=first.state, echo=True, temperature=0, max_tokens=30).choices[0].text
    assert after == "the " + ask(prompt=PROMPT + first.text + "the ", temperature=0, max_tokens=30).choices[0].text
    with pytest.raises(openai.UnprocessableEntityError, match="another model"):
        ask(model="bytes", prompt=None, state=first.state)
    # In a stream the last chunk has it.
    *_, last = ask(max_tokens=50, return_state=True, stream=True)
    assert last.choices[0].state == first.state


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"suffix": "x"}, openai.BadRequestError, "suffix is not supported"),
        ({"logit_bias": {"5": 1}}, openai.BadRequestError, "logit_bias is not supported"),
        ({"presence_penalty": 0.5}, openai.BadRequestError, "presence_penalty is not supported"),
        ({"temperature": -1}, openai.BadRequestError, "temperature must be"),
        ({"top_p": 0}, openai.BadRequestError, "top_p must"),
        ({"logprobs": 6}, openai.BadRequestError, "logprobs must be an integer, 0 to 5"),
        ({"max_tokens": 5_000_001}, openai.BadRequestError, "limit of 5,000,000"),
        ({"stop": list("abcde")}, openai.BadRequestError, "up to 4"),
        ({"n": 2, "best_of": 1}, openai.BadRequestError, "best_of"),
        ({"n": 17}, openai.BadRequestError, "more than the 16"),
        ({"prompt": "\N{SNOWMAN}"}, openai.UnprocessableEntityError, "U\\+2603"),
        ({"prompt": [3, 999]}, openai.UnprocessableEntityError, "vocabulary"),
        ({"model": "gpt-4"}, openai.NotFoundError, "there are: chars, bytes"),
        ({"state": "AAAA", "prompt": None}, openai.UnprocessableEntityError, "state"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_have_their_status_and_say_what_to_do(ask, fields, error, message, stream):
    with pytest.raises(error, match=message):
        ask(**fields, stream=stream)


def test_neutral_values_and_skipped_characters_are_accepted(ask):
    neutral = {"suffix": None, "logit_bias": {}, "presence_penalty": 0, "frequency_penalty": 0.0, "user": "me"}
    assert ask(prompt="RO\N{SNOWMAN}M", unknown="skip", echo=True, **neutral).choices[0].text.startswith("ROM")


def test_a_full_queue_is_429_and_a_retry_succeeds(served, ask):
    body = json.dumps({"model": "chars", "prompt": "a", "max_tokens": 5_000_000, "n": 8})
    full = [HTTPConnection("127.0.0.1", served.port) for _ in range(2)]
    for connection in full:  # 8 that run, 8 that wait
        connection.request("POST", "/v1/completions", body)
    served.wait_for("charrnn_streams_waiting", 8)
    refused = httpx.post(f"{served.url}/v1/completions", json={"prompt": "a"})
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    with pytest.raises(openai.RateLimitError):
        ask()
    assert served.gauge("charrnn_requests_rejected_total") == 2
    for connection in full:
        connection.close()
    retrying = OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=5)
    assert retrying.completions.create(model="chars", prompt="a").choices[0].text


def test_a_client_that_gives_up_frees_its_row(served, client):
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5).completions.create(model="chars", prompt="a", max_tokens=5_000_000)
    served.wait_for("charrnn_streams_running", 0)
    stream = client.completions.create(model="chars", prompt="a", max_tokens=5_000_000, stream=True)
    next(stream)
    served.wait_for("charrnn_streams_running", 1)
    stream.close()
    served.wait_for("charrnn_streams_running", 0)


def test_every_request_is_logged_with_its_id(served, client):
    made = client.completions.with_raw_response.create(model="chars", prompt="a", max_tokens=4)
    found, end = [], time.monotonic() + 10
    while not found and time.monotonic() < end:  # the line is written once the response is out
        found = [line for line in served.lines() if line.get("id") == made.headers["x-request-id"]]
    (line,) = found
    assert {"level": "info", "status": 200, "chars": 4, "model": "chars"}.items() <= line.items()
    assert json.loads(made.text)["id"] == line["id"]


def test_tokens_go_to_text_and_back(served, engines):
    with httpx.Client(base_url=served.url) as http:
        tokens = http.post("/tokenize", json={"prompt": PROMPT, "add_special_tokens": False}).json()
        assert tokens == {"tokens": engines["chars"].vocab.encode(PROMPT).tolist(), "count": 7}
        assert http.post("/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": PROMPT}
        assert http.post("/tokenize", json={"prompt": "\u00e9", "model": "bytes"}).json()["tokens"] == [0xC3, 0xA9]
        assert http.get("/tokenizer_info").json() == {"bos_token": "\n", "eos_token": None}
        wrong = [{"prompt": 5}, {"tokens": ["a"]}, {"tokens": [10**9]}, {"prompt": "\N{SNOWMAN}"}]
        paths = ["/tokenize", "/detokenize", "/detokenize", "/tokenize"]
        statuses = [http.post(path, json=body).status_code for path, body in zip(paths, wrong, strict=True)]
        assert statuses == [400, 400, 422, 422]
