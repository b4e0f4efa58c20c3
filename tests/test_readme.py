"""Every command of the README and the guides works: it is run here, or its options are checked by what would run it."""

import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launch_commands import accepted, training_options
from training import make_trainer, tiny_config

from charrnn.sampling import SamplingOptions
from infer import Engine

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDES = [ROOT / "docs" / f"{name}.md" for name in ("getting-started", "training", "inference")]
BLOCKS = [
    block
    for text in (TEXT, *(guide.read_text(encoding="utf-8") for guide in GUIDES))
    for block in re.findall(r"^```(\w+)\n(.*?)^```", text, re.M | re.S)
]
LINES = list(
    dict.fromkeys(line for language, body in BLOCKS if language == "bash" for line in body.splitlines() if line.strip())
)
SHIPPED = ROOT / "checkpoints" / "shakespeare.onnx"
TRAIN = "pip install -e '.[train]' && accelerate launch train/main.py"
PROGRAMS = ("python -m train.export", "python -m train.evaluate", "python -m charrnn.data")
TEST = "pip install -e '.[dev]' && pytest"


def lines_with(part):
    found = [line for line in LINES if part in line]
    assert found, f"the README has no command with {part}"
    return found


def test_the_two_commands_are_there_as_promised():
    assert TRAIN in LINES
    assert TEST in LINES


def test_every_command_is_of_a_kind_that_is_tested_here():
    kinds = ("pip install", "accelerate launch", "torchrun", "infer ", "curl", *PROGRAMS)
    assert [line for line in LINES if not any(kind in line for kind in kinds)] == []


def test_the_request_to_the_server_is_one_that_its_guide_tests():
    assert set(lines_with("curl")) <= set((ROOT / "docs" / "serving.md").read_text(encoding="utf-8").splitlines())


def test_ci_runs_the_two_commands_and_the_bare_install():
    script = (ROOT / ".ci" / "run").read_text()
    for part in (
        "pip install --quiet -e '.[dev]'",
        "pytest\n",
        "accelerate launch train/main.py",
        "pip install --quiet .",
    ):
        assert part in script


@pytest.mark.parametrize("line", [*lines_with("accelerate launch"), *lines_with("torchrun")])
def test_training_commands_have_options_that_are_accepted(line, monkeypatch):
    accepted(training_options(re.split(r" && | \| ", line)[-1]), monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder as the README's reader has it: a run on Shakespeare, the shipped model, and a novel."""
    folder = tmp_path_factory.mktemp("reader")
    trainer = make_trainer(tiny_config(folder, ["train.max_steps=2"]))
    trainer.fit()
    run = folder / "checkpoints" / "shakespeare"
    run.parent.mkdir()
    trainer.checkpoints.run_dir.rename(run)
    shutil.copy(SHIPPED, run / "model.onnx")
    for name in ("novel", "seed-1", "seed-2"):
        shutil.copytree(run, run.parent / name)
    shutil.copy(SHIPPED, folder / "checkpoints" / "shakespeare.onnx")
    (folder / "novel.txt").write_text("It was a dark night, and the owls were out.\n" * 50)
    return folder


# Those that serve until they are stopped are tested with their own options elsewhere.
ENDING = [line for line in lines_with("infer ") if not re.search(r"infer (ui|serve)", line)]


@pytest.mark.parametrize("line", [*ENDING, *itertools.chain(*map(lines_with, PROGRAMS))])
def test_commands_that_generate_score_and_export_run(line, folder):
    line = "infer bench --rounds 2" if line == "infer bench" else line  # more rounds repeat the same
    with_python = line.replace("python -m", f"{shlex.quote(sys.executable)} -m")
    with_python = re.sub(r"(^|\| )infer ", rf"\1{shlex.quote(sys.executable)} -m infer.cli ", with_python)
    done = subprocess.run(
        with_python, shell=True, cwd=folder, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_python_snippet_runs(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    (snippet,) = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)
    exec(compile(snippet, "README.md", "exec"), {})
    assert len(capsys.readouterr().out) == 500


def test_the_sample_at_the_top_is_what_its_command_prints():
    (command, printed) = re.search(r"^```text\n\$ (infer generate .*?)\n(.*?)^```", TEXT, re.M | re.S).groups()
    words = shlex.split(command)[2:]
    options = dict(zip(words[::2], words[1::2], strict=True))
    lead = options["-p"]
    engine = Engine()
    text = lead + "".join(
        engine.generate(
            lead, int(options["-n"]), SamplingOptions(float(options.get("--temp", 0.8))), seed=int(options["--seed"])
        )
    )
    # Another processor's last digits may turn one draw in a very long text; not so soon.
    assert text[:100] == printed[:100]
    assert len(text) == len(printed.removesuffix("\n"))
