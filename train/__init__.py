"""Training: the loop, evaluation, checkpoints, tracking, export. Entry: `accelerate launch train/main.py`."""

import os

# How often a thread of GNU OpenMP polls for work before it sleeps; libgomp reads it when torch loads it. By default
# threads spin for milliseconds at every barrier: while another process shares the cores, a training step takes a
# hundred times as long. See docs/performance.md.
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "1000"
