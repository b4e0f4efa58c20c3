"""Subprocesses: Python without the current folder on sys.path, and a sandbox that loads untrusted model files."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from charrnn.errors import CharRNNError, ModelFileError

_ROOT = Path(__file__).resolve().parent.parent
# Timeouts in seconds of wall-clock and CPU time; a model of 1 GB loads in less than 10.
_WALL_S, _CPU_S = 60, 60
# Address space of Python and onnxruntime, and per byte of the model file (see model_file/session.py).
_ADDRESS_BYTES, _ADDRESS_PER_FILE_BYTE = 6 << 30, 12


def python(arguments: list[str], timeout: float | None = None) -> subprocess.CompletedProcess[bytes]:
    """Run this Python with charrnn on sys.path, but not the current folder, whose files could shadow modules."""
    command = [sys.executable, "-P", *arguments]
    return subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=timeout, env=environment())


def environment() -> dict[str, str]:
    """Return this process's environment with charrnn on PYTHONPATH; empty entries, the current folder, removed."""
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(_ROOT), *filter(None, entries)])}


def try_file(path: Path) -> None:
    """Load an untrusted model file in a subprocess with resource limits, and generate a few characters.

    Raises:
        ModelFileError: if the file is invalid, crashes the subprocess or times out.
    """
    try:
        done = python(["-m", "infer.sandbox", str(path)], _WALL_S)
    except subprocess.TimeoutExpired:
        raise ModelFileError(f"{path} is not opened: loading it in a subprocess timed out after {_WALL_S} s") from None
    if done.returncode == CharRNNError.exit_code:
        raise ModelFileError(done.stdout.decode(errors="replace").strip())
    if done.returncode:
        code = done.returncode
        reason = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        raise ModelFileError(f"{path} is not opened: it crashed the subprocess that loaded it ({reason})")


def _limit_this_process(path: Path) -> None:
    """Set rlimits for memory, CPU time, core dumps and file sizes; Windows has none."""
    try:
        import resource
    except ImportError:
        return
    size = path.stat().st_size if path.is_file() else 0
    most = _ADDRESS_BYTES + _ADDRESS_PER_FILE_BYTE * size
    for kind, limit in (
        (resource.RLIMIT_AS, most),
        (resource.RLIMIT_CPU, _CPU_S),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        lowest = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (lowest, lowest))


def main() -> int:
    """Entry of `python -m infer.sandbox FILE`."""
    path = Path(sys.argv[1])
    _limit_this_process(path)
    from infer.engine import Engine

    try:
        engine = Engine(path, threads=1)
        for num_samples in (1, 2):
            engine.generate_batch("", num_samples, length=8, seed=1)
    except CharRNNError as error:
        sys.stdout.buffer.write(str(error).encode(errors="backslashreplace"))
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
