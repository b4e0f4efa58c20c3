"""What `/metrics` reports, by prometheus-client, whose histograms and text format are those that scrapers know."""

from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

# A second series per counter, of the time it began at, is of no use to a scraper that sees it begin at 0.
disable_created_metrics()

_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_CHAR_SECONDS = (5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
_ROWS = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """All counters of a server, which a test may have several of in one process."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)
        model = ["model"]
        self.requests = Counter("charrnn_requests", "Requests answered.", ["path", "status"], registry=registry)
        self.rejected = Counter("charrnn_requests_rejected", "Requests refused for load.", model, registry=registry)
        self.running = Gauge("charrnn_streams_running", "Choices that generate.", model, registry=registry)
        self.waiting = Gauge("charrnn_streams_waiting", "Choices that wait.", model, registry=registry)
        self.generated = Counter("charrnn_generated_chars", "Characters generated.", model, registry=registry)
        self.read = Counter("charrnn_prompt_chars", "Characters of prompts read.", model, registry=registry)
        self.hits = Counter("charrnn_prefix_cache_hits", "Prompts with a cached prefix.", model, registry=registry)
        self.misses = Counter("charrnn_prefix_cache_misses", "Prompts without one.", model, registry=registry)
        self.restarts = Counter("charrnn_worker_restarts", "Workers that ended unasked.", model, registry=registry)
        self.ready = Gauge("charrnn_workers_ready", "Workers that take requests.", model, registry=registry)
        self.first = Histogram(
            "charrnn_time_to_first_char_seconds",
            "From request to first text.",
            model,
            registry=registry,
            buckets=_SECONDS,
        )
        self.per_char = Histogram(
            "charrnn_time_per_char_seconds",
            "Of one choice, after its first text.",
            model,
            registry=registry,
            buckets=_CHAR_SECONDS,
        )
        self.occupancy = Histogram("charrnn_batch_rows", "Rows of a tick.", model, registry=registry, buckets=_ROWS)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)

    def tick(self, model: str, counts: dict[str, Any]) -> None:
        """Add what a worker reports of a tick."""
        for name, counter in (("generated", self.generated), ("read", self.read), ("hits", self.hits),
                              ("misses", self.misses)):  # fmt: skip
            if counts.get(name):
                counter.labels(model).inc(counts[name])
        for rows in counts.get("groups", ()):
            self.occupancy.labels(model).observe(rows)
