"""The base model of --init-from base: how it is made from a run's best checkpoint, and whether it suits a text.

`python -m train.recipe.base_model RUN --out checkpoints/base`
"""

import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from charrnn.cli import run_command
from charrnn.data.corpus import Corpus
from charrnn.errors import CheckpointError
from train.checkpoint.folders import BASE_FOLDERS, base_folder
from train.checkpoint.format import load_for_inference, save_for_inference
from train.export.exporter import without_paths

# The English base helps from this share of Latin script on, with ASCII's digits and punctuation.
_MIN_LATIN = 0.9
_COUNTED_CHARS = 1 << 20


def suits(corpus: Corpus) -> bool:
    """Whether fine-tuning the base helps: it is there, and the text is mostly Latin script."""
    if corpus.vocab.kind != "chars":
        return False
    try:
        base_folder()
    except CheckpointError:
        return False
    counts = np.bincount(corpus.train[:_COUNTED_CHARS], minlength=len(corpus.vocab))  # (V,)
    latin = [ord(unicodedata.normalize("NFKD", symbol)[0]) < 128 for symbol in corpus.vocab.symbols]  # (V,)
    return bool(counts[latin].sum() >= _MIN_LATIN * counts.sum())


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
    """Entry of `python -m train.recipe.base_model`."""
    run_command(lambda: typer.run(command))


if __name__ == "__main__":
    main()
