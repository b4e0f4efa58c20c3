"""Where metrics go: metrics.jsonl, the tracker, the console, the summary at the end."""
