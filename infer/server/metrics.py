"""What `/metrics` reports, by prometheus-client, whose histograms and text format are those that scrapers know."""

from types import SimpleNamespace
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
    """All metrics of a server, which a test may have several of in one process."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)
        self.requests = Counter("charrnn_requests", "Requests answered.", ["path", "status"], registry=registry)

        def by_model(kind: Any, name: str, text: str, buckets: tuple[float, ...] = ()) -> Any:
            options = {"buckets": buckets} if buckets else {}
            return kind(f"charrnn_{name}", text, ["model"], registry=registry, **options)

        self._by_model = {
            "rejected": by_model(Counter, "requests_rejected", "Requests refused for load."),
            "running": by_model(Gauge, "streams_running", "Choices that generate."),
            "waiting": by_model(Gauge, "streams_waiting", "Choices that wait."),
            "generated": by_model(Counter, "generated_chars", "Characters generated."),
            "read": by_model(Counter, "prompt_chars", "Characters of prompts read."),
            "hits": by_model(Counter, "prefix_cache_hits", "Prompts with a cached prefix."),
            "misses": by_model(Counter, "prefix_cache_misses", "Prompts without one."),
            "restarts": by_model(Counter, "worker_restarts", "Workers that ended unasked."),
            "ready": by_model(Gauge, "workers_ready", "Workers that take requests."),
            "first": by_model(Histogram, "time_to_first_char_seconds", "Of a choice.", _SECONDS),
            "per_char": by_model(Histogram, "time_per_char_seconds", "Of a choice, after its first.", _CHAR_SECONDS),
            "rows": by_model(Histogram, "batch_rows", "Rows of a tick.", _ROWS),
        }

    def of(self, model: str) -> SimpleNamespace:
        """Return the metrics of one model."""
        return SimpleNamespace(**{name: metric.labels(model) for name, metric in self._by_model.items()})

    def text(self) -> bytes:
        """Return all in Prometheus' text format."""
        return generate_latest(self._registry)
