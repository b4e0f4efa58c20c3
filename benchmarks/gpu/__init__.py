"""Checks for a machine with one GPU: correctness, seconds to a loss, speed. On a CPU the same code runs at a tiny size.

    python -m benchmarks.gpu                      all phases, in under 8 minutes
    python -m benchmarks.gpu correct              one of: correct, commands, race, speed
    python -m benchmarks.gpu --text shakespeare.txt --out gpu-out

It runs from a checkout: `PYTHONPATH=. python -m benchmarks.gpu` needs Python 3.11 or later, torch 2.11 to 2.13,
accelerate, onnx, onnxruntime, safetensors, numpy, pydantic, pyyaml, typer and rich, and installs nothing. Where there
is no network, `--text` names a copy of tinyshakespeare, by which the race's target is meant.

Each phase is a process of its own with a time limit; `correct` and `commands` run side by side, and nothing in them is
timed. Each check prints a line as it ends and is written to OUT/PHASE.json at once, so that a run that is cut off
still has what it found. At the end OUT/tables.md has the tables for docs/performance.md. The exit code is 1 when a
check failed.
"""
