"""What ranks tell each other for control goes over gloo and the store: on GPUs the default group is NCCL's.

A process group that only pretends stands for NCCL's, and another for gloo's; each rank finds its own values in them.
"""

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from charrnn.errors import TrainingError
from train.distributed.collectives import Collectives

ROOT = Path(__file__).parent.parent
# Tensors of the run itself, on the device: metrics, evaluation sums, hidden states, gradient norms.
DATA_PLANE = {
    "train/loop/metrics.py": 1,
    "train/loop/evaluation.py": 1,
    "train/loop/train_step.py": 2,
}
ON_THE_DEFAULT_GROUP = {"gather", "reduce", "broadcast", "gather_for_metrics", "wait_for_everyone"}
COLLECTIVES = [
    name
    for name in dir(dist)
    if name.startswith(("all_", "broadcast", "gather", "reduce", "scatter", "barrier", "monitored", "send", "recv"))
    and callable(getattr(dist, name))
]


@pytest.fixture
def used(monkeypatch):
    """The groups of the collectives that are called, by function; and the backends that new groups were asked for."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    seen = SimpleNamespace(groups={}, backends=[])
    new_group = dist.new_group

    def pretending(*args, backend=None, **kwargs):
        seen.backends.append(backend)
        return new_group(*args, backend="fake", **kwargs)

    def noting(name, original):
        def call(*args, **kwargs):
            group = kwargs.get("group") or next((a for a in args if isinstance(a, dist.ProcessGroup)), None)
            seen.groups.setdefault(name, []).append(group)
            return original(*args, **kwargs)

        return call

    monkeypatch.setattr(dist, "new_group", pretending)
    for name in COLLECTIVES:
        monkeypatch.setattr(dist, name, noting(name, getattr(dist, name)))
    yield seen
    dist.destroy_process_group()


def collectives():
    facts = {"process_index": 0, "num_processes": 2, "is_main_process": True, "is_local_main_process": True}
    return Collectives(SimpleNamespace(**facts))


def on_default_group(seen):
    return [name for name, groups in seen.groups.items() if any(g in (None, dist.group.WORLD) for g in groups)]


def test_control_messages_go_over_a_group_of_gloo(used):
    ranks = collectives()
    assert ranks.all_gather_integers([15, 2]) == [[15, 2]] * 2
    assert ranks.all_gather("x") == ["x", "x"]
    assert ranks.run_on_all(lambda: 3) == ranks.local_main_first(lambda: 3) == 3
    ranks.barrier()
    with pytest.raises(TrainingError):
        ranks.raise_if_any(TrainingError("wrong"))
    assert used.backends == ["gloo"]
    assert used.groups
    assert on_default_group(used) == []


def test_a_message_on_the_default_group_is_noticed(used):
    """Negative control."""
    ranks = collectives()
    ranks._group = None
    ranks.barrier()
    assert on_default_group(used) == ["all_gather_object"]
    dist.all_reduce(torch.ones(1))
    assert on_default_group(used) == ["all_gather_object", "all_reduce"]


def calls_in(source):
    """What Accelerator.NAME(...) and torch.distributed.NAME(...) are called in a source, by name."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = ast.unparse(node.func.value)
            if owner.endswith("accelerator") and node.func.attr in ON_THE_DEFAULT_GROUP:
                names.append(node.func.attr)
            if owner in ("dist", "torch.distributed") and node.func.attr in COLLECTIVES:
                names.append(node.func.attr)
    return names


def test_only_the_runs_own_tensors_cross_the_default_group():
    found = {str(p.relative_to(ROOT)): calls_in(p.read_text("utf-8")) for p in sorted((ROOT / "train").rglob("*.py"))}
    found.pop("train/distributed/collectives.py")
    assert {name: len(calls) for name, calls in found.items() if calls} == DATA_PLANE
    assert calls_in("self.accelerator.wait_for_everyone()\ndist.barrier()\nranks.barrier()") == [
        "wait_for_everyone",
        "barrier",
    ]
