"""Checkpoints: folders of safetensors and JSON with a manifest, written whole or not at all. Nothing is unpickled.

    RUN/step-00000500/  model, optimizer and state (.safetensors), trainer, config, vocab (.json), MANIFEST.json
    RUN/best/           the same without optimizer and state: what inference needs

A folder is written under a temporary name, fsynced and renamed, so that one that bears its name is complete.
"""

import hashlib
import json
import os
import re
import shutil
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

from charrnn.config import RunConfig
from charrnn.errors import CharRNNError, CheckpointError
from charrnn.model.rnn import State
from charrnn.vocab import Vocab

MANIFEST = "MANIFEST.json"
BEST = "best"
_TEMPORARY = ".writing-"
_REPLACED = ".replaced-"
_STEP_NAME = re.compile(r"step-(\d{8,})")

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """One moment of a run.

    weights: the model's state dict. trainer: JSON-able record (step, best loss, elapsed time, corpus, figures ...).
    optimizer: name -> tensor as `optimizer_tensors` makes it. carried: the hidden state over the global batch, each
    part (L, B, H), or (). rng: one dict of random generator states for each rank. The last three are empty in `best/`.
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
        """Updates made so far."""
        return int(self.trainer["step"])


def snapshot(checkpoint: Checkpoint) -> Checkpoint:
    """The same in host memory of its own, so that training can go on while it is written."""

    def copied(tensors: Mapping[str, Tensor]) -> Tensors:
        return {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}

    return replace(
        checkpoint,
        weights=copied(checkpoint.weights),
        optimizer=copied(checkpoint.optimizer),
        carried=tuple(part.detach().to("cpu", copy=True) for part in checkpoint.carried),
        rng=tuple(copied(states) for states in checkpoint.rng),
    )


def save_step(run_dir: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Writes RUN/step-XXXXXXXX, and only then removes all but the newest `keep`. Raises: CheckpointError."""
    folder = run_dir / f"step-{checkpoint.step:08d}"
    state = {f"carried.{i}": part for i, part in enumerate(checkpoint.carried)}
    state |= {f"rng.{rank}.{name}": t for rank, states in enumerate(checkpoint.rng) for name, t in states.items()}
    files = _inference_files(checkpoint)
    files["optimizer.safetensors"] = _pack(checkpoint.optimizer)
    files["state.safetensors"] = _pack(state)
    _write_folder(folder, files)
    try:
        saved = step_folders(run_dir)
        # Counted from this one: a newer one is damaged or another run's, and must not outlast those that can be used.
        for old in saved[saved.index(folder) + keep :]:
            _remove(old)
    except OSError as error:
        raise CheckpointError(
            f"cannot remove old checkpoints of {run_dir}: {error.strerror}; mend that disk or its permissions, then "
            f"run the same command again, which goes on from {folder.name}"
        ) from None
    return folder


def save_best(run_dir: Path, checkpoint: Checkpoint) -> Path:
    """Writes RUN/best, replacing the one before. Raises: CheckpointError."""
    return save_for_inference(run_dir / BEST, checkpoint)


def save_for_inference(folder: Path, checkpoint: Checkpoint) -> Path:
    """Writes what inference and fine-tuning need to `folder`, replacing it. Raises: CheckpointError."""
    _write_folder(folder, _inference_files(checkpoint))
    return folder


def remove_unfinished(run_dir: Path) -> None:
    """Deletes what writers that were killed left behind. No other process may be writing there.

    Raises: CheckpointError when the folder refuses.
    """
    try:
        _recover(run_dir / BEST)
        for leftover in [*run_dir.glob(f"{_TEMPORARY}*"), *run_dir.glob(f"{_REPLACED}*")]:
            shutil.rmtree(leftover)
    except OSError as error:
        raise CheckpointError(
            f"cannot tidy run folder {run_dir}: {error.filename}: {error.strerror}; mend its permissions, or choose "
            "another --run-dir"
        ) from None


def step_of(folder: Path) -> int:
    """The step that a step checkpoint's name tells."""
    return int(folder.name.removeprefix("step-"))


def step_folders(run_dir: Path) -> list[Path]:
    """The run's step checkpoints, newest first, whole or not."""
    folders = [p for p in run_dir.glob("step-*") if _STEP_NAME.fullmatch(p.name)]
    return sorted(folders, key=step_of, reverse=True)


def load_newest(
    run_dir: Path, warn: Callable[[str], None], accept: Callable[[Checkpoint], None] = lambda checkpoint: None
) -> Checkpoint | None:
    """The newest whole step checkpoint of a run that `accept` does not refuse; None when it has none at all.

    Each that is passed over is told to `warn`. accept: raises CheckpointError for one of another run.

    Raises: CheckpointError when there are some, and none can be used.
    """
    found: Checkpoint | None = None
    refusals: list[CheckpointError] = []
    passed_over: list[str] = []
    folders = step_folders(run_dir)
    for folder in folders:
        try:
            checkpoint = _load_to_resume(folder)
        except CheckpointError as error:
            passed_over.append(f"passing over a damaged checkpoint: {error}")
            continue
        try:
            accept(checkpoint)
        except CheckpointError as error:
            refusals.append(error)
            passed_over.append(f"passing over {folder.name}, of another run: {error}")
            continue
        found = checkpoint
        break
    if refusals and not found:
        raise refusals[0]
    for line in passed_over:
        warn(line)
    if folders and not found:
        raise CheckpointError(
            f"none of the {len(folders)} checkpoint(s) in {run_dir} is whole; restore one from a copy, "
            "or start over in another folder with --run-dir"
        )
    return found


def _load_to_resume(folder: Path) -> Checkpoint:
    """Reads a step checkpoint. Raises: CheckpointError when it is damaged, or not what its name says."""
    checkpoint = load(folder)
    if not checkpoint.rng:
        raise CheckpointError(f"{folder} lacks what resuming needs: it is a copy of a best/ folder")
    if checkpoint.step != step_of(folder):
        raise CheckpointError(f"{folder} holds step {checkpoint.step}: it was renamed")
    return checkpoint


def load(folder: Path) -> Checkpoint:
    """Reads and verifies one checkpoint folder. Raises: CheckpointError that says which file is wrong and how."""
    files = _read_folder(folder)
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
        raise CheckpointError(f"{folder} is whole but cannot be used by this version of charrnn: {reason}") from None


def load_for_inference(path: Path) -> Checkpoint:
    """The checkpoint at `path`, which may be a run folder (its best/ is taken) or a checkpoint folder itself."""
    if path.is_file():
        raise CheckpointError(f"{path} is a file; name the run folder it came from, or a checkpoint folder of it")
    if not path.is_dir():
        raise CheckpointError(f"no run or checkpoint folder {path}; a run's is printed when it starts and ends")
    _recover(path / BEST)
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
    """Puts back what `optimizer_tensors` took, on each parameter's device."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    packed = optimizer.state_dict()
    order = [p for group in optimizer.param_groups for p in group["params"]]
    entries: dict[str, Tensors] = {}
    for key, tensor in tensors.items():
        name, entry = key.rsplit("/", 1)
        entries.setdefault(name, {})[entry] = tensor
    state = {i: entries[names[p]] for i, p in enumerate(order) if names[p] in entries}
    optimizer.load_state_dict({"state": state, "param_groups": packed["param_groups"]})


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


def _write_folder(folder: Path, files: dict[str, bytes]) -> None:
    """All of `files` and their manifest appear under `folder` at once, or not at all."""
    temporary = folder.with_name(f"{_TEMPORARY}{folder.name}")
    manifest = {n: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in files.items()}
    try:
        _remove(temporary)
        temporary.mkdir(parents=True)
        for name, content in {**files, MANIFEST: json.dumps(manifest, indent=1).encode()}.items():
            with (temporary / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        _sync_folder(temporary)
        _replace(temporary, folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"cannot write checkpoint {folder}: {error.strerror}; free space or permissions on the disk that holds "
            f"{folder.parent.resolve()}, then run the same command again: the checkpoint before this one is untouched"
        ) from None


def _replace(temporary: Path, folder: Path) -> None:
    """Renames `temporary` to `folder`. A folder that is in the way steps aside first, for `_recover` to find."""
    aside = folder.with_name(f"{_REPLACED}{folder.name}")
    if folder.exists():
        _remove(aside)
        folder.rename(aside)
    temporary.rename(folder)
    _sync_folder(folder.parent)
    _remove(aside)


def _recover(folder: Path) -> None:
    """Undoes a replacement that was cut off between its two renames."""
    aside = folder.with_name(f"{_REPLACED}{folder.name}")
    if aside.is_dir() and not folder.exists():
        aside.rename(folder)


def _remove(folder: Path) -> None:
    """Deletes a folder; the manifest goes first, so that half a deletion is not taken for a checkpoint."""
    if folder.exists():
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)


def _sync_folder(folder: Path) -> None:
    """Makes the folder's entries durable. Windows can't open a folder, and needs no such call."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_folder(folder: Path) -> dict[str, bytes]:
    """The folder's files, each checked against the manifest."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        entries = {n: (e["bytes"], e["sha256"]) for n, e in manifest.items()}
        if not all(isinstance(size, int) for size, _ in entries.values()):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{folder} has no readable {MANIFEST}") from None
    files: dict[str, bytes] = {}
    for name, (size, digest) in entries.items():
        try:
            content = (folder / name).read_bytes()
        except OSError as error:
            raise CheckpointError(f"{folder / name}: {error.strerror}") from None
        if len(content) != size:
            raise CheckpointError(f"{folder / name} has {len(content)} bytes, its manifest says {size}")
        if hashlib.sha256(content).hexdigest() != digest:
            raise CheckpointError(f"{folder / name} does not match its manifest's SHA-256: its content changed")
        files[name] = content
    return files
