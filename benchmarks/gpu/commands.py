"""Phase `commands`: what a user types, as processes of their own: launch, SIGTERM and resume, ranks, export, text."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from benchmarks.common import ROOT
from benchmarks.gpu.results import Results, Value
from benchmarks.gpu.setup import TINY, Setup, by_field
from benchmarks.training import assigned, read_metrics

Finished = tuple[int | str, str]

_TRAIN = [sys.executable, "train/main.py"]
_TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def call(
    setup: Setup,
    name: str,
    command: Sequence[str],
    limit_s: float = 150,
    stop_when: Callable[[], bool] = lambda: False,
) -> Finished:
    """Run one command, which gets SIGTERM once `stop_when` holds.

    Returns:
        Its exit code, or "timed out", and the end of what it printed, all of which WORK/NAME.log has.
    """
    log, stopped, until = setup.work / f"{name}.log", False, time.monotonic() + limit_s * setup.size(1, 5)
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)
    while process.poll() is None and time.monotonic() < until:
        if not stopped and stop_when():
            process.terminate()
            stopped = True
        time.sleep(0.02)
    ended = process.poll() is not None
    if not ended:
        process.kill()
    return process.wait() if ended else "timed out", log.read_text()[-9000:]


def call_all(setup: Setup, jobs: Mapping[str, Sequence[str]], limit_s: float) -> dict[str, Finished]:
    """Run them side by side."""
    with ThreadPoolExecutor() as pool:
        done = pool.map(lambda name: call(setup, name, jobs[name], limit_s), jobs)
        return dict(zip(jobs, done, strict=True))


def options(setup: Setup, run_dir: str, steps: int, **more: object) -> list[str]:
    """Options of a short run of the shipped recipe on the text."""
    fields: dict[str, Any] = {"data.cache_dir": setup.work / "data", "train.max_steps": steps, "train.epochs": 0}
    fields |= {"eval.every": 0, "checkpoint.every": max(1, steps // 3), "log.every": max(1, steps // 30)}
    fields |= {"sample.length": 40} | ({} if setup.on_gpu else TINY) | by_field(more)
    recipe = ["--config", "configs/shakespeare.yaml", "--data", setup.text]
    return [*recipe, "--run-dir", str(setup.work / run_dir), *assigned(fields)]


def losses(folder: Path) -> dict[int, float]:
    """step -> train/loss of a run."""
    return {record["step"]: record["train/loss"] for record in read_metrics(folder) if "train/loss" in record}


def launch(setup: Setup) -> Value:
    """The documented command for one GPU: trains, evaluates, exports."""
    file = "launch/one-gpu.yaml" if setup.on_gpu else "launch/one-cpu.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", file, "train/main.py"]
    code, text = call(setup, "launch", [*command, *options(setup, "launch", setup.size(300, 12))])
    shown = [
        " ".join(line.split()) for line in text.splitlines() if line.startswith(("device", "pace", "done", "model"))
    ]
    ok = code == 0 and (setup.work / "launch" / "model.onnx").exists()
    return {"ok": ok, "exit code": code, "lines": shown, "tail": "" if ok else text[-900:]}


def sigterm(setup: Setup) -> Value:
    """SIGTERM in the middle of a run, then the same command: exit codes, and weights of an uninterrupted run."""
    steps = setup.size(300, 60)
    straight, broken = ([*_TRAIN, *options(setup, name, steps)] for name in ("straight", "broken"))
    metrics = setup.work / "broken" / "metrics.jsonl"

    def in_the_middle() -> bool:
        return metrics.exists() and metrics.read_text().count("\n") >= 3

    codes = [call(setup, "straight", straight)[0], call(setup, "broken", broken, stop_when=in_the_middle)[0]]
    codes.append(call(setup, "resumed", broken)[0])
    if codes != [0, 75, 0]:
        return {"ok": False, "exit codes": codes}
    ends = [load_file(setup.work / name / f"step-{steps:08d}" / "model.safetensors") for name in ("straight", "broken")]
    largest = max(float((ends[0][name] - ends[1][name]).abs().max()) for name in ends[0])
    return {"ok": largest == 0.0, "exit codes": codes, "largest difference of a weight": largest}


def ranks(setup: Setup) -> Value:
    """Two ranks on the one GPU over gloo give one process's losses; one rank over NCCL works, eager and replayed."""
    exact = {"train__mixed_precision": "no", "model__dropout": 0, "data__batch_size": 16, "log__every": 1}
    device = "cuda:0" if setup.on_gpu else "cpu"
    jobs = {"one": _TRAIN, "two": [*_TORCHRUN, "2", "benchmarks/gpu/two_ranks.py", device]}
    if setup.on_gpu:
        jobs["nccl"] = [*_TORCHRUN, "1", "train/main.py"]
        # What torch asks for where collectives are captured.
        jobs["nccl-graph"] = ["env", "TORCH_NCCL_ASYNC_ERROR_HANDLING=0", *jobs["nccl"]]
    commands = {name: [*job, *options(setup, name, setup.size(60, 12), **exact)] for name, job in jobs.items()}
    if setup.on_gpu:
        commands["nccl-graph"] += ["--set", "train.cuda_graph=true"]
    done = call_all(setup, commands, 110)
    codes = {name: code for name, (code, _) in done.items()}
    failed = {name: text[-700:] for name, (code, text) in done.items() if code != 0}
    if "one" in failed:
        return {"ok": False, "exit codes": codes, "tails": failed}
    base, *others = ((name, losses(setup.work / name)) for name in jobs if name not in failed)
    worst = {name: max(abs(base[1][step] - loss) for step, loss in other.items()) for name, other in others}
    ok = not failed and max(worst.values()) < 2e-3
    return {"ok": ok, "exit codes": codes, "largest difference of a loss": worst, "tails": failed}


def afterwards(setup: Setup) -> Value:
    """On the launched run: int8 export, evaluation, score and text from the model file."""
    run = str(setup.work / "launch")
    text = setup.work / "score.txt"
    text.write_text("the quick brown fox\n" * 20)
    infer = [sys.executable, "-m", "infer.cli"]
    data = [] if setup.on_gpu else ["--data", setup.text]
    jobs = {
        "int8": [sys.executable, "-m", "train.export", run, "--precision", "int8"],
        "evaluate": [sys.executable, "-m", "train.evaluate", run, *data, "--json"],
        "generate": [*infer, "generate", "-m", f"{run}/model.onnx", "-p", "the", "-n", "60"],
        "score": [*infer, "score", f"{run}/model.onnx", str(text)],
    }
    done = call_all(setup, jobs, 90)
    shown = {name: [code, " ".join(out.split())[-160:]] for name, (code, out) in done.items()}
    return {"ok": all(code == 0 for code, _ in done.values()), **shown}


def run(setup: Setup, results: Results) -> None:
    """All of them: on a GPU machine side by side, as nothing here is timed; else one after the other."""

    os.environ["PYTHONPATH"] = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)

    def in_order(*checks: Any) -> None:
        for check in checks:
            results.check(check.__name__, partial(check, setup))

    with ThreadPoolExecutor(3 if setup.on_gpu else 1) as pool:
        for chain in [pool.submit(in_order, *checks) for checks in ((launch, afterwards), (sigterm,), (ranks,))]:
            chain.result()
