"""The arithmetic of scaling.py: what its measurements say, and what they say of a network. scaling.py explains it."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

CASES = ("one", "apart", "silent", "together", "allreduce")
PARTS = ("input", "forward", "backward", "update")

Figures = dict[str, float]


@dataclass(frozen=True)
class Answer:
    """What a worker says of a turn.

    steps: seconds of each timed step, as `step` and its PARTS. cpu: processor seconds a second while timed. cpu_s:
    processor seconds of the whole turn. ready: (parameters,) mean seconds from the end of the forward pass to each
    gradient.
    """

    steps: list[Figures]
    cpu: float
    cpu_s: float
    ready: list[float]


@dataclass(frozen=True)
class Message:
    """The gradients of one step.

    sizes: bytes of each parameter's gradient. buckets: the parameters that cross together, by index, in DDP's order.
    """

    sizes: list[int]
    buckets: list[list[int]]

    @property
    def total(self) -> int:
        """Bytes of all gradients."""
        return sum(self.sizes)

    @property
    def bucket_sizes(self) -> list[int]:
        """Bytes of each bucket."""
        return [sum(self.sizes[i] for i in bucket) for bucket in self.buckets]


@dataclass(frozen=True)
class Round:
    """figures: as case_figures names them, `wire` (bytes a process and step), `others` (cores). ready: of `one`."""

    figures: Figures
    ready: list[float]


@dataclass(frozen=True)
class Measured:
    """rounds: those that count. aside: those that were disturbed, and measured again."""

    message: Message
    rounds: list[Round]
    aside: list[Round]

    @property
    def ready(self) -> list[float]:
        """(parameters,) median seconds from the end of the forward pass to each gradient."""
        return [statistics.median(times) for times in zip(*(r.ready for r in self.rounds), strict=True)]


@dataclass(frozen=True)
class Network:
    """bandwidth: bytes a second of a process's link, each way. latency: seconds a message takes whatever its size."""

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Spread:
    """Quartiles over rounds."""

    q1: float
    median: float
    q3: float


def spread(values: Sequence[float]) -> Spread:
    """values: two or more."""
    return Spread(*statistics.quantiles(values, n=4, method="inclusive"))


def case_figures(case: str, answers: Sequence[Answer]) -> Figures:
    """A case's figures in a round: means over its steps and processes, and what the slowest process takes longer."""
    names = answers[0].steps[0]
    means = {f"{case}.{name}": fmean(step[name] for a in answers for step in a.steps) for name in names}
    slowest = fmean(max(step["step"] for step in steps) for steps in zip(*(a.steps for a in answers), strict=True))
    return {**means, f"{case}.skew": slowest - means[f"{case}.step"], f"{case}.cpu": fmean(a.cpu for a in answers)}


def derived(figures: Figures) -> Figures:
    """What a round's step times, in seconds, say: three times and three ratios."""
    one, apart, silent, together = (figures[f"{case}.step"] for case in CASES[:4])
    return {
        "exposed": together - silent,
        "one.compute": one - figures["one.input"],
        "silent.compute": silent - figures["silent.input"],
        "efficiency": one / together,
        "hardware": one / apart,
        "communication": apart / together,
    }


def summary(rounds: Sequence[Figures]) -> dict[str, Spread]:
    """Quartiles over `rounds` of everything measured, and of what each single round says."""
    whole = [{**figures, **derived(figures)} for figures in rounds]
    return {name: spread([figures[name] for figures in whole]) for name in whole[0]}


def ring_bytes(size: int, processes: int) -> float:
    """Bytes that each process sends, and receives, in a ring all-reduce of `size` bytes."""
    return 2 * (processes - 1) / processes * size


def ring_seconds(size: int, processes: int, network: Network) -> float:
    """The time of a ring all-reduce of `size` bytes (Patarasuk and Yuan 2009, as the module says)."""
    return ring_bytes(size, processes) / network.bandwidth + 2 * (processes - 1) * network.latency


def exposed_seconds(message: Message, ready: Sequence[float], processes: int, network: Network) -> float:
    """How much longer the all-reduces take than the backward pass beside which they run, one after the other.

    ready: (parameters,) seconds from the start of the backward pass to each gradient.
    """
    free = 0.0
    for bucket, size in zip(message.buckets, message.bucket_sizes, strict=True):
        free = max(free, *(ready[i] for i in bucket)) + ring_seconds(size, processes, network)
    return free - max(ready)


def projection(
    step_s: float, message: Message, ready: Sequence[float], processes: int, network: Network
) -> dict[str, float]:
    """A step of `processes` on a network, from the `step_s` of one, with and without overlap."""
    allreduce = sum(ring_seconds(size, processes, network) for size in message.bucket_sizes)
    exposed = exposed_seconds(message, ready, processes, network)
    return {
        "processes": processes,
        "allreduce_s": allreduce,
        "exposed_s": exposed,
        "efficiency_without_overlap": step_s / (step_s + allreduce),
        "efficiency": step_s / (step_s + exposed),
    }
