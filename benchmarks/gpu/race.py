"""Phase `race`: seconds to a loss for the recipes, eager and replayed, against the reference transformer.

The clock of a recipe includes the capture of its graph. That of the compiled transformer leaves out its compilation,
which is reported apart.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.common import ROOT
from benchmarks.gpu.contest import Clock, Limits, Ours, Reference, Side, race
from benchmarks.gpu.results import Results, Value
from benchmarks.gpu.setup import Setup, replay_without_gpu
from benchmarks.gpu.transformer import Recipe, Shape
from charrnn.config import RunConfig, load_config
from charrnn.data.corpus import prepare
from train.loop.dataloader import IdSource

# What nanoGPT's README gives as its model's best: https://github.com/karpathy/nanoGPT.
TARGET = 1.4697
WITHIN_S = 3.0
_SECONDS = 60.0
# Seconds between two evaluations.
_INTERVALS = {"gpu-quick.yaml": 0.1, "shakespeare.yaml": 0.5, "transformer": 0.5}
_QUICK, _SHAKESPEARE, _TRANSFORMER = _INTERVALS


def run(setup: Setup, results: Results) -> None:
    """All sides, the ones that the goal names first: a phase that runs out of time leaves out the rest.

    Each is trained until it reaches the target or a limit.
    """
    corpus = prepare(setup.config().data)
    val = IdSource(corpus.val, setup.device)
    shape = Shape() if setup.on_gpu else Shape(layers=2, heads=2, width=16, context=12)
    recipe = Recipe() if setup.on_gpu else Recipe(batch_size=8, steps=12, warmup_steps=2)
    precision = "fp16" if setup.on_gpu else "no"
    reference = partial(Reference, shape, recipe, corpus, setup.device)

    def ours(name: str, graph: bool, seed: int, clock: Clock) -> Side:
        config = _config(setup, name, train__seed=seed, train__mixed_precision=precision)
        side = Ours(setup.with_train(config, cuda_graph=graph and setup.on_gpu), clock)
        if graph and not setup.on_gpu:
            replay_without_gpu(side.trainer)
        return side

    def measure(label: str, make: Callable[[Clock], Side]) -> None:
        interval = _INTERVALS[label.partition(",")[0]]
        limits = Limits(TARGET, _SECONDS, interval, setup.size(0, 12))
        results.check(label, partial(race, make, val, shape.context, limits))

    def measure_ours(name: str, graph: bool, seed: int = 1) -> None:
        label = f"{name}, {'replayed' if graph else 'eager'}, seed {seed}"
        measure(label, partial(ours, name, graph, seed))

    def warm_up() -> Value:
        """Two steps of each kind, thrown away: the libraries of cuDNN and cuBLAS are loaded on nobody's time."""
        clock = Clock(setup.device)
        for precision in setup.precisions:
            for name in (_QUICK, _SHAKESPEARE):
                _two_steps(Ours(_config(setup, name, train__mixed_precision=precision), clock))
        _two_steps(reference())
        return {}

    results.check("warm up", warm_up)
    measure_ours(_QUICK, True)
    measure(f"{_TRANSFORMER}, compiled", lambda _: reference(compiled=True))
    measure(f"{_TRANSFORMER}, eager", lambda _: reference())
    measure_ours(_QUICK, False)
    measure_ours(_SHAKESPEARE, True)
    measure_ours(_SHAKESPEARE, False)
    for seed in setup.size(1, 0) * (2, 3):
        for name in (_QUICK, _SHAKESPEARE):
            measure_ours(name, True, seed)
    results.check("goal", partial(goal, results.values))


def _two_steps(side: Side) -> None:
    side.train_step()
    side.train_step()


def _config(setup: Setup, name: str, **options: Any) -> RunConfig:
    fields: dict[str, Any] = {"train__run_dir": str(setup.work / "race"), "train__max_steps": 8}
    if setup.on_gpu:  # as the file has it
        epochs = load_config(ROOT / "configs" / name, {}).train.epochs
        fields |= {"train__epochs": epochs, "train__max_steps": 0, "log__every": 50}
    return setup.config(name, **fields, **options)


def goal(values: dict[str, Value]) -> Value:
    """The quick recipe's slowest seed against the faster of the two transformers, and against the seconds allowed."""
    quick = [v.get("reached_s") for name, v in values.items() if name.startswith(f"{_QUICK}, replayed")]
    others = [v["reached_s"] for name, v in values.items() if name.startswith(_TRANSFORMER) and v.get("reached_s")]
    reached = [s for s in quick if s is not None]
    if not others or len(reached) < max(1, len(quick)):
        return {"skipped": "not all sides reached the target"}
    ratio = min(others) / max(reached)
    return {"ok": ratio >= 3 and max(reached) <= WITHIN_S, "times as fast": ratio, "slowest seed, s": max(reached)}
