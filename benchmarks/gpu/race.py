"""Phase `race`: seconds to a loss for the recipes, eager and replayed, against the reference transformer.

The clock of a recipe includes the capture of its graph. That of the compiled transformer leaves out its compilation,
which is reported apart.
"""

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any, cast

import numpy as np
import torch

from benchmarks.gpu.contest import Clock, Limits, Ours, Reference, Result, Side, race, warm_up
from benchmarks.gpu.reference_transformer import Recipe, Shape, Transformer
from benchmarks.gpu.results import Results, Value
from benchmarks.gpu.setup import ROOT, Setup, replay_without_gpu
from charrnn.config import RunConfig, load_config
from charrnn.data.corpus import Corpus, prepare
from train.loop.dataloader import IdSource

# What nanoGPT's README gives as its model's best: https://github.com/karpathy/nanoGPT.
TARGET = 1.4697
WITHIN_S = 3.0
_SECONDS = 60.0


class CompiledReference(Reference):
    """The transformer through torch.compile, compiled before the clock starts."""

    def __init__(self, shape: Shape, recipe: Recipe, corpus: Corpus, device: torch.device) -> None:
        super().__init__(shape, recipe, corpus, device)
        training = self.training
        weights = {name: value.clone() for name, value in self.model.state_dict().items()}
        began = time.perf_counter()
        # Without a GPU the checks are rehearsed, and C++ that is compiled for it would take minutes.
        backend = "inductor" if device.type == "cuda" else "aot_eager"
        training.model = cast(Transformer, torch.compile(training.model, backend=backend))
        for _ in range(2):
            training.step().item()
        self.compile_s = time.perf_counter() - began
        # From the beginning again: weights, moments, windows, dropout masks.
        self.model.load_state_dict(weights)
        training.optimizer.state.clear()
        training.step_number = 0
        training._random = np.random.default_rng(recipe.seed)
        torch.manual_seed(recipe.seed)


class Race:
    """Sides on one corpus, each trained until it reaches the target or a limit."""

    def __init__(self, setup: Setup, results: Results) -> None:
        self.setup, self.results = setup, results
        self.corpus = prepare(setup.config().data)
        self.val = IdSource(self.corpus.val, setup.device)
        self.shape = Shape() if setup.on_gpu else Shape(layers=2, heads=2, width=16, context=12)
        self.recipe = Recipe() if setup.on_gpu else Recipe(batch_size=8, steps=12, warmup_steps=2)

    def run(self) -> None:
        """All sides, the ones that the goal names first: a phase that runs out of time leaves out the rest."""
        self.results.check("warm up", self._warm_up)
        quick, shakespeare = "gpu-quick.yaml", "shakespeare.yaml"
        self._ours(quick, seed=1, graph=True)
        self._reference(compiled=True)
        self._reference(compiled=False)
        self._ours(quick, seed=1, graph=False)
        self._ours(shakespeare, seed=1, graph=True)
        self._ours(shakespeare, seed=1, graph=False)
        for seed in self.setup.size(1, 0) * (2, 3):
            for name in (quick, shakespeare):
                self._ours(name, seed=seed, graph=True)
        self.results.check("goal", partial(goal, self.results.values))

    def _warm_up(self) -> Value:
        """Two steps of each kind, thrown away: the libraries of cuDNN and cuBLAS are loaded on nobody's time."""
        makers: list[Callable[[Clock], Side]] = [
            partial(Ours, self._config(name, train__mixed_precision=precision))
            for precision in self.setup.precisions
            for name in ("gpu-quick.yaml", "shakespeare.yaml")
        ]
        makers.append(lambda _: Reference(self.shape, self.recipe, self.corpus, self.setup.device))
        warm_up(makers, self.setup.device)
        return {}

    def _config(self, name: str, **options: Any) -> RunConfig:
        run_dir = str(self.setup.folder("race"))
        if self.setup.on_gpu:  # as the file has it
            epochs = load_config(ROOT / "configs" / name, {}).train.epochs
            options = {"train__epochs": epochs, "train__max_steps": 0, "log__every": 50, **options}
        else:
            options = {"train__max_steps": 8, **options}
        return self.setup.config(name, train__run_dir=run_dir, **options)

    def _ours(self, name: str, *, seed: int, graph: bool) -> None:
        precision = "fp16" if self.setup.on_gpu else "no"
        config = self._config(name, train__seed=seed, train__mixed_precision=precision)

        def made(clock: Clock) -> Side:
            side = Ours(self.setup.with_graph(config) if graph else config, clock)
            if graph and not self.setup.on_gpu:
                replay_without_gpu(side.trainer)
            return side

        label = f"{name}, {'replayed' if graph else 'eager'}, seed {seed}"
        self._race(label, made, 0.1 if name == "gpu-quick.yaml" else 0.5)

    def _reference(self, *, compiled: bool) -> None:
        kind = CompiledReference if compiled else Reference
        made = partial(kind, self.shape, self.recipe, self.corpus, self.setup.device)
        self._race(f"transformer, {'compiled' if compiled else 'eager'}", lambda _: made(), 0.5)

    def _race(self, label: str, make: Any, interval: float) -> None:
        limits = Limits(TARGET, _SECONDS, interval, self.setup.size(0, 12))
        sides: list[Side] = []

        def side(clock: Clock) -> Side:
            sides.append(make(clock))
            return sides[0]

        def run() -> Value:
            result = race(side, self.val, self.shape.context, limits)
            return described(result) | {"compile_s": getattr(sides[0], "compile_s", None)}

        self.results.check(label, run)


def described(result: Result) -> Value:
    """A side's result as JSON, with the curve thinned to 40 points."""
    every = -(-len(result.curve) // 40)
    best_s, best = min(result.curve, key=lambda point: point[1])
    curve = [(round(seconds, 2), round(loss, 4)) for seconds, loss in result.curve[::every]]
    return asdict(result) | {"curve": curve, "best": best, "best_s": best_s}


def goal(values: dict[str, Value]) -> Value:
    """The quick recipe's slowest seed against the faster of the two transformers, and against the seconds allowed."""
    quick = [v.get("reached_s") for name, v in values.items() if name.startswith("gpu-quick.yaml, replayed")]
    others = [v["reached_s"] for name, v in values.items() if name.startswith("transformer") and v.get("reached_s")]
    reached = [s for s in quick if s is not None]
    if not others or len(reached) < max(1, len(quick)):
        return {"skipped": "not all sides reached the target"}
    ratio = min(others) / max(reached)
    return {"ok": ratio >= 3 and max(reached) <= WITHIN_S, "times as fast": ratio, "slowest seed, s": max(reached)}
