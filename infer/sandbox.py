"""Subprocesses: Python without the current folder on its path, and a sandbox in which a model file is tried."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from charrnn.errors import CharRNNError, ModelFileError

_ROOT = Path(__file__).resolve().parent.parent
# A model of 1 GB is loaded and tried in some seconds.
_WALL_S, _CPU_S = 60, 60
# What Python and onnxruntime take of address space, and what model_file/session.py lets a model take.
_ADDRESS_BYTES, _ADDRESS_PER_FILE_BYTE = 6 << 30, 12


def python(arguments: list[str], timeout: float | None = None) -> subprocess.CompletedProcess[bytes]:
    """Run this Python with charrnn on its path, and without the current folder, whose files could pass for modules."""
    command = [sys.executable, "-P", *arguments]
    return subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=timeout, env=environment())


def environment() -> dict[str, str]:
    """Return this process's environment with charrnn on PYTHONPATH, without empty entries: the current folder."""
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(_ROOT), *filter(None, entries)])}


def try_file(path: Path) -> None:
    """Open an untrusted model file in a process with limited resources, and generate some characters.

    Raises: ModelFileError when the file is refused, or ends that process or keeps it for too long.
    """
    try:
        done = python(["-m", "infer.sandbox", str(path)], _WALL_S)
    except subprocess.TimeoutExpired:
        raise ModelFileError(f"{path} is not opened: trying it was not done in {_WALL_S} s") from None
    if done.returncode == CharRNNError.exit_code:
        raise ModelFileError(done.stdout.decode(errors="replace").strip())
    if done.returncode:
        code = done.returncode
        reason = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        raise ModelFileError(f"{path} is not opened: it ended the process that tried it ({reason})")


def _limit_this_process(path: Path) -> None:
    """Limit memory and processor time where the system can, and write no core dump."""
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
