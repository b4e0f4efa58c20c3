"""From the phases' JSON to the tables of docs/performance.md."""

from benchmarks.common import markdown, markdown_head
from benchmarks.gpu.results import END, Value, verdict

Phases = dict[str, dict[str, Value]]


def failures(phases: Phases) -> list[str]:
    """Return the names of the checks that failed, as phase.check."""
    return [f"{phase}.{name}" for phase, checks in phases.items() for name, v in checks.items() if verdict(v) == "FAIL"]


def tables(phases: Phases) -> list[str]:
    """Return the lines: the device, correctness, the race, speed; of phases that did not run, nothing."""
    found = phases.get("correct", {}).get("environment", {})
    where = ", ".join(f"{name} {found[name]}" for name in ("GPU", "torch", "CUDA", "cuDNN", "NCCL") if name in found)
    lines = [where, ""] if where else []
    return [*lines, *_correct(phases), *_race(phases.get("race", {})), *_speed(phases.get("speed", {}))]


def _correct(phases: Phases) -> list[str]:
    checks = [(n, v) for phase in ("correct", "commands") for n, v in phases.get(phase, {}).items() if n != END]
    rows = [markdown([name, verdict(v), v["seconds"]]) for name, v in checks]
    return [*markdown_head(["check", "", "seconds"], 1), *rows, ""] if rows else []


def _race(checks: dict[str, Value]) -> list[str]:
    head = markdown_head(["side", "chars/s", "MiB", "seconds to the loss", "steps", "best", "compiled in, s"], 6)
    rows = []
    for name, v in checks.items():
        if "reached_s" not in v:
            continue
        memory = f"{v['memory'] / 2**20:,.0f}" if v["memory"] is not None else ""
        reached = f"{v['reached_s']:.2f}" if v["reached_s"] is not None else f"not in {v['seconds']:.0f}"
        compiled = f"{v['compile_s']:.1f}" if v["compile_s"] is not None else ""
        cells = [name, f"{v['chars_per_s']:,.0f}", memory, reached, v["steps"], f"{v['best']:.4f}", compiled]
        rows.append(markdown(cells))
    return [*head, *rows, ""] if rows else []


def _speed(checks: dict[str, Value]) -> list[str]:
    columns = ["chars/s", "ms a step", "us a time step", "TFLOP/s", "% of bf16 peak", "host us a step", "MiB"]
    measured = {name: v for name, v in checks.items() if "chars/s" in v}
    rows = [markdown([name, *("" if v[c] is None else v[c] for c in columns)]) for name, v in measured.items()]
    lines = [*markdown_head(["trainer", *columns], len(columns)), *rows, ""] if rows else []
    floor = checks.get("cells", {}).get("forward, both", {})
    if floor:
        rows = [markdown([name, *pair]) for name, pair in floor.items()]
        lines += [*markdown_head(["one LSTM layer", "us a time step, forward", "both ways"], 2), *rows, ""]
    return lines
