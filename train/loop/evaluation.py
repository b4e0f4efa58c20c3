"""The loss of a model on a split, in nats/char and bits/char, by both protocols of charrnn.windows; and samples.

`stream` reads the complete split once with the state carried: what generation sees. `windows` reads non-overlapping
windows from a zero state: comparable with fixed-context models. The two are never mixed.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.nn import functional as F

from charrnn.config import EvalConfig, SampleConfig
from charrnn.model.ensemble import Ensemble
from charrnn.model.rnn import CharRNN
from charrnn.sampling import SamplingOptions, draw, shares_of
from charrnn.vocab import Vocab
from charrnn.windows import (
    EvalBatch,
    rank_slice,
    sampled_stream_batch,
    sampled_window_batches,
    stream_batch,
    window_batches,
)
from train.loop.dataloader import IdSource, to_device
from train.loop.errors import evaluation_out_of_memory, is_out_of_memory

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
    losses: dict[str, float] = {}
    was_training = model.training
    model.eval()
    for name, batches in _protocols(len(ids), config, sample).items():
        mine = (
            b.rows(rank_slice(len(b.starts), accelerator.process_index, accelerator.num_processes)) for b in batches
        )
        shortage = ""
        try:
            with accelerator.autocast() if sample else full_fp32():
                totals = nll_sum(read(model, ids, mine, beat, stopped))  # (2,)
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


def _protocols(num_chars: int, config: EvalConfig, sample: int) -> dict[str, Iterable[EvalBatch]]:
    """The batches of each protocol.

    Those of an estimate are short segments side by side, to take little time, each at least as long as its warm-up.
    """
    rows, warmup = config.batch_rows, config.stream_warmup
    if not sample:
        stream = stream_batch(num_chars, config.stream_lanes, warmup)
        return {"stream": [stream], "windows": window_batches(num_chars, config.window, rows)}
    if config.best_by == "stream":
        warmup //= 8
        rows = max(1, min(rows // 2, sample // max(1, warmup)))
        return {"stream": [sampled_stream_batch(num_chars, sample, rows, warmup)]}
    return {"windows": sampled_window_batches(num_chars, sample, config.window, rows)}


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
        for chunk in batch.chunks(_CHUNK):
            beat()
            if stopped():
                break
            window = ids.windows(chunk.starts, chunk.length + 1)  # (R, T + 1)
            logits, state = model(window[:, :-1], state)  # (R, T, V)
            yield chunk, window, logits


@torch.no_grad()
def nll_sum(chunks: Iterable[tuple[EvalBatch, torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Sum the negative log-likelihood over what `read` yields.

    Returns:
        (2,) float64: nats, and the number of characters that they are summed over.
    """
    sums: list[torch.Tensor] = []
    count = 0
    for chunk, window, logits in chunks:
        nll = F.cross_entropy(logits.transpose(1, 2), window[:, 1:], reduction="none")  # (R, T)
        sums.append((nll * to_device(chunk.counted, window.device)).sum())
        count += int(chunk.counted.sum())
    total = torch.stack(sums).cpu().double().sum().item() if sums else 0.0
    return torch.tensor([total, count], dtype=torch.float64)


@torch.no_grad()
def sample_text(model: CharRNN, vocab: Vocab, config: SampleConfig, device: torch.device) -> str:
    """Generate `config.length` characters from the prompt; equal weights give equal text."""
    was_training = model.training
    model.eval()
    # Without documents a line break stands for a beginning.
    given = "" if vocab.document_end is not None and config.prompt == "\n" else config.prompt
    read = vocab.begun(vocab.encode(given, unknown="skip")).astype(np.int64)  # (T,)
    state, random, drawn = model.zero_state(1, device), np.random.default_rng(config.seed), list[int]()
    options = SamplingOptions(config.temperature, config.top_k, config.top_p)
    for _ in range(config.length):
        logits, state = model(torch.from_numpy(read[None]).to(device), state)  # (1, T, V)
        read = draw(shares_of(logits[:, -1].float().cpu().numpy(), options), random.random(1))  # (1,)
        drawn += read.tolist()
    model.train(was_training)
    return vocab.decode(drawn)
