"""The arithmetic of benchmarks.scaling: what its measurements imply, and a projection to a network."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from benchmarks.common import Quartiles, quartiles

CASES = ("one", "apart", "silent", "together", "allreduce")

Metrics = dict[str, float]


@dataclass(frozen=True)
class Turn:
    """A worker's measurements of a turn.

    Attributes:
        steps: Seconds of each timed step, as `step` and its parts.
        cpu: Processor seconds a second while timed.
        ready: (parameters,) mean seconds from the end of the forward pass to each gradient.
    """

    steps: list[Metrics]
    cpu: float
    ready: list[float]


@dataclass(frozen=True)
class Message:
    """The gradients of one step.

    Attributes:
        sizes: Bytes of each parameter's gradient.
        buckets: The parameters that are reduced together, by index, in DDP's order.
    """

    sizes: list[int]
    buckets: list[list[int]]

    @property
    def bucket_sizes(self) -> list[int]:
        """Bytes of each bucket."""
        return [sum(self.sizes[i] for i in bucket) for bucket in self.buckets]


@dataclass(frozen=True)
class Measured:
    """rounds: as `case_metrics` names them. ready: of the case `one`, in each round."""

    message: Message
    rounds: list[Metrics]
    ready: list[list[float]]

    def median_ready(self) -> list[float]:
        """Returns (parameters,) seconds from the end of the forward pass to each gradient."""
        return [statistics.median(times) for times in zip(*self.ready, strict=True)]


@dataclass(frozen=True)
class Network:
    """bandwidth: bytes a second of a process's link, each way. latency: seconds a message takes whatever its size."""

    bandwidth: float
    latency: float


def case_metrics(case: str, turns: Sequence[Turn]) -> Metrics:
    """Averages a case over its steps and processes; `skew` is the mean time of the slowest process above that."""
    means = {f"{case}.{name}": fmean(s[name] for t in turns for s in t.steps) for name in turns[0].steps[0]}
    slowest = fmean(max(step["step"] for step in steps) for steps in zip(*(t.steps for t in turns), strict=True))
    return {**means, f"{case}.skew": slowest - means[f"{case}.step"], f"{case}.cpu": fmean(t.cpu for t in turns)}


def derived(metrics: Metrics) -> Metrics:
    """Computes three times, in seconds, and three ratios from a round's step times."""
    one, apart, silent, together = (metrics[f"{case}.step"] for case in CASES[:4])
    return {
        "exposed": together - silent,
        "one.compute": one - metrics["one.input"],
        "silent.compute": silent - metrics["silent.input"],
        "efficiency": one / together,
        "hardware": one / apart,
        "communication": apart / together,
    }


def summary(rounds: Sequence[Metrics]) -> dict[str, Quartiles]:
    """Returns the quartiles over `rounds` of everything measured and of everything derived within a round."""
    complete = [metrics | derived(metrics) for metrics in rounds]
    return {name: quartiles([metrics[name] for metrics in complete]) for name in complete[0]}


def ring_bytes(size: int, processes: int) -> float:
    """Returns the bytes that each process sends, and receives, in a ring all-reduce of `size` bytes."""
    return 2 * (processes - 1) / processes * size


def ring_seconds(size: int, processes: int, network: Network) -> float:
    """Returns the time of a ring all-reduce of `size` bytes (Patarasuk and Yuan 2009, cited in the package's main)."""
    return ring_bytes(size, processes) / network.bandwidth + 2 * (processes - 1) * network.latency


def exposed_seconds(message: Message, ready: Sequence[float], processes: int, network: Network) -> float:
    """Returns how much longer the all-reduces, one after the other, take than the backward pass that they overlap.

    Args:
        message: The gradients.
        ready: (parameters,) seconds from the start of the backward pass to each gradient.
        processes: In the ring.
        network: Its links.
    """
    free = 0.0
    for bucket, size in zip(message.buckets, message.bucket_sizes, strict=True):
        free = max(free, *(ready[i] for i in bucket)) + ring_seconds(size, processes, network)
    return free - max(ready)


def projection(step_s: float, message: Message, ready: Sequence[float], processes: int, network: Network) -> Metrics:
    """Projects a step of `processes` on a network from the `step_s` of one, with and without overlap."""
    allreduce = sum(ring_seconds(size, processes, network) for size in message.bucket_sizes)
    exposed = exposed_seconds(message, ready, processes, network)
    return {
        "processes": processes,
        "allreduce_s": allreduce,
        "exposed_s": exposed,
        "efficiency_without_overlap": step_s / (step_s + allreduce),
        "efficiency": step_s / (step_s + exposed),
    }
