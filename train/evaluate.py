"""The loss of a model on a split, in nats/char and bits/char, by both protocols of charrnn.windows.

`stream` reads the complete split once with the state carried: what generation sees. `windows` reads non-overlapping
windows from a zero state: comparable with fixed-context models. The two are never mixed.

`python -m train.evaluate RUN|CHECKPOINT... [--data TEXT] [--split test]`; several are scored together as well: the mean
of their probabilities.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from accelerate import Accelerator
from numpy.typing import NDArray
from torch.nn import functional as F

from charrnn.cli import run_command
from charrnn.config import EvalConfig, RunConfig, SampleConfig
from charrnn.data.corpus import LEAST_EVALUATED, Corpus, prepare
from charrnn.errors import CorpusError
from charrnn.log import configure_logging
from charrnn.model.ensemble import Ensemble
from charrnn.model.rnn import CharRNN
from charrnn.sampling import SamplingOptions, generate
from charrnn.vocab import Vocab
from charrnn.windows import (
    EvalBatch,
    rank_slice,
    sampled_stream_batch,
    sampled_window_batches,
    stream_batch,
    window_batches,
)
from train.checkpoint.format import load_for_inference, model_of
from train.checkpoint.vocab_transfer import check_same_vocab, table_between
from train.dataloader import IdSource, to_device
from train.errors import evaluation_out_of_memory, is_out_of_memory
from train.given_text import Encoding, Exclude, GivenText, Include, TextField

# Characters of a row per forward call: bounds the logits, (R, T, V).
_CHUNK = 256


def evaluate(
    model: CharRNN | Ensemble,
    ids: IdSource,
    config: EvalConfig,
    accelerator: Accelerator,
    beat: Callable[[], object] = lambda: None,
    *,
    sample: int = 0,
    stopped: Callable[[], object] = lambda: False,
) -> dict[str, float]:
    """Evaluate a model by both protocols; the rows are shared among the ranks, and their sums reduced.

    Args:
        model: Where `ids` are.
        ids: A split.
        config: The protocols' settings.
        accelerator: The ranks.
        beat: Called as the evaluation proceeds.
        sample: Characters from which the loss of `config.best_by` alone is estimated, in training precision; 0 reads
            all characters by both protocols, in fp32 without TF32.
        stopped: Asked as the evaluation proceeds whether to end it.

    Returns:
        `val/<protocol>/loss` (nats/char) and `val/<protocol>/bpc`; nothing when a rank was `stopped`.

    Raises:
        TrainingError: A rank has run out of memory; raised on all ranks.
    """
    rows, warmup = config.batch_rows, config.stream_warmup
    protocols: dict[str, Iterable[EvalBatch]] = {
        "stream": [stream_batch(len(ids), config.stream_lanes, warmup)],
        "windows": window_batches(len(ids), config.window, rows),
    }
    if sample:
        # Many short segments side by side: an estimate should take little time.
        estimates: dict[str, Iterable[EvalBatch]] = {
            "stream": [sampled_stream_batch(len(ids), sample, rows // 2, warmup // 4)],
            "windows": sampled_window_batches(len(ids), sample, config.window, rows),
        }
        protocols = {config.best_by: estimates[config.best_by]}
    losses: dict[str, float] = {}
    was_training = model.training
    model.eval()
    for name, batches in protocols.items():
        mine = (
            b.rows(rank_slice(len(b.starts), accelerator.process_index, accelerator.num_processes)) for b in batches
        )
        shortage = ""
        try:
            with accelerator.autocast() if sample else full_fp32():
                totals = nll_sum(model, ids, mine, beat, stopped)  # (2,)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            shortage, totals = str(error), torch.zeros(2, dtype=torch.float64)
        totals = torch.cat([totals, totals.new_tensor([bool(stopped()), bool(shortage)])])  # (4,)
        if accelerator.num_processes > 1:
            totals = accelerator.reduce(totals.to(accelerator.device), "sum")
        nll, count, stops, shortages = totals.tolist()
        if shortages:
            raise evaluation_out_of_memory(config, shortage)
        if stops:
            losses = {}
            break
        losses[f"val/{name}/loss"] = nll / count
        losses[f"val/{name}/bpc"] = nll / count / math.log(2)
    model.train(was_training)
    return losses


@contextlib.contextmanager
def full_fp32() -> Iterator[None]:
    """Switch TF32 off in cuDNN's recurrent layers, whose default it is; products outside them are fp32 by default."""
    rnn: Any = torch.backends.cudnn.rnn
    before, rnn.fp32_precision = rnn.fp32_precision, "ieee"
    try:
        yield
    finally:
        rnn.fp32_precision = before


@torch.no_grad()
def read(
    model: CharRNN | Ensemble,
    ids: IdSource,
    batches: Iterable[EvalBatch],
    beat: Callable[[], object] = lambda: None,
    stopped: Callable[[], object] = lambda: False,
) -> Iterator[tuple[EvalBatch, torch.Tensor, torch.Tensor]]:
    """Read batches with the state carried, in chunks that bound the memory of the logits.

    Args:
        model: In eval mode.
        ids: A split.
        batches: Rows of it.
        beat: Called before each forward call.
        stopped: Asked then whether to stop.

    Yields:
        The chunk of T characters as a batch, its ids (R, T + 1), and the logits after each, (R, T, V).
    """
    for batch in batches:
        if not len(batch.starts) or stopped():
            continue
        state = model.zero_state(len(batch.starts), ids.device)
        for begin in range(0, batch.length, _CHUNK):
            beat()
            if stopped():
                break
            length = min(_CHUNK, batch.length - begin)
            starts = batch.starts + begin
            window = ids.windows(starts, length + 1)  # (R, T + 1)
            logits, state = model(window[:, :-1], state)  # (R, T, V)
            yield EvalBatch(starts, length, batch.counted[:, begin : begin + length]), window, logits


@torch.no_grad()
def nll_sum(
    model: CharRNN | Ensemble,
    ids: IdSource,
    batches: Iterable[EvalBatch],
    beat: Callable[[], object] = lambda: None,
    stopped: Callable[[], object] = lambda: False,
) -> torch.Tensor:
    """Sum the negative log-likelihood over batches.

    Args:
        model: In eval mode.
        ids: A split.
        batches: Rows of it.
        beat: Called before each forward call.
        stopped: Asked then whether to stop, which leaves the sums incomplete.

    Returns:
        (2,) float64: nats, and the number of characters that they are summed over.
    """
    sums: list[torch.Tensor] = []
    count = 0
    for chunk, window, logits in read(model, ids, batches, beat, stopped):
        nll = F.cross_entropy(logits.transpose(1, 2), window[:, 1:], reduction="none")  # (R, T)
        sums.append((nll * to_device(chunk.counted, ids.device)).sum())
        count += int(chunk.counted.sum())
    total = torch.stack(sums).cpu().double().sum().item() if sums else 0.0
    return torch.tensor([total, count], dtype=torch.float64)


@torch.no_grad()
def sample_text(model: CharRNN, vocab: Vocab, config: SampleConfig, device: torch.device) -> str:
    """Generate `config.length` characters from the prompt; equal weights give equal text."""
    was_training = model.training
    model.eval()

    def step(ids: np.ndarray, state: tuple[torch.Tensor, ...]) -> tuple[np.ndarray, tuple[torch.Tensor, ...]]:
        logits, state = model(torch.from_numpy(ids.astype(np.int64)).to(device), state)
        return logits.float().cpu().numpy(), state

    # Without documents a line break stands for a beginning.
    given = "" if vocab.document_end is not None and config.prompt == "\n" else config.prompt
    prompt = vocab.begun(vocab.encode(given, unknown="skip"))
    logits, state = step(prompt[None], model.zero_state(1, device))
    options = SamplingOptions(config.temperature, config.top_k, config.top_p)
    draws = generate(step, state, logits[:, -1], config.length, options, [config.seed])
    text = vocab.decode(int(ids[0]) for ids in draws)
    model.train(was_training)
    return text


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
