"""Training: the loop, evaluation, tracking, export. Entry: `accelerate launch train/main.py`."""

import os

# How often a thread of GNU OpenMP looks for work before it sleeps: libgomp reads this once, when torch loads it. Its
# default spins for milliseconds at every barrier, and beside another process on the cores that the spinning threads
# wait for, a training step takes a hundred times as long. docs/performance.md has the measurements.
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "1000"
