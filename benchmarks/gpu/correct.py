"""Phase `correct`: the arithmetic and the training loop, in this process."""

from functools import partial

from benchmarks.gpu import loop, numerics
from benchmarks.gpu.results import Results
from benchmarks.gpu.setup import Setup

CHECKS = [numerics.environment, loop.graph, numerics.parity, numerics.types, loop.resuming, numerics.curve]
CHECKS += [numerics.weight_layout, numerics.evaluation, loop.dynamic, loop.divergence, loop.data_parallel]
CHECKS += [loop.failed_capture, numerics.precisions, loop.out_of_memory]


def run(setup: Setup, results: Results) -> None:
    """All of them."""
    for check in CHECKS:
        results.check(check.__name__, partial(check, setup))
