"""The loss of a model on a split, in nats/char and bits/char, by both protocols of charrnn.windows.

`stream` is the whole split once with the state carried: what generation sees. `windows` is non-overlapping windows
from a zero state: comparable with fixed-context models. The two are never mixed.
"""

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from accelerate import Accelerator
from torch.nn import functional as F

from charrnn.config import EvalConfig, SampleConfig
from charrnn.model import CharRNN
from charrnn.sampling import SamplingOptions, generate
from charrnn.vocab import Vocab
from charrnn.windows import EvalBatch, rank_slice, stream_batch, window_batches
from train.batches import IdSource

# Characters a row runs in one call: bounds the logits, (R, T, V), whatever the length of a lane.
_CHUNK = 256


def evaluate(
    model: CharRNN,
    ids: IdSource,
    config: EvalConfig,
    accelerator: Accelerator,
    beat: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """`val/<protocol>/loss` (nats/char) and `val/<protocol>/bpc` of `ids` for both protocols, in fp32.

    beat: called as it goes on. The rows are shared among the ranks; the sums, not the means, are reduced.
    """
    protocols: dict[str, Iterable[EvalBatch]] = {
        "stream": [stream_batch(len(ids), config.stream_lanes, config.stream_warmup)],
        "windows": window_batches(len(ids), config.window, config.batch_rows),
    }
    figures: dict[str, float] = {}
    was_training = model.training
    model.eval()
    for name, batches in protocols.items():
        mine = (
            b.rows(rank_slice(len(b.starts), accelerator.process_index, accelerator.num_processes)) for b in batches
        )
        totals = nll_sum(model, ids, mine, beat)
        if accelerator.num_processes > 1:
            totals = accelerator.reduce(totals.to(accelerator.device), "sum")
        nll, count = totals.tolist()
        figures[f"val/{name}/loss"] = nll / count
        figures[f"val/{name}/bpc"] = nll / count / math.log(2)
    model.train(was_training)
    return figures


@torch.no_grad()
def nll_sum(
    model: CharRNN, ids: IdSource, batches: Iterable[EvalBatch], beat: Callable[[], object] = lambda: None
) -> torch.Tensor:
    """(2,) float64: the summed negative log likelihood in nats, and how many characters it is summed over."""
    sums: list[torch.Tensor] = []
    count = 0
    for batch in batches:
        if not len(batch.starts):
            continue
        state = model.zero_state(len(batch.starts), ids.device)
        for begin in range(0, batch.length, _CHUNK):
            beat()
            length = min(_CHUNK, batch.length - begin)
            window = ids.windows(batch.starts + begin, length + 1)  # (R, T + 1)
            counted = torch.from_numpy(batch.counted[:, begin : begin + length]).to(ids.device)  # (R, T)
            logits, state = model(window[:, :-1], state)  # (R, T, V)
            nll = F.cross_entropy(logits.transpose(1, 2), window[:, 1:], reduction="none")  # (R, T)
            sums.append((nll * counted).sum())
        count += int(batch.counted.sum())
    total = torch.stack(sums).cpu().double().sum().item() if sums else 0.0
    return torch.tensor([total, count], dtype=torch.float64)


@torch.no_grad()
def sample_text(model: CharRNN, vocab: Vocab, config: SampleConfig, device: torch.device) -> str:
    """`config.length` characters that go on from the prompt; the same text for the same weights."""
    was_training = model.training
    model.eval()

    def step(ids: np.ndarray, state: tuple[torch.Tensor, ...]) -> tuple[np.ndarray, tuple[torch.Tensor, ...]]:
        logits, state = model(torch.from_numpy(ids.astype(np.int64)).to(device), state)
        return logits.float().cpu().numpy(), state

    # A line break is what stands for a beginning where there are no documents.
    given = "" if vocab.document_end is not None and config.prompt == "\n" else config.prompt
    prompt = vocab.begun(vocab.encode(given, unknown="skip"))
    logits, state = step(prompt[None], model.zero_state(1, device))
    options = SamplingOptions(config.temperature, config.top_k, config.top_p)
    draws = generate(step, state, logits[:, -1], config.length, options, [config.seed])
    text = vocab.decode(int(ids[0]) for ids in draws)
    model.train(was_training)
    return text
