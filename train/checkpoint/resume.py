"""What a run starts from: nothing, another run's weights, or its own newest checkpoint; and which run may resume."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from charrnn.config import BASE, KEEP, SCRATCH, DataConfig, RunConfig
from charrnn.data.corpus import Corpus
from charrnn.errors import CheckpointError, CorpusError
from charrnn.io import expand_user
from charrnn.model.rnn import CharRNN
from train.checkpoint.folders import base_folder
from train.checkpoint.format import BEST, Checkpoint, load, load_for_inference, load_newest, step_folders
from train.checkpoint.vocab_transfer import StartingPoint, fine_tuning_start, table_between

logger = logging.getLogger(__name__)

_SOURCE_FIELDS = ("source", "cache_dir", "mirror", "text_field", "include", "exclude")
SHAPE = ("rnn", "embedding_dim", "hidden_dim", "num_layers", "layer_norm")
# A resumed run must agree with its checkpoint on these; other fields may change between segments.
_FIXED = {
    # The text itself is compared by its SHA-256.
    "data": tuple(name for name in DataConfig.model_fields if name not in _SOURCE_FIELDS),
    "model": (*SHAPE, "dropout", "dropout_mask"),
    "train": ("seed",),
    "distill": ("teachers", "generated"),
    # These decide what is best: losses measured otherwise cannot be compared with the best so far.
    "eval": ("best_by", "window", "stream_lanes", "stream_warmup", "sample"),
}


def starting_point(config: RunConfig, corpus: Corpus, run_dir: Path, *, resume: bool) -> StartingPoint:
    """Decide where the run starts.

    Args:
        config: Its config.
        corpus: Its text.
        run_dir: Its folder.
        resume: Whether a run in that folder is resumed; else it is refused.

    Raises:
        CheckpointError: If the folder holds a different run, a run that cannot be resumed, or one although `resume` is
            False; or if the weights of `train.init_from` do not fit.
    """
    steps, has_best = step_folders(run_dir), (run_dir / BEST).exists()
    if not resume and (steps or has_best):
        raise CheckpointError(
            f"{run_dir} holds a run, at {steps[0].name if steps else BEST}, and --resume never does not overwrite it; "
            "name another --run-dir, or delete that folder"
        )
    if not steps and has_best:
        raise CheckpointError(
            f"{run_dir} holds {BEST}/ and no step checkpoint to resume from; name another --run-dir (with --init-from "
            f"{run_dir} to start from its weights), or delete that folder"
        )
    saved = load_newest(run_dir, lambda c: _check_same_run(c, config, corpus, run_dir)) if resume else None
    if saved:
        table = table_between(saved.vocab, corpus, run_dir)
        return StartingPoint(saved.vocab, table, saved.weights, _with_usable_best(saved, run_dir))
    init_from = config.train.init_from
    if init_from != SCRATCH:
        other = load_for_inference(origin_folder(init_from))
        if differing := _differences(other.config, config, {"model": SHAPE}):
            raise CheckpointError(f"--init-from {init_from}: its model has another shape: {differing}; set these alike")
        return fine_tuning_start(other, config, corpus, init_from)
    if config.data.vocab == KEEP:
        raise CheckpointError("data.vocab keep is the vocabulary of a model; name it with --init-from, or use chars")
    return StartingPoint(corpus.vocab)


def _with_usable_best(saved: Checkpoint, run_dir: Path) -> Checkpoint:
    """The checkpoint; if best/ is missing or damaged, as one that has not been evaluated yet."""
    if saved.trainer["best_step"] < 0:
        return saved
    try:
        load(run_dir / BEST)
    except CheckpointError as error:
        logger.warning(
            "the best checkpoint cannot be used (%s); the best from step %d on replaces it", error, saved.step
        )
        not_evaluated = {"best_loss": None, "best_step": -1, "evaluated_step": -1}
        return replace(saved, trainer=saved.trainer | not_evaluated)
    return saved


def origin_folder(init_from: str) -> Path:
    """The folder that `train.init_from` names: that of the shipped base, or a run or checkpoint."""
    return base_folder() if init_from == BASE else expand_user(init_from)


def _check_same_run(saved: Checkpoint, config: RunConfig, corpus: Corpus, run_dir: Path) -> None:
    fixed = dict(_FIXED)
    if "init_from" in config.train.model_fields_set:  # need not be repeated to resume
        fixed["train"] += ("init_from",)
    if differing := _differences(saved.config, config, fixed):
        raise CheckpointError(
            f"{run_dir} holds a run with other settings: {differing}; set them as they were to resume it, or name "
            "another --run-dir"
        )
    with torch.device("meta"):  # shapes without memory
        expected = CharRNN(config.model, len(saved.vocab)).state_dict()
    if {k: v.shape for k, v in saved.weights.items()} != {k: v.shape for k, v in expected.items()}:
        raise CheckpointError(
            f"{run_dir} holds weights that do not match its config and vocabulary; name another --run-dir"
        )
    theirs = saved.trainer["corpus"]["sha256"]
    if theirs != corpus.sha256:
        raise CheckpointError(
            f"{run_dir} holds a run on another text: its corpus has SHA-256 {theirs[:12]}..., this one "
            f"{corpus.sha256[:12]}...; restore the text to resume, or name another --run-dir"
        )


def check_same_start(starts: Sequence[tuple[int, str]], run_dir: Path) -> None:
    """Check that all ranks resume the same step of the same text.

    Args:
        starts: Each rank's step and its corpus's SHA-256, in rank order.
        run_dir: For messages.

    Raises:
        CheckpointError: If the steps differ.
        CorpusError: If the texts differ.
    """
    first_step, first_digest = starts[0]
    for rank, (step, digest) in enumerate(starts):
        if digest != first_digest:
            raise CorpusError(
                f"corpus mismatch: rank {rank} has SHA-256 {digest[:12]}..., rank 0 {first_digest[:12]}...; give every "
                "machine the same --data"
            )
        if step != first_step:
            raise CheckpointError(
                f"rank {rank} finds step {step} in {run_dir}, rank 0 step {first_step}; put the run folder on a disk "
                "that all machines share, with --run-dir"
            )


def _differences(theirs: RunConfig, ours: RunConfig, names: dict[str, tuple[str, ...]]) -> str:
    clauses = []
    for section, keys in names.items():
        for key in keys:
            there, here = getattr(getattr(theirs, section), key), getattr(getattr(ours, section), key)
            if there != here:
                clauses.append(f"{section}.{key} is {_shown(there)} there and {_shown(here)} here")
    return ", ".join(clauses)


def _shown(value: object) -> object:
    """A value for a message: quoted where it would not be visible."""
    return repr(value) if isinstance(value, str) and not (value and value.isprintable()) else value


def identity_fields(corpus: Corpus) -> dict[str, Any]:
    """What a checkpoint records of its corpus."""
    return {"name": corpus.name, "source": corpus.source, "sha256": corpus.sha256, "num_chars": corpus.num_chars}
