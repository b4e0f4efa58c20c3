"""The arithmetic of benchmarks.scaling: what its measurements imply, and a projection to a network."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from benchmarks.common import Quartiles, quartiles

CASES = ("one", "apart", "silent", "together", "allreduce")

Metrics = dict[str, float]


@dataclass(frozen=True)
class Network:
    """bandwidth: bytes a second of a process's link, each way. latency: seconds a message takes whatever its size."""

    bandwidth: float
    latency: float


def case_metrics(case: str, turns: Sequence[Sequence[Metrics]]) -> Metrics:
    """Averages a case's measurements over processes and steps."""
    return {f"{case}.{name}": fmean(step[name] for turn in turns for step in turn) for name in turns[0][0]}


def derived(metrics: Metrics) -> Metrics:
    """Computes from a round's step times the exposed communication, in seconds, and three ratios."""
    one, apart, silent, together = (metrics[f"{case}.step"] for case in CASES[:4])
    return {
        "exposed": together - silent,
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


def projection(step_s: float, buckets: Sequence[int], processes: int, network: Network) -> Metrics:
    """Projects a step of `processes` on a network from the `step_s` of one. buckets: bytes of each."""
    allreduce = sum(ring_seconds(size, processes, network) for size in buckets)
    return {"processes": processes, "allreduce_s": allreduce, "efficiency": step_s / (step_s + allreduce)}
