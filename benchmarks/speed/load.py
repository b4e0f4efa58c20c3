"""infer serve under locust, a load tool that nobody here wrote: its report beside the server's own, of the same run.

    python -m benchmarks.speed.load [--model FILE] [--users 64] [--seconds 20]

Left are the figures of launch/serve/locustfile.py as locust prints them, right what /metrics counted meanwhile.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import machine_line
from benchmarks.serving import ROOT, Served, serving

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_COUNTS = ("charrnn_requests_total", "charrnn_generated_chars_total", "charrnn_time_to_first_char_seconds_sum",
           "charrnn_time_to_first_char_seconds_count")  # fmt: skip


def counts(served: Served) -> list[float]:
    """The server's counters of completions."""
    return [served.gauge(name, 'path="/v1/completions"' if "requests" in name else "") for name in _COUNTS]


def run_locust(url: str, users: int, seconds: float) -> list[dict[str, Any]]:
    """The rows of locust's report. Raises: RuntimeError with what it printed when it fails, or a request did."""
    command = [sys.executable, "-m", "locust", "-f", ROOT / "launch" / "serve" / "locustfile.py", "--headless",
               "--users", users, "--spawn-rate", users, "--run-time", f"{seconds:g}s", "--host", url, "--json",
               "--stop-timeout", "30"]  # fmt: skip
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def compare(served: Served, users: int, seconds: float) -> list[tuple[str, float, float]]:
    """What locust and the server report: name, the one's value, the other's."""
    before, began = counts(served), time.monotonic()
    rows = {row["name"]: row for row in run_locust(served.url, users, seconds)}
    requests, chars, first_s, firsts = (b - a for a, b in zip(before, counts(served), strict=True))
    first, text = rows["first text"], rows["text"]
    elapsed = text["last_request_timestamp"] - text["start_time"]
    assert elapsed < time.monotonic() - began
    return [
        ("requests", first["num_requests"], requests),
        ("requests/s", text["num_requests"] / elapsed, requests / elapsed),
        ("characters/s", text["total_content_length"] / elapsed, chars / elapsed),
        ("first text, mean ms", first["total_response_time"] / first["num_requests"], 1e3 * first_s / firsts),
        ("failures", first["num_failures"] + text["num_failures"], served.gauge("charrnn_requests_rejected_total")),
    ]


@app.command()
def load(
    model: Annotated[Path | None, typer.Option(help="Model file; the shipped one if none is given.")] = None,
    users: Annotated[int, typer.Option(help="Clients that each read one text after the other.", min=1)] = 64,
    seconds: Annotated[float, typer.Option(help="Length of the run.", min=1)] = 20.0,
) -> None:
    """Measure infer serve by locust and by its own metrics."""
    with serving(*([] if model is None else ["--model", model])) as served:
        rows = compare(served, users, seconds)
    print(f"{machine_line()}\n\n{f'{users} users':<24}{'locust':>12}{'/metrics':>12}")
    print("\n".join(f"{name:<24}{theirs:>12,.1f}{ours:>12,.1f}" for name, theirs, ours in rows))


if __name__ == "__main__":
    app()
