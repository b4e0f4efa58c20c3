"""What infer serve makes of every fault of benchmarks.reliability.serve, in small numbers."""

import re

import pytest
from launches import python
from tiny_models import write_model


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_fault_is_survived(tmp_path):
    model = write_model(tmp_path / "tiny.onnx", precision="int8")
    done = python("-m", "benchmarks.reliability.serve", "--model", model, "--scale", "0.05", "--soak", "20")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"^\| (.+) \|$", done.stdout, re.M)[1:]
    assert len(rows) == 9 + 1 + 5  # faults, and a fifth of the soak each under a head
    _, first, *_, last = (int(size) for size in re.findall(r"^\|[^|]+\| \d+ to (\d+) \|", done.stdout, re.M))
    assert last < first + 16
