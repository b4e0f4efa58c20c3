"""Phase `commands`: what a user types, as processes of their own: launch, SIGTERM and resume, ranks, export, text."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from benchmarks.gpu.results import Results, Value
from benchmarks.gpu.setup import ROOT, Setup

Finished = tuple[int | str, str]

_TRAIN = [sys.executable, "train/main.py"]
_TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def call(
    setup: Setup, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None, limit_s: float = 150
) -> Finished:
    """Run one command; its exit code, or "timed out", and the end of what it printed, which WORK/NAME.log has too."""
    env = {**environment_of(setup), **(environment or {})}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=limit_s * setup.size(1, 5)
        )
        code: int | str = done.returncode
        text = done.stdout[-3000:] + done.stderr[-6000:]
    except subprocess.TimeoutExpired as error:
        code, text = "timed out", str(error.stderr)[-6000:]
    (setup.work / f"{name}.log").write_text(f"{' '.join(command)}\n{text}\nexit code {code}\n")
    return code, text


def environment_of(setup: Setup) -> dict[str, str]:
    """The environment of a command; without a GPU, processes are told to use the CPU."""
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    return {**os.environ, "PYTHONPATH": path} | ({} if setup.on_gpu else {"ACCELERATE_USE_CPU": "true"})


def options(setup: Setup, run_dir: str, steps: int, **more: object) -> list[str]:
    """Options of a short run on the text."""
    fields: dict[str, object] = {
        "data.cache_dir": setup.work / "data",
        "train.max_steps": steps,
        "train.epochs": 0,
        "eval.every": 0,
        "checkpoint.every": max(1, steps // 3),
        "log.every": max(1, steps // 30),
        "sample.length": 40,
    }
    if not setup.on_gpu:
        fields |= {"data.batch_size": 8, "data.seq_len": 16, "model.hidden_dim": 16, "model.embedding_dim": 8}
    fields |= {name.replace("__", "."): value for name, value in more.items()}
    assigned = [part for name, value in fields.items() for part in ("--set", f"{name}={value}")]
    return ["--data", setup.text, "--run-dir", str(setup.work / run_dir), *assigned]


def losses(folder: Path) -> dict[int, float]:
    """step -> train/loss of a run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def launch(setup: Setup) -> Value:
    """The documented command for one GPU: trains, evaluates, exports."""
    file = "launch/one-gpu.yaml" if setup.on_gpu else "launch/one-cpu.yaml"
    started = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", file]
    recipe = ["train/main.py", "--config", "configs/shakespeare.yaml"]
    code, text = call(setup, "launch", [*started, *recipe, *options(setup, "launch", setup.size(300, 12))])
    shown = [
        " ".join(line.split()) for line in text.splitlines() if line.startswith(("device", "pace", "done", "model"))
    ]
    ok = code == 0 and (setup.work / "launch" / "model.onnx").exists()
    return {"ok": ok, "exit code": code, "lines": shown, "tail": "" if ok else text[-900:]}


def sigterm(setup: Setup) -> Value:
    """SIGTERM in the middle of a run, then the same command: exit codes, and weights of an uninterrupted run."""
    steps = setup.size(300, 60)
    command = [*_TRAIN, "--config", "configs/shakespeare.yaml"]
    straight = [*command, *options(setup, "straight", steps)]
    broken = [*command, *options(setup, "broken", steps)]
    code = call(setup, "straight", straight)[0]
    stopped = _stopped_in_the_middle(setup, broken, setup.work / "broken")
    resumed = call(setup, "resumed", broken)[0]
    if (code, stopped, resumed) != (0, 75, 0):
        return {"ok": False, "exit codes": [code, stopped, resumed]}
    ends = [load_file(setup.work / name / f"step-{steps:08d}" / "model.safetensors") for name in ("straight", "broken")]
    largest = max(float(np.abs(ends[0][name] - ends[1][name]).max()) for name in ends[0])
    return {"ok": largest == 0.0, "exit codes": [code, stopped, resumed], "largest difference of a weight": largest}


def _stopped_in_the_middle(setup: Setup, command: Sequence[str], folder: Path, limit_s: float = 100) -> int:
    """The exit code of a run that gets SIGTERM once it has logged a few lines."""
    with (setup.work / "broken.log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment_of(setup), stdout=log, stderr=log)
        until = time.monotonic() + limit_s
        metrics = folder / "metrics.jsonl"
        while time.monotonic() < until and process.poll() is None:
            if metrics.exists() and metrics.read_text().count("\n") >= 3:
                process.send_signal(signal.SIGTERM)
                break
            time.sleep(0.02)
        try:
            return process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


def ranks(setup: Setup) -> Value:
    """Two ranks on the one GPU over gloo give one process's losses; one rank over NCCL works, eager and replayed."""
    steps = setup.size(60, 12)
    exact = {"train__mixed_precision": "no", "model__dropout": 0, "data__batch_size": 16, "log__every": 1}
    recipe = ["--config", "configs/shakespeare.yaml"]
    gloo = str(Path(__file__).with_name("two_ranks.py"))
    device = {"TWO_RANKS_DEVICE": "cuda:0"} if setup.on_gpu else {}
    jobs: dict[str, tuple[list[str], dict[str, str]]] = {
        "one": ([*_TRAIN, *recipe, *options(setup, "one", steps, **exact)], {}),
        "two": ([*_TORCHRUN, "2", gloo, *recipe, *options(setup, "two", steps, **exact)], device),
    }
    if setup.on_gpu:
        command = [*_TORCHRUN, "1", "train/main.py", *recipe]
        jobs["nccl"] = ([*command, *options(setup, "nccl", steps, **exact)], {})
        captured = options(setup, "nccl-graph", steps, **exact, train__cuda_graph="true")
        jobs["nccl-graph"] = ([*command, *captured], {})
    with ThreadPoolExecutor() as pool:
        done = dict(zip(jobs, pool.map(lambda n: call(setup, n, *jobs[n], limit_s=110), jobs), strict=True))
    codes = {name: code for name, (code, _) in done.items()}
    failed = {name: text[-700:] for name, (code, text) in done.items() if code != 0}
    if "one" in failed:
        return {"ok": False, "exit codes": codes, "tails": failed}
    base = losses(setup.work / "one")
    worst = {
        name: max(abs(base[step] - loss) for step, loss in losses(setup.work / name).items())
        for name in jobs
        if name != "one" and name not in failed
    }
    ok = not failed and max(worst.values()) < 2e-3
    return {"ok": ok, "exit codes": codes, "largest difference of a loss": worst, "tails": failed}


def afterwards(setup: Setup) -> Value:
    """On the launched run: int8 export, evaluation, score and text from the model file."""
    run = setup.work / "launch"
    model = str(run / "model.onnx")
    text = setup.work / "score.txt"
    text.write_text("the quick brown fox\n" * 20)
    infer = [sys.executable, "-m", "infer.cli"]
    data = [] if setup.on_gpu else ["--data", setup.text]
    jobs = {
        "int8": [sys.executable, "-m", "train.export", str(run), "--precision", "int8"],
        "evaluate": [sys.executable, "-m", "train.evaluate", str(run), *data, "--json"],
        "generate": [*infer, "generate", "-m", model, "-p", "the", "-n", "60"],
        "score": [*infer, "score", model, str(text)],
    }
    with ThreadPoolExecutor() as pool:
        done = dict(zip(jobs, pool.map(lambda n: call(setup, n, jobs[n], limit_s=90), jobs), strict=True))
    return {
        "ok": all(code == 0 for code, _ in done.values()),
        **{n: [code, " ".join(out.split())[-160:]] for n, (code, out) in done.items()},
    }


def run_commands(setup: Setup, results: Results) -> None:
    """All of them: on a GPU machine side by side, as nothing here is timed; else one after the other."""

    def launched() -> None:
        results.check("launch", partial(launch, setup))
        results.check("afterwards", partial(afterwards, setup))

    chains = [
        launched,
        lambda: results.check("sigterm", partial(sigterm, setup)),
        lambda: results.check("ranks", partial(ranks, setup)),
    ]
    with ThreadPoolExecutor(len(chains) if setup.on_gpu else 1) as pool:
        for chain in [pool.submit(chain) for chain in chains]:
            chain.result()
