"""Distillation: the teachers' mean probabilities after every position of the training split, computed once and stored.

They depend on the position alone, so that a run resumes bit for bit, and any number of processes trains the same run.

    targets/KEY/   targets.bin and meta.json; KEY: of the teachers, the ids, vocabularies, temperature and precision
"""

import hashlib
import json
import logging
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from accelerate import Accelerator

from charrnn.config import RunConfig
from charrnn.data import cache
from charrnn.errors import CheckpointError, CorpusError
from charrnn.io import expand_user, find_mismatch, lock, progress_bar, release_pages
from charrnn.model.ensemble import Ensemble
from charrnn.windows import stream_batch
from train.checkpoint.format import Checkpoint, load_for_inference, model_of, weights_digest
from train.checkpoint.resume import origin_folder
from train.checkpoint.vocab_transfer import check_same_vocab
from train.control import Control
from train.dataloader import TargetSource, TrainingData, target_dtype
from train.distributed.signals import stop_error
from train.errors import memory_explained
from train.evaluate import read

logger = logging.getLogger(__name__)

_FORMAT = 1
# The split is read in parallel rows, each after a warm-up of its state, as by the `stream` protocol.
LANES, WARMUP = 64, 512


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


def find_targets(
    config: RunConfig, data: TrainingData, resumed: Checkpoint | None, accelerator: Accelerator, control: Control
) -> TargetSource:
    """The targets of the run's teachers; one process of each machine computes those that are not stored yet.

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

    def find() -> TargetSource:
        with memory_explained(config):
            return _find(config, data, resumed, accelerator, control)

    return control.collectives.local_main_first(find)


def _find(
    config: RunConfig, data: TrainingData, resumed: Checkpoint | None, accelerator: Accelerator, control: Control
) -> TargetSource:
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
    targets = _Targets(_identity(digests, data, config, accelerator), (len(data.train) - 1) * dtype.itemsize)
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
            _write(path, model.to(accelerator.device).eval(), data, proceed, progress=is_main)
        with path.open("rb") as file:
            targets.sha256 = hashlib.file_digest(file, "sha256").hexdigest()

    is_main, began = accelerator.is_main_process, time.monotonic()
    with lock(folder, wait):
        if targets.is_complete(folder):
            logger.info(f"teachers  {len(teachers)}, probabilities from {folder}")
        else:
            logger.info(f"teachers  {len(teachers)}, read {len(data.train):,} characters once, for {folder}")
            cache.write(folder, targets, make, config.distill.teachers, is_main)
            logger.info(f"teachers  done in {time.monotonic() - began:.0f} s")
    rows = np.memmap(folder / targets.file, dtype, mode="r")  # (N - 1,)
    return TargetSource(rows, len(data.vocab), accelerator.device, tuple(digests))


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
    }


def _write(path: Path, model: Ensemble, data: TrainingData, beat: Callable[[], object], *, progress: bool) -> None:
    """Write the rows of `target_dtype`, (N - 1,), reading the split as the `stream` protocol does."""
    ids, dtype = data.train, target_dtype(len(data.vocab))
    batch = stream_batch(len(ids), LANES, WARMUP)
    size = (len(ids) - 1) * dtype.itemsize
    with path.open("wb") as file, progress_bar("teachers", size, progress) as advance:
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
