"""Metrics and messages of a run: metrics.jsonl, the tracker, the progress display, the summary."""
