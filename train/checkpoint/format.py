"""Checkpoints: folders of safetensors and JSON with a SHA-256 manifest, written atomically. Nothing is unpickled.

    RUN/step-00000500/  model, optimizer and state (.safetensors), trainer, config, vocab (.json), MANIFEST.json
    RUN/best/           the same without optimizer and state: what inference needs

A folder is written under a temporary name, fsynced and renamed, so that a folder under its final name is complete.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import Optimizer

from charrnn.config import ModelConfig, RunConfig
from charrnn.errors import CharRNNError, CheckpointError
from charrnn.io import os_errors
from charrnn.model.rnn import CharRNN, State
from charrnn.vocab import Vocab
from train.checkpoint.folders import BEST, MANIFEST, read_folder, recover, remove, step_folders, step_of, write_folder

logger = logging.getLogger(__name__)


Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run at one step.

    Attributes:
        config: The run's config.
        vocab: The model's vocabulary.
        weights: The model's state dict.
        trainer: JSON-able record: step, best loss, elapsed time, corpus, metrics.
        optimizer: `optimizer_tensors`; empty in best/, as are the next two.
        carried: The hidden state over the global batch, each part (L, B, H).
        rng: Each rank's random generator states.
    """

    config: RunConfig
    vocab: Vocab
    weights: Tensors
    trainer: dict[str, Any]
    optimizer: Tensors = field(default_factory=dict)
    carried: State = ()
    rng: tuple[Tensors, ...] = ()

    @property
    def step(self) -> int:
        """Steps made so far."""
        return int(self.trainer["step"])


def snapshot(checkpoint: Checkpoint) -> Checkpoint:
    """Copy a checkpoint to host memory, so that training can continue while it is written."""

    def copy(tensors: Mapping[str, Tensor]) -> Tensors:
        return {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}

    return replace(
        checkpoint,
        weights=copy(checkpoint.weights),
        optimizer=copy(checkpoint.optimizer),
        carried=tuple(part.detach().to("cpu", copy=True) for part in checkpoint.carried),
        rng=tuple(copy(states) for states in checkpoint.rng),
    )


def save_step(run_dir: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write RUN/step-XXXXXXXX, and only then remove all but the newest `keep`. Raises: CheckpointError."""
    folder = run_dir / f"step-{checkpoint.step:08d}"
    state = {f"carried.{i}": part for i, part in enumerate(checkpoint.carried)}
    state |= {f"rng.{rank}.{name}": t for rank, states in enumerate(checkpoint.rng) for name, t in states.items()}
    files = _inference_files(checkpoint)
    files["optimizer.safetensors"] = _pack(checkpoint.optimizer)
    files["state.safetensors"] = _pack(state)
    write_folder(folder, files)
    remedy = f"check the disk and its permissions, then rerun the same command to resume from {folder.name}"
    with os_errors(CheckpointError, f"cannot remove old checkpoints of {run_dir}", remedy):
        saved = step_folders(run_dir)
        # Counted from this one: a newer one is damaged or from another run, and must not displace usable ones.
        for old in saved[saved.index(folder) + keep :]:
            remove(old)
    return folder


def save_for_inference(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write what inference and fine-tuning need to `folder`, replacing it. Raises: CheckpointError."""
    write_folder(folder, _inference_files(checkpoint))
    return folder


def load_newest(run_dir: Path, check: Callable[[Checkpoint], None] = lambda checkpoint: None) -> Checkpoint | None:
    """Load the newest usable step checkpoint of a run. Unusable ones are skipped with a warning.

    Args:
        run_dir: The run's folder.
        check: Raises a CheckpointError for a checkpoint of another run.

    Returns:
        The checkpoint; None if the run has none.

    Raises:
        CheckpointError: If there are checkpoints, but none is usable.
    """
    folders, mismatch, skipped = step_folders(run_dir), None, []
    for folder in folders:
        try:
            checkpoint = _load_to_resume(folder)
        except CheckpointError as error:
            skipped.append(f"skipping a damaged checkpoint: {error}")
            continue
        try:
            check(checkpoint)
        except CheckpointError as error:
            mismatch = mismatch or error
            skipped.append(f"skipping {folder.name}, from another run: {error}")
            continue
        break
    else:
        checkpoint = None
    if mismatch and not checkpoint:
        raise mismatch
    for message in skipped:
        logger.warning(message)
    if folders and not checkpoint:
        raise CheckpointError(
            f"none of the {len(folders)} checkpoint(s) in {run_dir} is intact; restore one from a copy, or start over "
            "in another folder with --run-dir"
        )
    return checkpoint


def _load_to_resume(folder: Path) -> Checkpoint:
    """Read a step checkpoint. Raises a CheckpointError if it is damaged, or its content does not match its name."""
    checkpoint = load(folder)
    if not checkpoint.rng:
        raise CheckpointError(f"{folder} cannot be resumed from: it is a copy of a best/ folder")
    if checkpoint.step != step_of(folder):
        raise CheckpointError(f"{folder} holds step {checkpoint.step}: it was renamed")
    return checkpoint


def load(folder: Path) -> Checkpoint:
    """Read and verify one checkpoint folder. Raises a CheckpointError that names the file and its fault."""
    files = read_folder(folder)
    try:
        state = _unpack(files.get("state.safetensors"))
        ranks = 1 + max((int(name.split(".")[1]) for name in state if name.startswith("rng.")), default=-1)
        return Checkpoint(
            config=RunConfig.model_validate_json(files["config.json"]),
            vocab=Vocab.from_json(files["vocab.json"].decode()),
            weights=_unpack(files["model.safetensors"]),
            trainer=json.loads(files["trainer.json"]),
            optimizer=_unpack(files.get("optimizer.safetensors")),
            carried=tuple(state[f"carried.{i}"] for i in range(sum(name.startswith("carried.") for name in state))),
            rng=tuple(_with_prefix(state, f"rng.{rank}.") for rank in range(ranks)),
        )
    except (KeyError, ValueError, ValidationError, SafetensorError, CharRNNError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder} is complete but cannot be used by this version of charrnn: {reason}") from None


def load_for_inference(path: Path) -> Checkpoint:
    """Load the checkpoint at `path`: that folder, or the best/ of a run folder. Raises: CheckpointError."""
    if path.is_file():
        raise CheckpointError(f"{path} is a file; name the run folder it came from, or a checkpoint folder of it")
    if not path.is_dir():
        raise CheckpointError(f"no run or checkpoint folder {path}; a run prints its folder when it starts and ends")
    recover(path / BEST)
    if (path / BEST).is_dir():
        return load(path / BEST)
    if not (path / MANIFEST).exists():
        newest = step_folders(path)
        hint = f"; its newest checkpoint is {newest[0]}" if newest else ""
        raise CheckpointError(f"{path} is neither a checkpoint nor a run with a best/ folder{hint}")
    return load(path)


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> Tensors:
    """The optimizer's state as "parameter/entry" -> tensor."""
    return {
        f"{name}/{entry}": torch.as_tensor(value).detach()
        for name, parameter in model.named_parameters()
        for entry, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Restore an optimizer's state from `optimizer_tensors`, on each parameter's device."""
    parameters = dict(model.named_parameters())
    for key, tensor in tensors.items():
        name, entry = key.rsplit("/", 1)
        optimizer.state[parameters[name]][entry] = tensor.to(parameters[name].device, copy=True)


def _inference_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    return {
        "model.safetensors": _pack(checkpoint.weights),
        "trainer.json": json.dumps(checkpoint.trainer, indent=1).encode(),
        "config.json": checkpoint.config.model_dump_json(indent=1).encode(),
        "vocab.json": checkpoint.vocab.to_json().encode(),
    }


def _pack(tensors: Tensors) -> bytes:
    return safetensors.torch.save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})


def _unpack(content: bytes | None) -> Tensors:
    return safetensors.torch.load(content) if content else {}


def _with_prefix(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def weights_digest(checkpoint: Checkpoint) -> str:
    """SHA-256 of a checkpoint's weights."""
    return hashlib.sha256(_pack(checkpoint.weights)).hexdigest()


def network(config: ModelConfig, vocab: Vocab, weights: Tensors) -> CharRNN:
    """Return the network of that shape with these weights; with random ones if there are none."""
    model = CharRNN(config, len(vocab), vocab.document_end_id)
    if weights:
        model.load_state_dict(weights)
    return model


def model_of(checkpoint: Checkpoint) -> CharRNN:
    """Return the network with a checkpoint's weights."""
    return network(checkpoint.config.model, checkpoint.vocab, checkpoint.weights)
