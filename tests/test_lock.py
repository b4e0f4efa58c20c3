"""One run at a time in a run folder: the second is told who holds it, and the dead hold nothing."""

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from folders import names_in

from charrnn.errors import CheckpointError
from train.checkpoint.run_lock import exclusive

ROOT = Path(__file__).parent.parent
PROGRAM = """
import sys
from pathlib import Path
from train.checkpoint.run_lock import exclusive

with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def another_process_in(run_dir):
    """A process that holds `run_dir` until its input is closed."""
    holder = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(run_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        assert holder.stdout.readline() == "held\n"
        yield holder
    finally:
        holder.kill()
        holder.communicate()


def test_a_second_run_is_refused_with_the_holder(tmp_path):
    with another_process_in(tmp_path / "run") as holder:
        with (
            pytest.raises(
                CheckpointError,
                match=rf"^another run trains in {tmp_path}/run \(process {holder.pid} on {socket.gethostname()}, since "
                r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\); stop that one, or name another --run-dir$",
            ),
            exclusive(tmp_path / "run"),
        ):
            pytest.fail("both are in")
        assert names_in(tmp_path / "run") == [".lock", ".lock.json"]
        with pytest.raises(CheckpointError, match=f"process {holder.pid} on"), exclusive(tmp_path / "run"):
            pytest.fail("a refused run took the lock away")


def test_another_name_of_the_folder_is_the_same_folder(tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    with another_process_in(tmp_path / "run"):
        for name in ("link", "run/../run"):
            with pytest.raises(CheckpointError, match="another run trains"), exclusive(Path(name)):
                pytest.fail("both are in")
        with exclusive(Path("run2")):
            assert Path("run2", ".lock.json").exists()


def test_the_lock_of_a_killed_process_is_released(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    with another_process_in(tmp_path) as holder:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert json.loads((tmp_path / ".lock.json").read_text())["process"] == holder.pid  # nothing was tidied up
        with exclusive(tmp_path):
            assert json.loads((tmp_path / ".lock.json").read_text())["process"] == os.getpid()
    assert names_in(tmp_path) == [".lock", "metrics.jsonl"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff"])
def test_an_unreadable_holder_is_not_named(tmp_path, content):
    with another_process_in(tmp_path):
        (tmp_path / ".lock.json").write_bytes(content)
        with (
            pytest.raises(CheckpointError, match=rf"^another run trains in {tmp_path}; stop that one"),
            exclusive(tmp_path),
        ):
            pytest.fail("both are in")


def test_an_empty_folder_is_removed_with_its_new_parents(tmp_path):
    with exclusive(tmp_path / "a" / "b" / "run"):
        assert names_in(tmp_path / "a" / "b" / "run") == [".lock", ".lock.json"]
    assert names_in(tmp_path) == []
    with pytest.raises(ZeroDivisionError), exclusive(tmp_path / "run"):
        raise ZeroDivisionError
    assert names_in(tmp_path) == []


def test_what_was_there_before_or_was_left_stays(tmp_path):
    (tmp_path / "before").mkdir()
    with exclusive(tmp_path / "before"), exclusive(tmp_path / "runs" / "one"), exclusive(tmp_path / "run"):
        (tmp_path / "runs" / "notes.txt").touch()
        (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    assert names_in(tmp_path / "before") == []
    assert names_in(tmp_path / "runs") == ["notes.txt"]
    assert names_in(tmp_path / "run") == [".lock", "metrics.jsonl"]


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for run_dir in (tmp_path / "file", tmp_path / "file" / "run"):
        with (
            pytest.raises(CheckpointError, match=rf"^cannot write to run folder {run_dir}: .*choose another --run-dir"),
            exclusive(run_dir),
        ):
            pytest.fail("it was made")


@pytest.mark.parametrize("code", ["ENOSYS", "EOPNOTSUPP", "ENOLCK"])
def test_a_disk_without_file_locks_is_a_warning(tmp_path, monkeypatch, capsys, code):
    def without(*_):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    monkeypatch.setattr(fcntl, "flock", without)
    with exclusive(tmp_path / "run"):
        (tmp_path / "run" / "metrics.jsonl").touch()
    run_dir = tmp_path / "run"
    warning = f"warning: the disk of {run_dir} has no file locks: make sure that no other run trains there\n"
    assert capsys.readouterr().err == warning
    assert "metrics.jsonl" in names_in(run_dir)
