"""Commands of a cluster that a test stands in for, and a training program that does what the test wants."""

import contextlib
import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import psutil

# srun as far as launch/slurm.sbatch uses it: a task a node, SIGUSR1 passed on, SIGTERM answered by SIGKILL.
_SRUN = """
import json, os, signal, subprocess, sys
from pathlib import Path
words = sys.argv[1:]
own = 0
while words[own].startswith("--"):
    own += 1
options = dict(word[2:].split("=", 1) for word in words[:own])
log = Path(os.environ["STUBS"])
record = {"options": options, "command": words[own:], "environment": dict(os.environ)}
(log / "srun.json").write_text(json.dumps(record))
tasks = []
signal.signal(signal.SIGUSR1, lambda *_: [task.send_signal(signal.SIGUSR1) for task in tasks])
signal.signal(signal.SIGTERM, lambda *_: [task.kill() for task in tasks])
for i in range(int(options["nodes"]) * int(options["ntasks-per-node"])):
    tasks.append(subprocess.Popen(words[own:], env={**os.environ, "SLURM_PROCID": str(i)}))
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
_SCONTROL = """
import os, sys
from pathlib import Path
if sys.argv[1:3] == ["show", "hostnames"]:
    assert sys.argv[3] == os.environ["SLURM_JOB_NODELIST"], sys.argv
    print(os.environ["STUB_HOSTS"].replace(",", "\\n"))
elif sys.argv[1] == "requeue":
    with Path(os.environ["STUBS"], "requeued").open("a") as file:
        print(*sys.argv[2:], file=file)
else:
    sys.exit(f"scontrol {sys.argv[1:]}")
"""
# torchrun as far as signals and exit codes go: it passes on what it was told to, else dies of it; any failure is a 1.
_TORCHRUN = """
import os, signal, subprocess, sys
words = sys.argv[1:]
script = words.index("train/main.py")
options = dict(word[2:].split("=", 1) for word in words[:script])
for name in options["signals-to-handle"].split(","):
    signal.signal(getattr(signal, name), lambda number, _: child.send_signal(number))
child = subprocess.Popen([sys.executable, *words[script:]])
code = child.wait()
sys.exit(int(os.environ.get("STUB_TORCHRUN_EXITS", "1")) if code else 0)
"""
# The training: STUB_TRAINING is its exit code, or "CODE after N": the one after so many SIGUSR1.
_TRAINING = """
import json, os, signal, sys
from pathlib import Path
log, rank, what = Path(os.environ["STUBS"]), os.environ["SLURM_PROCID"], os.environ["STUB_TRAINING"]
(log / f"arguments-{rank}.json").write_text(json.dumps(sys.argv[1:]))
code, _, signals = what.partition(" after ")
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
(log / f"signals-{rank}-0").touch()
for i in range(int(signals or 0)):
    if signal.sigtimedwait([signal.SIGUSR1], 60) is None:
        sys.exit("no signal came")
    (log / f"signals-{rank}-{i + 1}").touch()
sys.exit(int(code))
"""


def free_job_id() -> int:
    """A SLURM job's number, for which launch/slurm.sbatch comes to a port that nobody listens on now."""
    for number in range(os.getpid() % 5000, 10000):
        with socket.socket() as free:
            if free.connect_ex(("127.0.0.1", 20000 + number)):
                return number
    raise RuntimeError("ports 20000 to 29999 are all in use")


def clean_environment(**extra: str) -> dict[str, str]:
    """This process's, less what a launcher, SLURM or the reader's settings left in it."""
    left_over = ("ACCELERATE_", "PET_", "SLURM_", "TORCHELASTIC_", "MASTER_", "WANDB_", "LOCAL_", "WORLD_SIZE", "RANK")
    left_over += ("CUDA_VISIBLE_DEVICES", "PROCESSES", "RESTARTS")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(left_over)}
    # The commands of this Python's environment come first: torchrun, accelerate.
    kept["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    return {**kept, "OMP_NUM_THREADS": "1", **extra}


def put_command(folder: Path, name: str, python: str) -> None:
    """An executable of that name, whose code is `python`."""
    path = folder / name
    path.write_text(f"#!{sys.executable}\n{python}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


class Job(subprocess.Popen[bytes]):
    """A command that has been started. Its output goes to a file: nobody reads while it runs."""

    running: ClassVar[list["Job"]] = []

    def __init__(self, command: Sequence[str | Path], folder: Path, environment: dict[str, str]) -> None:
        """folder: where it runs. environment: all of it."""
        self.folder = folder
        descriptor, name = tempfile.mkstemp(suffix=".output", dir=folder)
        self._output = Path(name)
        with os.fdopen(descriptor, "wb") as file:
            super().__init__(
                list(map(str, command)), cwd=folder, env=environment,
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip
        Job.running.append(self)

    def ended(self, seconds: float = 100.0) -> tuple[int, str]:
        """Exit code and output, once it has ended."""
        code = self.wait(seconds)
        return code, self._output.read_text(errors="replace")

    @classmethod
    def end_all(cls) -> None:
        """Kills what still runs in the jobs' folders: what a launcher left behind too, which is no child of it."""
        folders = {str(job.folder) for job in cls.running}
        for process in psutil.process_iter(["cwd"]) if folders else ():
            if process.info["cwd"] in folders:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        while cls.running:
            cls.running.pop().wait()


@dataclass
class Cluster:
    """A SLURM of stubs. folder: where the job runs. log: what the stubs leave behind."""

    folder: Path
    log: Path
    environment: dict[str, str]

    @classmethod
    def of_stubs(cls, folder: Path, *, torchrun: bool, hosts: str = "node-a,node-b", **environment: str) -> "Cluster":
        """torchrun: whether that is a stub too, and train/main.py with it."""
        log, commands = folder / "log", folder / "commands"
        log.mkdir()
        commands.mkdir()
        put_command(commands, "srun", _SRUN)
        put_command(commands, "scontrol", _SCONTROL)
        if torchrun:
            put_command(commands, "torchrun", _TORCHRUN)
            (folder / "train").mkdir()
            (folder / "train" / "main.py").write_text(_TRAINING)
        job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_JOB_NUM_NODES": "2"}
        known = clean_environment(STUBS=str(log), STUB_HOSTS=hosts, **job, **environment)
        known["PATH"] = f"{commands}{os.pathsep}{known['PATH']}"
        return cls(folder, log, known)

    def submit(self, script: Path, *arguments: str, **environment: str) -> "Job":
        """The batch script, started as SLURM starts it on the first node."""
        return Job(["bash", script, *arguments], self.folder, {**self.environment, **environment})

    def srun(self) -> dict:
        """options, command and environment of the last srun."""
        return json.loads((self.log / "srun.json").read_text())

    def requeued(self) -> list[str]:
        """The arguments of every `scontrol requeue`."""
        path = self.log / "requeued"
        return path.read_text().splitlines() if path.exists() else []
