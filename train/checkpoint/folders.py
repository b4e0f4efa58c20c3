"""Checkpoint folders on disk: written atomically with a manifest, verified when read, removed safely."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

from charrnn.errors import CheckpointError
from charrnn.io import os_errors

BEST = "best"
MANIFEST = "MANIFEST.json"
_TEMPORARY = ".writing-"
_REPLACED = ".replaced-"
_STEP_NAME = re.compile(r"step-(\d{8,})")
_TRAIN = Path(__file__).resolve().parents[1]
# In a checkout, and in an installed package.
BASE_FOLDERS = (_TRAIN.parent / "checkpoints" / "base", _TRAIN / "models" / "base")


def step_of(folder: Path) -> int:
    """The step in a step checkpoint's name."""
    return int(folder.name.removeprefix("step-"))


def step_folders(run_dir: Path) -> list[Path]:
    """The run's step checkpoints, newest first, complete or not."""
    folders = [p for p in run_dir.glob("step-*") if _STEP_NAME.fullmatch(p.name)]
    return sorted(folders, key=step_of, reverse=True)


def remove_unfinished(run_dir: Path) -> None:
    """Delete what killed processes left behind. No other process may be writing there. Raises: CheckpointError."""
    remedy = "check its permissions, or choose another --run-dir"
    with os_errors(CheckpointError, f"cannot clean up run folder {run_dir}", remedy):
        recover(run_dir / BEST)
        for leftover in [*run_dir.glob(f"{_TEMPORARY}*"), *run_dir.glob(f"{_REPLACED}*")]:
            shutil.rmtree(leftover)


def write_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Write `files` and their manifest to `folder` atomically."""
    temporary = folder.with_name(f"{_TEMPORARY}{folder.name}")
    manifest = {n: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in files.items()}
    remedy = (
        f"free space or permissions on the disk that holds {folder.parent.resolve()}, then rerun the same command: the "
        "previous checkpoint is intact"
    )
    with os_errors(CheckpointError, f"cannot write checkpoint {folder}", remedy):
        try:
            remove(temporary)
            temporary.mkdir(parents=True)
            for name, content in {**files, MANIFEST: json.dumps(manifest, indent=1).encode()}.items():
                with (temporary / name).open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            _sync_folder(temporary)
            _replace(temporary, folder)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _replace(temporary: Path, folder: Path) -> None:
    """Rename `temporary` to `folder`. An existing folder is first renamed to a name that `recover` knows."""
    aside = folder.with_name(f"{_REPLACED}{folder.name}")
    if folder.exists():
        remove(aside)
        folder.rename(aside)
    temporary.rename(folder)
    _sync_folder(folder.parent)
    remove(aside)


def recover(folder: Path) -> None:
    """Undo a replacement that was interrupted between its two renames."""
    aside = folder.with_name(f"{_REPLACED}{folder.name}")
    if aside.is_dir() and not folder.exists():
        aside.rename(folder)


def remove(folder: Path) -> None:
    """Delete a folder, its manifest first, so that a partial deletion is not taken for a checkpoint."""
    if folder.exists():
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)


def _sync_folder(folder: Path) -> None:
    """Make the folder's entries durable. Windows cannot open a folder, and needs no such call."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_folder(folder: Path) -> dict[str, bytes]:
    """Read the folder's files, and check each against the manifest."""
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


def base_folder() -> Path:
    """The folder of the shipped base model. Raises a CheckpointError if it is missing."""
    for folder in BASE_FOLDERS:
        if folder.is_dir():
            return folder
    raise CheckpointError(
        "this installation has no base model: checkpoints/base is missing; restore that folder, or use --init-from none"
    )
