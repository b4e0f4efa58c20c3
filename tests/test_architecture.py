"""Which package imports which, and what importing each of them costs."""

import re
import sys
import tomllib

import grimp
import pytest
from launches import ROOT, python

HEAVY = {"torch", "accelerate", "wandb", "onnx", "safetensors", "pydantic", "yaml", "gradio", "onnxruntime"}


def test_the_import_contracts_of_pyproject_hold():
    done = python("-c", "from importlinter.cli import lint_imports; raise SystemExit(lint_imports())")
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


ANY_HEAVY = HEAVY | {"numpy", "logging", "asyncio"}
FIND_TEXT = (
    "from charrnn.config import DataConfig; from charrnn.data.sources import find_source;"
    "find_source(DataConfig(source='README.md'))"
)


@pytest.mark.parametrize(
    ("statement", "spared"),
    [
        ("import charrnn", ANY_HEAVY),
        ("import infer", ANY_HEAVY),
        ("import infer.cli", ANY_HEAVY),
        ("import charrnn.data.inspect", {"torch"}),
        ("import train.main", {"torch"}),
        ("import train.tracking.recorder", {"wandb", "tensorboard", "torch"}),
        (FIND_TEXT, {"backports", "pyarrow", "datasets"}),
    ],
)
def test_nothing_is_loaded_before_it_is_needed(statement, spared):
    done = python("-c", f"import sys; {statement}; print(*{{m.split('.')[0] for m in sys.modules}})")
    assert done.returncode == 0, done.stderr
    assert not set(done.stdout.split()) & spared


def test_no_file_of_train_bears_a_librarys_name():
    """`accelerate launch train/main.py` puts train/ first on sys.path."""
    taken = sys.stdlib_module_names | HEAVY | {"numpy", "rich", "typer", "tensorboard"}
    assert not {p.stem for p in (ROOT / "train").iterdir()} & taken
