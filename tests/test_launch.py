"""The files of launch/: each is started as its first lines say, and what arrives at the training is looked at."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml
from accelerate.commands.config import load_config_from_file
from launch_commands import GUIDE, ROOT, accepted, commands_of, header, training_options
from launch_stubs import Cluster, Job, clean_environment, free_job_id, put_command
from launches import free_port, logged, prepare_small_run
from torch.distributed.run import get_args_parser

from charrnn import errors
from charrnn.config import load_config
from train.checkpoint.format import load_newest

LAUNCH = ROOT / "launch"
FILES = sorted(path for path in LAUNCH.iterdir() if path.is_file())  # serve/ has tests of its own
ACCELERATE_FILES = ("many-gpus.yaml", "one-cpu.yaml", "one-gpu.yaml", "several-machines.yaml")
SBATCH = LAUNCH / "slurm.sbatch"
KUBERNETES = list(yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text()))
SKYPILOT = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())

# Writes down the environment that a launcher gave it. No torch: a hundred of them start in a second.
PROBE = """
import json, os
from pathlib import Path
Path(os.environ["PROBE_FOLDER"], os.environ.get("RANK", "alone")).write_text(json.dumps(dict(os.environ)))
"""


def wait_until(what, seconds=100.0):
    """Returns `what()` as soon as it is true."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found


@pytest.fixture(autouse=True)
def _nothing_goes_on_after_a_test():
    yield
    Job.end_all()


# --- every file and command


def test_every_launch_file_has_a_complete_header_and_a_command_in_the_guide():
    assert {p.name for p in FILES} == {
        *ACCELERATE_FILES, "several-cpus.sh", "slurm.sbatch", "kubernetes.yaml", "Dockerfile", "skypilot.yaml",
    }  # fmt: skip
    guide = commands_of(GUIDE)
    assert len(guide) > 12
    for path in FILES:
        text, name = header(path), f"launch/{path.name}"
        assert re.match(r" \w", text), path
        assert any(name in command for command in commands_of(path)), path
        assert re.search(r"\b(Edit\b|Nothing to edit)", text), path
        assert path.name == "Dockerfile" or any(name in command for command in guide), path


@pytest.mark.parametrize("command", [command for path in [*FILES, GUIDE] for command in commands_of(path)])
def test_every_documented_command_is_valid(command, monkeypatch):
    options = training_options(command)
    if options is not None:
        accepted(options, monkeypatch)


def table(first_header):
    """The cells of the guide's table that begins so."""
    found = re.search(rf"^\| {first_header} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", GUIDE.read_text(), re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|\n").split("|")] for line in found[1].splitlines()]


def test_the_exit_codes_are_those_of_the_code():
    values = {str(value) for name, value in vars(errors).items() if name.startswith("EXIT_")}
    assert {row[0] for row in table("code")} == values
    assert {row[2] for row in table("what happened")} - {""} <= values


def test_every_documented_message_is_in_the_sources():
    sources = [*(ROOT / "train").rglob("*.py"), *(ROOT / "charrnn").rglob("*.py")]
    text = re.sub(r'"\s*\n\s*f?"', "", "\n".join(path.read_text() for path in sources))
    # What other programs print, and what holds a name that the code fills in.
    others = ("Tried to launch", "EADDRINUSE", "Rendezvous", "Dist", "c10d", "stopped by SIG")
    fragments = [f for row in table("what happened") for f in re.findall(r"`(?:\w+: ?)?([^`]+)`", row[1])]
    assert len(fragments) > 12
    assert [f for f in fragments if f not in text and not f.startswith(others)] == []


# --- Accelerate's files


def values(environment, *names):
    return tuple(environment.get(name) for name in names)


ALONE = {"WORLD_SIZE": None, "RANK": None, "MASTER_ADDR": None}
CPU = {"ACCELERATE_USE_CPU": "True", "ACCELERATE_MIXED_PRECISION": "no", "CUDA_VISIBLE_DEVICES": None}
GPU = {"ACCELERATE_USE_CPU": "False", "ACCELERATE_MIXED_PRECISION": "bf16", "CUDA_VISIBLE_DEVICES": "0"}
GPUS = {"ACCELERATE_MIXED_PRECISION": "bf16", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "127.0.0.1"}
ONE_MACHINE = {"WORLD_SIZE": "8", "ACCELERATE_USE_CPU": None, "CUDA_VISIBLE_DEVICES": None}
TWO_MACHINES = {"WORLD_SIZE": "16", "GROUP_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("name", "machines", "processes", "expected"),
    [
        ("one-cpu.yaml", 1, 1, ALONE | CPU),
        ("one-gpu.yaml", 1, 1, ALONE | GPU),
        ("many-gpus.yaml", 1, 8, GPUS | ONE_MACHINE),
        ("several-machines.yaml", 2, 16, GPUS | TWO_MACHINES),
    ],
)
def test_accelerates_files_start_these_processes(tmp_path, name, machines, processes, expected):
    (tmp_path / "probe.py").write_text(PROBE)
    (tmp_path / "seen").mkdir()
    port = str(free_port())
    launchers = []
    for machine in range(machines):
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", LAUNCH / name]
        command += ["--main_process_port", port] if processes > 1 else []
        command += ["--machine_rank", str(machine), "--main_process_ip", "127.0.0.1"] if machines > 1 else []
        environment = clean_environment(HOME=str(tmp_path), PROBE_FOLDER=str(tmp_path / "seen"))
        launchers.append(Job([*command, "probe.py"], tmp_path, environment))
    for launcher in launchers:
        code, output = launcher.ended()
        assert code == 0, output
    seen = {path.name: json.loads(path.read_text()) for path in (tmp_path / "seen").iterdir()}
    assert sorted(seen) == (sorted(map(str, range(processes))) if processes > 1 else ["alone"])
    for rank, environment in seen.items():
        assert {field: environment.get(field) for field in expected} == expected
        if processes > 1:
            machine, local = divmod(int(rank), 8)
            assert values(environment, "GROUP_RANK", "LOCAL_RANK") == (str(machine), str(local))
            assert environment["MASTER_PORT"] == port


@pytest.mark.parametrize("name", ACCELERATE_FILES)
def test_accelerate_reads_every_field_of_its_files(name):
    fields = yaml.safe_load((LAUNCH / name).read_text())
    read = load_config_from_file(str(LAUNCH / name))
    for field, value in fields.items():
        assert getattr(read, field) == value, field


# --- SLURM


def test_the_batch_job_is_warned_in_time_and_requeueable():
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", SBATCH.read_text(), re.MULTILINE))
    assert values(options, "requeue", "open-mode", "ntasks-per-node") == ("", "append", "1")
    warned_s = int(re.fullmatch(r"B:USR1@(\d+)", options["signal"])[1])
    granted_s = int(re.search(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)", SBATCH.read_text())[1])
    assert 30 < granted_s < warned_s
    assert SBATCH.read_text().index("#SBATCH") < SBATCH.read_text().index("\nset ")


def test_a_batch_job_runs_one_torchrun_per_node(tmp_path):
    cluster = Cluster.of_stubs(
        tmp_path, torchrun=True, STUB_TRAINING="0", SLURM_GPUS_ON_NODE="4", SLURM_CPUS_PER_TASK="16"
    )
    options = ["--config", "configs/shakespeare.yaml", "--data", "a file with spaces.txt"]
    code, output = cluster.submit(SBATCH, *options).ended()
    assert code == 0, output
    srun = cluster.srun()
    assert values(srun["options"], "nodes", "ntasks-per-node", "cpus-per-task") == ("2", "1", "16")
    assert srun["options"]["kill-on-bad-exit"] == "1"
    assert srun["environment"]["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert srun["environment"]["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"

    name, *words = srun["command"]
    torchrun = get_args_parser().parse_args(words)
    assert (name, torchrun.nnodes, torchrun.nproc_per_node) == ("torchrun", "2", "4")
    assert (torchrun.rdzv_backend, torchrun.rdzv_endpoint, torchrun.rdzv_id) == ("c10d", "node-a:24711", "4711")
    assert torchrun.max_restarts == 3
    assert torchrun.training_script_args == options
    assert [json.loads((cluster.log / f"arguments-{task}.json").read_text()) for task in (0, 1)] == [options] * 2
    assert cluster.requeued() == []


def test_a_batch_job_without_gpus_is_one_process_per_node(tmp_path):
    cluster = Cluster.of_stubs(tmp_path, torchrun=True, STUB_TRAINING="0")
    assert cluster.submit(SBATCH).ended()[0] == 0
    assert "cpus-per-task" not in cluster.srun()["options"]
    assert get_args_parser().parse_args(cluster.srun()["command"][1:]).nproc_per_node == "1"


@pytest.mark.parametrize(
    ("sent", "training", "code", "requeued"),
    [
        ([], "2", 1, []),
        ([], "2", 2, []),
        ([], "2", 137, []),
        (["SIGUSR1"], "75 after 1", 1, ["4711"]),
        (["SIGUSR1"], "0 after 1", 0, []),  # done before the time was up
        (["SIGTERM"], "75 after 1", 1, []),  # scancel; or SLURM requeues by itself
        (["SIGUSR1", "SIGTERM"], "75 after 2", 1, ["4711"]),
        (["SIGUSR1", "SIGUSR1"], "75 after 2", 1, ["4711"]),
    ],
)
def test_a_batch_job_passes_signals_on_and_requeues_after_a_warning(tmp_path, sent, training, code, requeued):
    cluster = Cluster.of_stubs(tmp_path, torchrun=True, STUB_TRAINING=training, STUB_TORCHRUN_EXITS=str(code))
    job = cluster.submit(SBATCH)

    def wait_for_signals(count):
        for task in (0, 1):
            wait_until((cluster.log / f"signals-{task}-{count}").exists)

    for count, name in enumerate(sent):
        wait_for_signals(count)
        job.send_signal(signal.Signals[name])
    ended, output = job.ended()
    assert ended == code, output
    wait_for_signals(len(sent))
    assert cluster.requeued() == requeued


# --- Kubernetes and SkyPilot, by what they must hold; test_launch_schemas.py holds them against the published schemas


WORKER = KUBERNETES[1]["spec"]["pytorchReplicaSpecs"]["Worker"]
(CONTAINER,) = WORKER["template"]["spec"]["containers"]


def test_the_pods_fit_rendezvous_batch_and_claim_and_restart(monkeypatch):
    claim, job = KUBERNETES
    assert [tree["kind"] for tree in KUBERNETES] == ["PersistentVolumeClaim", "PyTorchJob"]
    elastic = job["spec"]["elasticPolicy"]
    assert elastic["rdzvBackend"] == "c10d"
    assert elastic["minReplicas"] == elastic["maxReplicas"] == WORKER["replicas"]
    torchrun = get_args_parser().parse_args(CONTAINER["args"])
    config = accepted(torchrun.training_script_args, monkeypatch)
    assert config.data.batch_size % (WORKER["replicas"] * int(torchrun.nproc_per_node)) == 0
    assert CONTAINER["resources"]["limits"]["nvidia.com/gpu"] == torchrun.nproc_per_node
    assert CONTAINER["name"] == "pytorch"  # the operator looks for this one
    assert CONTAINER["ports"] == [{"name": "pytorchjob-port", "containerPort": 23456}]

    # A failed pod restarts, with time for a checkpoint.
    spec = WORKER["template"]["spec"]
    assert CONTAINER["command"] == ["torchrun"]  # and no shell between, which would keep SIGTERM to itself
    assert WORKER["restartPolicy"] == "OnFailure"
    assert job["spec"]["runPolicy"]["backoffLimit"] > 0
    environment = {entry["name"]: entry["value"] for entry in CONTAINER["env"]}
    assert 30 < int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < spec["terminationGracePeriodSeconds"]
    assert environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"

    # The run folder is on the claim.
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    assert volumes.keys() == mounts.keys()
    assert volumes["checkpoints"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert config.train.run_dir.startswith(f"{mounts['checkpoints']}/")


def test_the_image_holds_what_the_pods_start():
    text = (LAUNCH / "Dockerfile").read_text()
    copied = [word for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE) for word in line.split()]
    assert all((ROOT / name).exists() for name in copied)
    project = yaml.safe_load(re.search(r"^packages = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.M)[1])
    assert {*project, "configs", "pyproject.toml", "checkpoints/shakespeare.onnx"} <= set(copied)
    assert f"docker push {CONTAINER['image']}" in text
    assert "pip install --no-cache-dir -e '.[train]'" in text


def test_skypilot_uses_all_gpus_and_the_bucket(tmp_path, monkeypatch):
    assert SKYPILOT["resources"]["use_spot"] is True
    assert SKYPILOT["resources"]["job_recovery"]["max_restarts_on_errors"] > 0
    (mounted, bucket), = SKYPILOT["file_mounts"].items()  # fmt: skip
    assert bucket["mode"] == "MOUNT_CACHED"
    commands = tmp_path / "charrnn" / "bin"
    commands.mkdir(parents=True)
    (commands / "activate").write_text(f"PATH={shlex.quote(str(commands))}:$PATH\n")
    put_command(commands, "torchrun", "import json, sys; print(json.dumps(sys.argv[1:]))")
    gpus = SKYPILOT["resources"]["accelerators"].split(":")[1]
    given = {"NUM_NODES": "2", "NODE_RANK": "1", "NUM_GPUS_PER_NODE": gpus, "NODE_IPS": "10.1.0.7\n10.1.0.9"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", SKYPILOT["run"]], capture_output=True, text=True, timeout=60,
        env={
            **clean_environment(HOME=str(tmp_path)), **SKYPILOT["envs"],
            **{f"SKYPILOT_{name}": value for name, value in given.items()},
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    torchrun = get_args_parser().parse_args(json.loads(done.stdout))
    assert (torchrun.nnodes, torchrun.node_rank, torchrun.nproc_per_node) == ("2", 1, gpus)
    assert (torchrun.master_addr, torchrun.master_port) == ("10.1.0.7", 29500)
    config = accepted(torchrun.training_script_args, monkeypatch)
    assert config.train.run_dir.startswith(f"{mounted}/")
    assert config.data.batch_size % int(gpus) == 0
    assert config == load_config(
        ROOT / SKYPILOT["envs"]["CONFIG"], {"train.run_dir": f"{mounted}/{SKYPILOT['envs']['RUN']}"}
    )


# --- the launchers themselves, with the real training


@pytest.fixture
def folder(tmp_path):
    prepare_small_run(tmp_path)
    (tmp_path / "train").symlink_to(ROOT / "train")
    (tmp_path / "launch").symlink_to(LAUNCH)
    return tmp_path


SHORT = ("--config", "small.yaml", "--data", "words.txt")
# Long enough to be hit while it trains; evaluation would only slow it down.
ENDLESS = (*SHORT, "--max-steps", "1000000", "--set", "eval.every=0", "--set", "checkpoint.every=20")


def started(folder, *command, **environment):
    return Job(command, folder, clean_environment(PYTHONPATH=str(ROOT), **environment))


def torchrun(folder, *arguments):
    return started(folder, "torchrun", *arguments, ACCELERATE_USE_CPU="true")


def step_of(run_dir):
    """The newest whole checkpoint's."""
    checkpoint = load_newest(run_dir)
    return checkpoint.step if checkpoint else 0


def training_processes(folder):
    """rank -> process id of those that train in `folder`."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            # The launcher has the same words, and no rank.
            if process.cwd() == str(folder) and "train/main.py" in process.cmdline() and "RANK" in process.environ():
                found[int(process.environ()["RANK"])] = process.pid
    return found


@pytest.mark.slow
@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_two_machines_train_as_one_with_as_many_processes(folder, rendezvous):
    alone = ("--standalone", "--nproc-per-node=2", "train/main.py", *SHORT, "--run-dir", "one")
    code, output = torchrun(folder, *alone).ended()
    assert code == 0, output
    port = free_port()

    def machine(rank):
        if rendezvous == "static":
            meeting = [f"--node-rank={rank}", "--master-addr=127.0.0.1", f"--master-port={port}"]
        else:
            meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=test"]
        training = ("train/main.py", *SHORT, "--run-dir", "two", "--set", "train.processes=2")
        return torchrun(folder, "--nnodes=2", "--nproc-per-node=1", *meeting, *training)

    machines = [machine(rank) for rank in (0, 1)]
    ends = [m.ended() for m in machines]
    assert [code for code, _ in ends] == [0, 0], ends
    assert sum("2 process(es)" in output for _, output in ends) == 1
    curve = logged(folder / "one")
    assert len(curve) == 12
    assert logged(folder / "two") == pytest.approx(curve, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_killed_cpu_processes_are_restarted_and_resume(folder, victim):
    job = started(folder, "launch/several-cpus.sh", *ENDLESS, "--max-steps", "120", "--run-dir", "run", RESTARTS="1")
    before = wait_until(lambda: len(p := training_processes(folder)) == 2 and step_of(folder / "run") and p)
    os.kill(before[victim], signal.SIGKILL)
    code, output = job.ended()
    assert code == 0, output
    assert "2 process(es)" in output
    assert victim == 0 or "rank 1 (on " in output
    assert re.search(r"resumed at step \d+0\b", output)
    assert step_of(folder / "run") == 120


@pytest.mark.slow
def test_sigterm_to_the_cpu_script_writes_a_checkpoint(folder):
    job = started(folder, "launch/several-cpus.sh", *ENDLESS, "--run-dir", "run")
    wait_until(lambda: len(training_processes(folder)) == 2 and step_of(folder / "run"))
    job.terminate()
    code, output = job.ended()
    assert code == 1, output
    stopped = int(re.search(r"stopped by SIGTERM after step ([\d,]+)", output)[1].replace(",", ""))
    assert step_of(folder / "run") == stopped
    assert training_processes(folder) == {}


@pytest.mark.slow
def test_a_preempted_batch_job_resumes(folder):
    cluster = Cluster.of_stubs(folder, torchrun=False, hosts="localhost,elsewhere", PYTHONPATH=str(ROOT))
    job_id = str(free_job_id())
    known = {"ACCELERATE_USE_CPU": "true", "SLURM_JOB_ID": job_id}
    job = cluster.submit(SBATCH, *ENDLESS, "--run-dir", "run", **known)
    wait_until(lambda: len(training_processes(folder)) == 2 and step_of(folder / "run"))
    job.send_signal(signal.SIGUSR1)
    code, output = job.ended()
    assert code == 1, output
    assert "stopped by SIGUSR1 after step" in output
    assert cluster.requeued() == [job_id]
    stopped = step_of(folder / "run")

    again = cluster.submit(SBATCH, *ENDLESS, "--run-dir", "run", "--max-steps", str(stopped + 3), **known)
    code, output = again.ended()
    assert code == 0, output
    assert f"resumed at step {stopped:,}" in output
    assert "2 process(es)" in output
    assert step_of(folder / "run") == stopped + 3
    assert cluster.requeued() == [job_id]


def pod(folder, port, *training):
    """A pod of launch/kubernetes.yaml: its command, with what the training operator makes of the elastic policy."""
    elastic = KUBERNETES[1]["spec"]["elasticPolicy"]
    given = {
        "PET_RDZV_BACKEND": elastic["rdzvBackend"],
        "PET_RDZV_ENDPOINT": f"localhost:{port}",
        "PET_RDZV_CONF": ",".join(f"{entry['key']}={entry['value']}" for entry in elastic["rdzvConf"]),
        "PET_NNODES": f"{elastic['minReplicas']}:{elastic['maxReplicas']}",
        "PET_MAX_RESTARTS": str(elastic["maxRestarts"]),
    }
    given |= {entry["name"]: entry["value"] for entry in CONTAINER["env"]}
    arguments = CONTAINER["args"]
    command = [*CONTAINER["command"], *arguments[: arguments.index("train/main.py") + 1], *training]
    return started(folder, *command, ACCELERATE_USE_CPU="true", **given)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_reclaimed_pod_resumes_the_job(folder, victim):
    training = (*ENDLESS, "--max-steps", "600", "--run-dir", "run", "--set", "train.mixed_precision=no")
    port = free_port()
    pods = [pod(folder, port, *training) for _ in (0, 1)]
    wait_until(lambda: len(training_processes(folder)) == 2 and step_of(folder / "run"))
    pods[victim].terminate()
    code, output = pods[victim].ended()
    assert code == 1, output
    stopped = step_of(folder / "run")
    assert 0 < stopped < 600

    outputs = [output]
    pods[victim] = pod(folder, port, *training)
    end = time.monotonic() + 150
    while any(p.poll() != 0 for p in pods):
        assert time.monotonic() < end, outputs
        for i, p in enumerate(pods):
            if p.poll():  # as restartPolicy OnFailure does
                outputs.append(p.ended()[1])
                pods[i] = pod(folder, port, *training)
        time.sleep(0.1)
    outputs += [p.ended()[1] for p in pods]
    assert any(f"resumed at step {stopped:,}" in output for output in outputs), outputs
    assert step_of(folder / "run") == 600
