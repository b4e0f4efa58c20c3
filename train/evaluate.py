"""`python -m train.evaluate RUN|CHECKPOINT... [--data TEXT] [--split test]`: losses of checkpoints on a text.

Several are scored together as well: the mean of their probabilities.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from accelerate import Accelerator
from numpy.typing import NDArray

from charrnn.cli import run_command
from charrnn.config import RunConfig
from charrnn.data.corpus import LEAST_EVALUATED, Corpus, prepare
from charrnn.errors import CorpusError
from charrnn.log import configure_logging
from charrnn.model.ensemble import Ensemble
from charrnn.model.rnn import CharRNN
from charrnn.vocab import Vocab
from train.checkpoint.format import load_for_inference, model_of
from train.checkpoint.vocab_transfer import check_same_vocab, table_between
from train.given_text import Encoding, Exclude, GivenText, Include, TextField
from train.loop.dataloader import IdSource
from train.loop.evaluation import evaluate


class Part(StrEnum):
    """Parts of a corpus, as --split names them."""

    TRAIN = "train"
    VAL = "val"
    TEST = "test"


def command(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN|CHECKPOINT...", help="Run folders (their best/) or checkpoints; of several also their mean."
        ),
    ],
    data: Annotated[
        str | None, typer.Option(help="The text.", show_default="the one it was trained on, with its options")
    ] = None,
    include: Include = None,
    exclude: Exclude = None,
    text_field: TextField = None,
    encoding: Encoding = None,
    split: Annotated[Part, typer.Option(help="Which part of it.")] = Part.VAL,
    shares: Annotated[
        str | None,
        typer.Option(metavar="TRAIN,VAL,TEST", help="How it is cut.", show_default="as it was for training"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Losses of checkpoints on a part of a text, by both protocols."""
    text = GivenText(data, include or None, exclude or None, text_field, encoding)
    by_model = evaluate_checkpoints(sources, text, split.value, shares or "")
    if as_json:
        typer.echo(json.dumps(by_model if len(sources) > 1 else by_model[str(sources[0])]))
        return
    for name, losses in by_model.items():
        if len(sources) > 1:
            typer.echo(name)
        for protocol in [k.removesuffix("/loss") for k in losses if k.endswith("/loss")]:
            loss, bits = losses[f"{protocol}/loss"], losses[f"{protocol}/bpc"]
            typer.echo(f"{protocol:16s} {loss:.4f} nats/char  {bits:.4f} bits/char")


def evaluate_checkpoints(
    sources: Sequence[Path], text: GivenText, split: str, shares: str = ""
) -> dict[str, dict[str, float]]:
    """Evaluate checkpoints by both protocols, and if there are several the mean of their probabilities.

    Args:
        sources: Run folders or checkpoints.
        text: The text, and how it is read; as the first of them was trained, where that is not given.
        split: "train", "val" or "test".
        shares: How the text is cut, such as "0.9,0.05,0.05"; "" = as it was for training.

    Returns:
        By source, and under "mean": `<split>/<protocol>/loss` (nats/char) and `<split>/<protocol>/bpc`.

    Raises:
        CharRNNError: There is no such checkpoint or text, or they do not fit.
    """
    accelerator = Accelerator()
    opened = open_split(sources[0], text, split, shares, accelerator.device)
    models: dict[str, CharRNN | Ensemble] = {str(sources[0]): opened.model}
    for source in sources[1:]:
        other = load_for_inference(source)
        check_same_vocab(other.vocab, opened.vocab, str(source), str(sources[0]))
        models[str(source)] = model_of(other).to(accelerator.device)
    if len(models) > 1:
        models["mean"] = Ensemble([model for model in models.values() if isinstance(model, CharRNN)])
    return {
        name: {
            key.replace("val/", f"{split}/"): value
            for key, value in evaluate(model, opened.ids, opened.config.eval, accelerator).items()
        }
        for name, model in models.items()
    }


@dataclass(frozen=True)
class OpenedSplit:
    """A checkpoint's model and a split of a text on one device.

    Attributes:
        config: The checkpoint's.
        vocab: The checkpoint's.
        model: With its weights.
        ids: The split.
        corpus: Where it comes from.
        table: (V_corpus,), the model's id for each of the corpus's; None when they are the same.
    """

    config: RunConfig
    vocab: Vocab
    model: CharRNN
    ids: IdSource
    corpus: Corpus
    table: NDArray[np.int64] | None


def open_split(source: Path, text: GivenText, split: str, shares: str, device: torch.device) -> OpenedSplit:
    """Load a checkpoint and a split of a text, with the arguments and errors of `evaluate_checkpoints`."""
    checkpoint = load_for_inference(source)
    data = text.config(checkpoint.config.data.model_dump(), **({"split": shares.split(",")} if shares else {}))
    corpus = prepare(data)
    table = table_between(checkpoint.vocab, corpus, source)
    ids = IdSource(getattr(corpus, split), device, table, len(corpus.vocab))
    if len(ids) < LEAST_EVALUATED:
        raise CorpusError(f"the {split} part of {data.source} has {len(ids)} characters; give --shares")
    return OpenedSplit(checkpoint.config, checkpoint.vocab, model_of(checkpoint).to(device), ids, corpus, table)


def main() -> None:
    """Entry of `python -m train.evaluate`."""
    configure_logging()
    run_command(lambda: typer.run(command))


if __name__ == "__main__":
    main()
