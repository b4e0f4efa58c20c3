"""Results that reach the disk and the terminal as soon as there are any."""

import json
import math
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

Value = dict[str, Any]

# The entry of a phase that came to its end.
END = "end"
_MOST_SHOWN = 600


class Results:
    """The results of a phase. A value with "ok": False is a failure, one without "ok" a measurement."""

    def __init__(self, path: Path, seconds: float) -> None:
        """Start the clock.

        Args:
            path: JSON file, rewritten after each check.
            seconds: After them no check is started.
        """
        self._path, self._deadline = path, time.monotonic() + seconds
        self._lock = threading.Lock()
        self.values: dict[str, Value] = {}

    def check(self, name: str, function: Callable[[], Value]) -> Value:
        """Run one check and record what it returns, or its error. The checks after it run in any case."""
        began = time.monotonic()
        if began > self._deadline and name != END:
            return self._put(name, {"skipped": "no time left"}, 0.0)
        try:
            value = function()
        except Exception as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())[:_MOST_SHOWN]
            value = {"ok": False, "error": text, "traceback": traceback.format_exc()[-2000:]}
        return self._put(name, value, time.monotonic() - began)

    def _put(self, name: str, value: Value, seconds: float) -> Value:
        with self._lock:
            self.values[name] = value | {"seconds": round(seconds, 1)}
            self._path.write_text(json.dumps(finite(self.values), indent=1, default=str, allow_nan=False))
        shown = json.dumps(finite({k: v for k, v in value.items() if k != "traceback"}), default=str)
        print(f"{verdict(value):4} {self._path.stem}.{name} [{seconds:.1f} s] {shown[:_MOST_SHOWN]}", flush=True)
        return value


def verdict(value: Value) -> str:
    """Return FAIL, skip or ok."""
    return "skip" if "skipped" in value else "FAIL" if value.get("ok") is False else "ok"


def finite(value: Any) -> Any:
    """Return the value with every non-finite number as text, which JSON can hold."""
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read_all(folder: Path) -> dict[str, dict[str, Value]]:
    """Return phase -> check -> value, as far as a run came."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
