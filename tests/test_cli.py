"""Streams that fail, and errors of the system as lines for the user."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
from launches import ROOT, prepare_small_run

from charrnn.cli import ResilientStream
from charrnn.errors import user_error


class Full(io.StringIO):
    """A stream on a full disk."""

    writes = 0

    def write(self, text):
        self.writes += 1
        raise OSError(28, "No space left on device")


def test_after_a_failed_write_nothing_more_is_tried():
    full = Full()
    stream = ResilientStream(full)
    for _ in range(3):
        assert stream.write("text") == 4
        stream.flush()
    assert full.writes == 1
    closed = io.StringIO()
    closed.close()
    assert ResilientStream(closed).write("text") == 4
    assert ResilientStream(None).write("text") == 4


def test_a_stream_that_works_is_written_to():
    inner = io.StringIO()
    stream = ResilientStream(inner)
    print("text", file=stream, flush=True)
    assert inner.getvalue() == "text\n"
    assert not stream.isatty()


def test_errors_of_the_system_are_one_line():
    assert str(user_error(PermissionError(13, "Permission denied", "/x/y"))) == "/x/y: Permission denied"
    assert str(user_error(MemoryError())) == "out of memory"
    assert user_error(MemoryError()).exit_code == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux alone has /dev/full")
def test_training_outlives_a_full_disk_under_its_log(tmp_path):
    prepare_small_run(tmp_path)
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, str(ROOT / "train" / "main.py"), "--config", "small.yaml", "--data", "words.txt"],
            cwd=tmp_path, stderr=full, env={"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"}, timeout=120,
        )  # fmt: skip
    assert done.returncode == 0
    assert (tmp_path / "checkpoints" / "small-words" / "model.onnx").exists()
