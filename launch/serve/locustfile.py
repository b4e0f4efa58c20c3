"""Streams for locust (https://locust.io) to put on a server: first texts as requests, characters as their length.

    locust -f launch/serve/locustfile.py --headless --users 64 --spawn-rate 64 --run-time 30s --host http://127.0.0.1:8000

The row `first text` times the status line, which comes with a stream's first text; `text` times all of it, and has
characters as its content size. CHARRNN_API_KEY is the key, if the server has one.
"""

import json
import os
from time import perf_counter

from locust import HttpUser, task

_HEADERS = {"Authorization": f"Bearer {os.environ.get('CHARRNN_API_KEY', 'none')}"}
_REQUEST = {"prompt": "The king said: ", "max_tokens": 400, "temperature": 0.8, "top_k": 40, "stream": True}
_REQUEST |= {"unknown": "skip"}  # of the prompt, for models of another alphabet


class Reader(HttpUser):
    """A client that reads one text after the other."""

    @task
    def read(self) -> None:
        """Read a text to its end."""
        began, chars, failure = perf_counter(), 0, None
        given = {"json": _REQUEST, "headers": _HEADERS, "stream": True, "name": "first text", "catch_response": True}
        with self.client.post("/v1/completions", **given) as response:
            if response.status_code != 200:
                response.failure(f"status {response.status_code}")
                return
            response.success()
            for line in response.iter_lines(chunk_size=None):
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    failure = failure or event.get("error", {}).get("message")
                    chars += sum(len(choice["text"]) for choice in event.get("choices", []))
        self.environment.events.request.fire(
            request_type="SSE", name="text", response_time=1000 * (perf_counter() - began), response_length=chars,
            exception=failure and RuntimeError(failure), context=self.context(),
        )  # fmt: skip
