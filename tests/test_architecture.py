"""Which package imports which, and what importing each of them costs."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "accelerate", "wandb", "onnx", "safetensors", "pydantic", "yaml", "gradio", "onnxruntime"}


def test_the_import_contracts_of_pyproject_hold():
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports; raise SystemExit(lint_imports())"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def arrows():
    """(importer, imported) of docs/architecture.md's diagram."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    (diagram,) = re.findall(r"```mermaid\n(.*?)```", text, re.S)
    found = re.findall(r"^ +([\w.]+) --> ([\w.]+)$", diagram, re.M)
    assert len(found) == diagram.count("-->") > 20
    return found


def test_every_arrow_of_the_diagram_is_an_import(arrows):
    graph = grimp.build_graph("charrnn", "train", "infer", "benchmarks")
    absent = [(a, b) for a, b in arrows if not graph.find_shortest_chains(a, b, as_packages=True)]
    assert absent == []


def test_the_diagram_and_the_contracts_agree(arrows):
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layered = [c["layers"] for c in contracts if c["type"] == "layers"]
    level = {
        name.strip(): (i, n)
        for i, layers in enumerate(layered)
        for n, names in enumerate(layers)
        for name in names.split("|")
    }
    packages = {name for name in level if (ROOT / name.replace(".", "/")).is_dir()}
    drawn = {name for arrow in arrows for name in arrow}
    assert packages <= drawn
    for upper, lower in arrows:
        if upper in level and lower in level and level[upper][0] == level[lower][0]:
            assert level[upper][1] < level[lower][1], (upper, lower)


def loaded_by(statement):
    code = f"import sys; {statement}; print(*{{m.split('.')[0] for m in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("statement", ["import charrnn", "import infer", "import infer.cli"])
def test_a_light_import_loads_nothing_heavy(statement):
    assert not loaded_by(statement) & (HEAVY | {"numpy", "logging", "asyncio"})


def test_the_options_of_training_are_judged_before_torch_is_loaded():
    assert "torch" not in loaded_by("import train.main")


def test_no_file_of_train_bears_a_librarys_name():
    """`accelerate launch train/main.py` puts train/ first on sys.path."""
    taken = sys.stdlib_module_names | HEAVY | {"numpy", "rich", "typer", "tensorboard"}
    assert not {p.stem for p in (ROOT / "train").iterdir()} & taken
