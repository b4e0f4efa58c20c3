"""`python -m train.evaluate RUN|CHECKPOINT... [--data TEXT] [--split test]`: losses of checkpoints on a text.

Several are scored together as well: the mean of their probabilities.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import typer
from accelerate import Accelerator
from numpy.typing import NDArray

from charrnn.cli import run_command
from charrnn.data.corpus import LEAST_EVALUATED, Corpus, prepare
from charrnn.errors import CorpusError
from charrnn.log import configure_logging
from charrnn.model.ensemble import Ensemble
from charrnn.model.rnn import CharRNN
from train.checkpoint.format import Checkpoint, load_for_inference, model_of
from train.checkpoint.vocab_transfer import check_same_vocab, table_between
from train.given_text import Encoding, Exclude, GivenText, Include, TextField
from train.loop.dataloader import IdSource
from train.loop.evaluation import evaluate

Part = Literal["train", "val", "test"]  # of a corpus


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
    split: Annotated[Part, typer.Option(help="Which part of it.")] = "val",
    shares: Annotated[
        str | None, typer.Option(metavar="TRAIN,VAL,TEST", help="How it is cut.", show_default="as it was for training")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Losses of checkpoints on a part of a text, by both protocols."""
    text = GivenText(data, include or None, exclude or None, text_field, encoding)
    by_model = evaluate_checkpoints(sources, text, split, shares or "")
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
    sources: Sequence[Path], text: GivenText, split: Part, shares: str = ""
) -> dict[str, dict[str, float]]:
    """Evaluate checkpoints by both protocols, and if there are several the mean of their probabilities.

    Args:
        sources: Run folders or checkpoints.
        text: The text, and how it is read; as the first of them was trained, where that is not given.
        split: Which part of the text.
        shares: How the text is cut, such as "0.9,0.05,0.05"; "" = as it was for training.

    Returns:
        By source, and under "mean": `<split>/<protocol>/loss` (nats/char) and `<split>/<protocol>/bpc`.

    Raises:
        CharRNNError: There is no such checkpoint or text, or they do not fit.
    """
    accelerator = Accelerator()
    checkpoints = {str(source): load_for_inference(source) for source in sources}
    first, checkpoint = next(iter(checkpoints.items()))
    corpus, table = open_text(checkpoint, first, text, shares)
    ids = IdSource(getattr(corpus, split), accelerator.device, table, len(corpus.vocab))
    if len(ids) < LEAST_EVALUATED:
        raise CorpusError(f"the {split} part of {corpus.source} has {len(ids)} characters; give --shares")
    models: dict[str, CharRNN | Ensemble] = {}
    for name, other in checkpoints.items():
        check_same_vocab(other.vocab, checkpoint.vocab, name, first)
        models[name] = model_of(other).to(accelerator.device)
    if len(models) > 1:
        models["mean"] = Ensemble([model for model in models.values() if isinstance(model, CharRNN)])
    return {
        name: {
            key.replace("val/", f"{split}/"): value
            for key, value in evaluate(model, ids, checkpoint.config.eval, accelerator).items()
        }
        for name, model in models.items()
    }


def open_text(
    checkpoint: Checkpoint, source: str, text: GivenText, shares: str
) -> tuple[Corpus, NDArray[np.int64] | None]:
    """Return a text for the checkpoint from `source`, and the model's id for each of the text's; None if the same."""
    data = text.config(checkpoint.config.data.model_dump(), **({"split": shares.split(",")} if shares else {}))
    corpus = prepare(data)
    return corpus, table_between(checkpoint.vocab, corpus, source)


def main() -> None:
    """Entry of `python -m train.evaluate`."""
    configure_logging()
    run_command(lambda: typer.run(command))


if __name__ == "__main__":
    main()
