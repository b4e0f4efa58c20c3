"""The arrows between the rooms, and what importing each of them may cost."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "accelerate", "wandb", "onnx", "safetensors", "pydantic", "yaml", "gradio", "onnxruntime"}
# What each module of charrnn may import of charrnn; the order is that of the arrows.
ALLOWED = {
    "errors": set(),
    "vocab": {"errors"},
    "sampling": {"errors"},
    "config": {"errors"},
    "windows": {"errors"},
    "storage": {"errors"},
    "parts": {"errors", "storage"},
    "download": {"errors", "storage"},
    "originals": {"errors", "storage", "download"},
    "datasets": {"errors", "storage", "download", "originals"},
    "compressed": {"errors", "storage", "parts"},
    "archives": {"errors", "storage", "compressed"},
    "patterns": {"errors"},
    "markov": {"errors", "storage"},
    "records": {"errors", "storage", "parts"},
    "hub": {"errors", "storage", "parts", "records"},
    "formats": {"errors", "storage", "parts", "patterns", "compressed", "archives", "records"},
    "gathering": {"errors", "parts", "formats"},
    "sources": {"errors", "storage", "parts", "patterns", "records", "hub", "formats", "gathering"}
    | {"markov", "download", "originals", "datasets"},
    "decoding": {"errors"},
    "cores": set(),
    "workers": {"errors"},
    "turns": {"storage"},
    "segments": {"errors", "storage", "parts", "decoding"},
    "scanning": {"vocab", "storage", "sources", "decoding", "segments", "workers"},
    "encoding": {"vocab", "storage", "sources", "decoding", "segments", "workers", "scanning"},
    "alphabet": {"errors", "vocab", "config", "storage", "scanning"},
    "cache": {"errors", "vocab", "storage"},
    "corpus": {
        *{"errors", "vocab", "config", "windows", "storage", "sources", "decoding", "segments", "scanning", "encoding"},
        *{"alphabet", "cache", "turns", "workers", "cores"},
        "inspection",  # python -m charrnn.corpus hands over to it
    },
    "entropy": {"vocab"},
    "ngram": {"vocab", "entropy"},
    "lines": {"vocab"},
    "inspection": {"errors", "config", "windows", "markov", "corpus", "entropy", "lines"},
    "gru": set(),
    "model": {"config", "gru"},
    "checkpoint": {"errors", "vocab", "config", "model"},
}


def imported(path):
    """The dotted names that a file imports, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def of_package(names, package):
    return {name.split(".")[1] for name in names if name.startswith(f"{package}.")}


@pytest.mark.parametrize("path", sorted((ROOT / "charrnn").glob("[!_]*.py")), ids=lambda p: p.stem)
def test_charrnns_modules_import_only_what_lies_before_them(path):
    names = imported(path)
    assert not {n for n in names if n.split(".")[0] in ("train", "infer")}
    modules = of_package(names, "charrnn") & set(ALLOWED)
    assert modules <= ALLOWED[path.stem]


@pytest.mark.parametrize("path", sorted((ROOT / "infer").glob("*.py")), ids=lambda p: p.stem)
def test_infer_stands_on_four_light_modules_and_never_on_training(path):
    names = imported(path)
    own = {"onnxruntime", "gradio"} if path.stem in ("ui", "page_style", "page_tabs") else {"onnxruntime"}
    assert not {n.split(".")[0] for n in names} & (HEAVY - own | {"train", "rich"})
    assert of_package(names, "charrnn") & set(ALLOWED) <= {"errors", "vocab", "sampling", "windows"}


@pytest.mark.parametrize("path", sorted((ROOT / "train").glob("*.py")), ids=lambda p: p.stem)
def test_training_meets_inference_at_the_export_alone(path):
    of_infer = {n for n in imported(path) if n.split(".")[0] == "infer"}
    assert not of_infer or path.stem == "export"


def loaded_by(statement):
    code = f"import sys; {statement}; print(*{{m.split('.')[0] for m in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("statement", ["import charrnn", "import infer", "import infer.cli"])
def test_a_light_import_loads_nothing_heavy(statement):
    assert not loaded_by(statement) & HEAVY


def test_the_options_of_training_are_judged_before_torch_is_loaded():
    assert "torch" not in loaded_by("import train.main")


def test_no_file_of_train_bears_a_librarys_name():
    """`accelerate launch train/main.py` puts train/ first on sys.path."""
    taken = sys.stdlib_module_names | HEAVY | {"numpy", "rich", "typer", "tensorboard"}
    assert not {p.stem for p in (ROOT / "train").glob("*.py")} & taken
