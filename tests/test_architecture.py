"""The arrows between the rooms, and what importing each of them may cost."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "accelerate", "wandb", "onnx", "safetensors", "pydantic", "yaml", "gradio", "onnxruntime"}


def test_the_import_contracts_of_pyproject_hold():
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports; raise SystemExit(lint_imports())"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


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
    assert not {p.stem for p in (ROOT / "train").iterdir()} & taken
