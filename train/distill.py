"""Distillation: the teachers' mean probabilities after every position of the training split, computed once and stored.

They depend on the position alone, so that a run resumes bit for bit, and any number of processes trains the same run.

    targets/KEY/   rows.bin and meta.json; KEY: of the teachers, the ids, the vocabulary and the temperature
"""

import hashlib
import json
import logging
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from charrnn.config import RunConfig
from charrnn.errors import CheckpointError
from charrnn.io import expand_user, find_mismatch, lock, mark, progress_bar, release_pages, temporary, writing
from charrnn.model.ensemble import Ensemble
from charrnn.windows import stream_batch
from train.checkpoint.format import Checkpoint, load_for_inference, model_of, weights_digest
from train.checkpoint.resume import origin_folder
from train.checkpoint.vocab_transfer import check_same_vocab
from train.dataloader import TargetSource, TrainingData, target_dtype
from train.distributed.signals import StopSignals, stop_error
from train.evaluate import full_fp32, read

logger = logging.getLogger(__name__)

_ROWS, _META = "rows.bin", "meta.json"
_FORMAT = 1
# The split is read in parallel rows, each after a warm-up of its state, as by the `stream` protocol.
LANES, WARMUP = 64, 512


def find_targets(
    config: RunConfig,
    data: TrainingData,
    resumed: Checkpoint | None,
    signals: StopSignals,
    beat: Callable[[], object],
    *,
    progress: bool = False,
) -> TargetSource:
    """The targets of the run's teachers from the cache of prepared corpora, where they are stored if they are new.

    Args:
        config: The run's.
        data: Its text.
        resumed: The checkpoint that it resumes.
        signals: Stop signals, looked at while the targets are computed.
        beat: Called then.
        progress: Whether to show a progress bar on a terminal.

    Raises:
        CheckpointError: There is no such teacher, its vocabulary differs, or it is another than before.
        CorpusError: The cache cannot be written.
        CharRNNError: A stop signal was received.
    """
    teachers = [load_for_inference(origin_folder(name)) for name in config.distill.teachers]
    for name, teacher in zip(config.distill.teachers, teachers, strict=True):
        check_same_vocab(teacher.vocab, data.vocab, f"the teacher {name}", "the run")
    digests = [weights_digest(teacher) for teacher in teachers]
    if resumed and resumed.trainer.get("teachers") != digests:
        raise CheckpointError(
            "the weights of --teacher are not those that the run began with; restore them to resume, or name another "
            "--run-dir"
        )
    identity = _identity(digests, data, config.distill.temperature)
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    folder = expand_user(config.data.cache_dir) / "targets" / key[:16]

    def proceed() -> None:
        if signals.received:
            name = signal.Signals(signals.received).name
            what = f"stopped by {name} before the teachers' probabilities were complete"
            raise stop_error(signals.received, f"{what}; rerun the same command to start again")
        beat()

    def waiting() -> None:
        proceed()
        logger.info("teachers  waiting for another process, which computes the same probabilities")

    with lock(folder, waiting):
        if not _is_complete(folder, identity, data):
            model = Ensemble([model_of(teacher) for teacher in teachers], config.distill.temperature)
            _make(folder, identity, model, data, proceed, progress)
    rows = np.memmap(folder / _ROWS, target_dtype(len(data.vocab)), mode="r")  # (N - 1,)
    return TargetSource(rows, len(data.vocab), data.train.device, tuple(digests))


def _identity(digests: list[str], data: TrainingData, temperature: float) -> dict[str, Any]:
    """What determines the targets."""
    ids = hashlib.sha256(data.corpus.train.data).hexdigest()
    release_pages(data.corpus.train)
    vocabularies = [data.corpus.vocab.to_json(), data.vocab.to_json()]
    return {
        "format": _FORMAT,
        "teachers": digests,
        "ids": ids,
        "vocabularies": vocabularies,
        "temperature": temperature,
    }


def _is_complete(folder: Path, identity: dict[str, Any], data: TrainingData) -> bool:
    """Whether `folder` has these targets; a damaged one is reported, and removed."""
    if not folder.exists():
        return False
    try:
        meta = json.loads((folder / _META).read_text(encoding="utf-8"))
        size = (len(data.train) - 1) * target_dtype(len(data.vocab)).itemsize
        if meta["identity"] == identity and not find_mismatch(folder / _ROWS, size, meta["sha256"]):
            logger.info(f"teachers  {len(identity['teachers'])}, probabilities from {folder}")
            return True
    except (OSError, ValueError, KeyError, TypeError):
        pass
    logger.warning(f"{folder} is damaged and is made again")
    return False


def _make(
    folder: Path,
    identity: dict[str, Any],
    model: Ensemble,
    data: TrainingData,
    beat: Callable[[], object],
    progress: bool,
) -> None:
    """Compute targets and store them. Raises: CorpusError, or what `beat` raises."""
    what = f"{len(model.members)}, read {len(data.train):,} characters once"
    logger.info(f"teachers  {what}: their probabilities go to {folder}")
    began = time.monotonic()
    model.to(data.train.device).eval()
    with writing(folder.parent), temporary(folder) as hidden:
        mark(folder.parent)
        hidden.mkdir()
        _write(hidden / _ROWS, model, data, beat, progress)
        with (hidden / _ROWS).open("rb") as file:
            meta = {"identity": identity, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
            os.fsync(file.fileno())
        (hidden / _META).write_text(json.dumps(meta), encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        hidden.rename(folder)
    logger.info(f"teachers  done in {time.monotonic() - began:.0f} s")


def _write(path: Path, model: Ensemble, data: TrainingData, beat: Callable[[], object], progress: bool) -> None:
    """Write the rows of `target_dtype`, (N - 1,), reading the split as the `stream` protocol does."""
    ids, dtype = data.train, target_dtype(len(data.vocab))
    batch = stream_batch(len(ids), LANES, WARMUP)
    size = (len(ids) - 1) * dtype.itemsize
    with path.open("wb") as file, progress_bar("teachers", size, progress) as advance, full_fp32():
        for chunk, _, log_probs in read(model, ids, [batch], beat):
            rows = np.zeros(chunk.counted.shape, dtype)  # (R, T)
            probabilities = log_probs.exp()  # (R, T, V)
            if "ids" in (dtype.names or ()):
                probabilities, kept = probabilities.topk(rows["ids"].shape[2])  # (R, T, K)
                probabilities /= probabilities.sum(-1, keepdim=True)
                rows["ids"] = kept.cpu().numpy()
            rows["probabilities"] = probabilities.half().cpu().numpy()
            for start, counted, row in zip(chunk.starts, chunk.counted, rows, strict=True):
                file.seek((int(start) + int(counted.argmax())) * dtype.itemsize)
                advance(file.write(row[counted].tobytes()))
