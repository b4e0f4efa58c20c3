"""Distillation: the teachers' mean probabilities after every position of the training split, computed once and stored.

They depend on the position alone, so that a run resumes bit for bit, and any number of processes trains the same run.
Where the teachers know the training split by heart, what they say of it is not what they say of new text. So they can
generate more: Kim et al., "Pre-training under infinite compute", arXiv 2509.14786.

    targets/KEY/   targets.bin and meta.json; KEY: of the teachers, the ids, vocabularies, temperature and precision
"""

import hashlib
import json
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from charrnn.config import RunConfig
from charrnn.data import cache
from charrnn.errors import CheckpointError, CorpusError
from charrnn.io import expand_user, find_mismatch, lock, progress_bar, release_pages
from charrnn.model.ensemble import Ensemble
from charrnn.windows import stream_batch
from train.checkpoint.format import Checkpoint, load_for_inference, model_of, weights_digest
from train.checkpoint.resume import origin_folder
from train.checkpoint.vocab_transfer import check_same_vocab
from train.distributed.signals import stop_error
from train.loop.control import Control
from train.loop.dataloader import (
    IdSource,
    TargetSource,
    TrainingData,
    generated_shape,
    num_trained,
    target_dtype,
    window_plan,
)
from train.loop.errors import memory_explained
from train.loop.evaluation import read

logger = logging.getLogger(__name__)

_FORMAT = 2
# The split is read in parallel rows, each after a warm-up of its state, as by the `stream` protocol.
LANES, WARMUP = 64, 512
_CHUNK = 256  # generated characters of each row that are written at once


@dataclass
class _Targets:
    """Targets as the cache stores them.

    Attributes:
        identity: What determines them.
        size: Bytes.
        sha256: Of targets.bin, once it is written.
    """

    identity: dict[str, Any]
    size: int
    sha256: str = ""
    file: ClassVar[str] = "targets.bin"

    @property
    def key(self) -> str:
        """The name of their folder."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]

    def meta(self) -> dict[str, Any]:
        """What their meta.json must contain."""
        return {"identity": self.identity, "sha256": self.sha256}

    def is_complete(self, folder: Path) -> bool:
        """Whether `folder` has these targets, intact."""
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            return meta["identity"] == self.identity and not find_mismatch(
                folder / self.file, self.size, meta["sha256"]
            )
        except (OSError, ValueError, KeyError, TypeError, CorpusError):
            return False


def with_targets(
    config: RunConfig, data: TrainingData, resumed: Checkpoint | None, accelerator: Accelerator, control: Control
) -> TrainingData:
    """Add the teachers' targets and text to the run's; one process of each machine makes those not stored yet.

    Args:
        config: The run's.
        data: Its text.
        resumed: The checkpoint that it resumes.
        accelerator: Device and precision, which are the teachers' too.
        control: The ranks and stop signals, looked at while the targets are computed.

    Raises:
        CheckpointError: There is no such teacher, its vocabulary differs, or it is another than before.
        CorpusError: The cache cannot be written.
        TrainingError: The device's memory does not suffice.
        CharRNNError: A stop signal was received.
    """

    def find() -> TrainingData:
        with memory_explained(config):
            return _with_targets(config, data, resumed, accelerator, control)

    return control.collectives.local_main_first(find)


def _with_targets(
    config: RunConfig, data: TrainingData, resumed: Checkpoint | None, accelerator: Accelerator, control: Control
) -> TrainingData:
    teachers = [load_for_inference(origin_folder(name)) for name in config.distill.teachers]
    for name, teacher in zip(config.distill.teachers, teachers, strict=True):
        check_same_vocab(teacher.vocab, data.vocab, f"the teacher {name}", "the run")
        theirs, ours = teacher.config.data.split[0], config.data.split[0]
        if teacher.trainer["corpus"]["sha256"] == data.corpus.sha256 and theirs > ours:
            logger.warning(
                f"the teacher {name} was trained on {theirs:.1%} of this text, and the run evaluates on all after "
                f"{ours:.1%}: its losses will be too low; train both with the same data.split"
            )
    digests = [weights_digest(teacher) for teacher in teachers]
    if resumed and resumed.trainer.get("teachers") != digests:
        raise CheckpointError(
            "the weights of --teacher are not those that the run began with; restore them to resume, or name another "
            "--run-dir"
        )
    dtype = target_dtype(len(data.vocab))
    more = num_trained(config, data.corpus) - len(data.train)
    size = (len(data.train) + more) * dtype.itemsize
    targets = _Targets(_identity(digests, data, config, accelerator), size)
    folder = expand_user(config.data.cache_dir) / "targets" / targets.key

    def proceed() -> None:
        if number := control.signals.received:
            what = f"stopped by {signal.Signals(number).name} before the teachers' probabilities were complete"
            raise stop_error(number, f"{what}; rerun the same command to start again")
        control.heartbeat()

    def wait() -> None:
        proceed()
        logger.info("teachers  waiting for another process, which computes the same probabilities")

    def make(path: Path) -> None:
        model = Ensemble([model_of(teacher) for teacher in teachers], config.distill.temperature)
        with accelerator.autocast():
            _write(path, model.to(accelerator.device).eval(), data, generated_shape(config), proceed)
        with path.open("rb") as file:
            targets.sha256 = hashlib.file_digest(file, "sha256").hexdigest()

    began = time.monotonic()
    with lock(folder, wait):
        if targets.is_complete(folder):
            logger.info(f"teachers  {len(teachers)}, probabilities from {folder}")
        else:
            what = f"read {len(data.train):,} characters" + (f" and generate {more:,}" if more else "")
            logger.info(f"teachers  {len(teachers)}, {what} once, for {folder}")
            cache.write(folder, targets, make)
            logger.info(f"teachers  done in {time.monotonic() - began:.0f} s")
    rows = np.memmap(folder / targets.file, dtype, mode="r")
    source = TargetSource(rows, len(data.vocab), accelerator.device, tuple(digests))
    if not config.distill.generated:
        return replace(data, targets=source)
    train = IdSource(rows["id"], accelerator.device, num_symbols=len(data.vocab))
    return replace(data, train=train, plan=window_plan(config, len(train)), targets=source)


def _identity(digests: list[str], data: TrainingData, config: RunConfig, accelerator: Accelerator) -> dict[str, Any]:
    ids = hashlib.sha256(data.corpus.train.data).hexdigest()
    release_pages(data.corpus.train)
    return {
        "format": _FORMAT,
        "teachers": digests,
        "ids": ids,
        "vocabularies": [data.corpus.vocab.to_json(), data.vocab.to_json()],
        "temperature": config.distill.temperature,
        "precision": accelerator.mixed_precision,
        "generated": config.distill.generated,
    }


def _write(
    path: Path,
    model: Ensemble,
    data: TrainingData,
    generated: tuple[int, int],
    beat: Callable[[], object],
) -> None:
    """Write the rows of `target_dtype`: the split's, read as the `stream` protocol does, and those of generated text.

    The last of the split has no target, which adds nothing to the loss.
    """
    ids, dtype = data.train, target_dtype(len(data.vocab))
    size = (len(ids) + math.prod(generated)) * dtype.itemsize
    with path.open("wb") as file, progress_bar("teachers", size) as advance:

        def write(start: int, rows: NDArray[np.void]) -> None:
            file.seek(start * dtype.itemsize)
            advance(file.write(rows.tobytes()))

        for chunk, window, log_probs in read(model, ids, [stream_batch(len(ids), LANES, WARMUP)], beat):
            rows = _rows(window[:, :-1], log_probs, dtype)  # (R, T)
            for start, counted, row in zip(chunk.starts, chunk.counted, rows, strict=True):
                write(int(start) + int(counted.argmax()), row[counted])
        last = np.zeros(1, dtype)
        last["id"] = ids.windows(np.array([len(ids) - 1]), 1).item()
        write(len(ids) - 1, last)
        for begin, window, log_probs in _generate(model, ids, generated, beat):
            for r, row in enumerate(_rows(window, log_probs, dtype)):
                write(len(ids) + r * generated[1] + begin, row)


def _rows(ids: Tensor, log_probs: Tensor, dtype: np.dtype) -> NDArray[np.void]:
    """Rows of `target_dtype`, (R, T), of ids (R, T) and the logarithms of the next ones' probabilities (R, T, V)."""
    rows, probabilities = np.zeros(ids.shape, dtype), log_probs.exp()
    if "kept" in (dtype.names or ()):
        probabilities, kept = probabilities.topk(rows["kept"].shape[2])  # (R, T, K)
        probabilities /= probabilities.sum(-1, keepdim=True)
        rows["kept"] = kept.cpu().numpy()
    rows["id"], rows["probabilities"] = ids.cpu().numpy(), probabilities.half().cpu().numpy()
    return rows


@torch.no_grad()
def _generate(
    model: Ensemble, ids: IdSource, shape: tuple[int, int], beat: Callable[[], object]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Continue the split from R places at equal distances, by T characters, drawn as the model predicts them.

    Equal for all students on a machine; another processor's rounding can make it another text.

    Args:
        model: In eval mode.
        ids: The split.
        shape: (R, T).
        beat: Called before each forward call.

    Yields:
        The first character's number in its row, ids (R, _CHUNK), and the logarithms of the probabilities of each next
        character, (R, _CHUNK, V); the last chunk may be shorter.
    """
    starts = np.linspace(0, max(0, len(ids) - WARMUP), shape[0]).astype(np.int64)
    random = torch.Generator(ids.device).manual_seed(0)
    log_probs, state = model(ids.windows(starts, min(WARMUP, len(ids))), model.zero_state(shape[0], ids.device))
    for begin in range(0, shape[1], _CHUNK):
        drawn, predicted = [], []
        for _ in range(min(_CHUNK, shape[1] - begin)):
            beat()
            drawn.append(torch.multinomial(log_probs[:, -1].float().exp(), 1, generator=random))  # (R, 1)
            log_probs, state = model(drawn[-1], state)  # (R, 1, V)
            predicted.append(log_probs)
        yield begin, torch.cat(drawn, dim=1), torch.cat(predicted, dim=1)
