"""The base model of --init-from base: where it is, and how it is made from a run's best checkpoint.

`python -m train.base RUN --out checkpoints/base`
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from charrnn.cli import run_command
from charrnn.errors import CheckpointError
from train.checkpoint.folders import BASE_FOLDERS
from train.checkpoint.format import load_for_inference, save_for_inference
from train.export.exporter import without_paths


def shrink(source: Path, out: Path) -> Path:
    """Write the best checkpoint of a run as a base model: weights in half precision, without paths of its machine.

    Args:
        source: A run folder or a checkpoint.
        out: The folder to write.

    Raises:
        CheckpointError: If there is no such checkpoint, or `out` exists or cannot be written.
    """
    if out.exists():
        raise CheckpointError(f"{out} exists; name another --out, or delete it")
    best = load_for_inference(source)
    weights = {name: tensor.to(torch.float16) for name, tensor in best.weights.items()}
    return save_for_inference(out, replace(without_paths(best), weights=weights))


def command(
    source: Annotated[Path, typer.Argument(metavar="RUN|CHECKPOINT", help="A run folder (its best/) or a checkpoint.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")] = BASE_FOLDERS[0],
) -> None:
    """Write a run's best checkpoint in half precision, for --init-from."""
    folder = shrink(source, out)
    size = sum(path.stat().st_size for path in folder.iterdir())
    typer.echo(f"{folder}  {size / 2**20:.1f} MiB")


def main() -> None:
    """Entry of `python -m train.base`."""
    run_command(lambda: typer.run(command))


if __name__ == "__main__":
    main()
