"""benchmarks/quality/ablations.py: a variant differs from the base in what it names, and the table says by how much."""

import re

import pytest
from training import some_text
from typer.testing import CliRunner

from benchmarks.common import cli
from benchmarks.quality import ablations

CONFIG = """
data: {batch_size: 4, seq_len: 16}
model: {embedding_dim: 8, hidden_dim: 16, num_layers: 1}
eval: {stream_lanes: 2, stream_warmup: 32}
"""
LARGE = "large:model.hidden_dim=512 model.num_layers=2"


def test_a_row_shows_the_differences_from_the_base():
    def metrics(windows, stream):
        return {"val/windows/loss": windows, "val/stream/loss": stream}

    first = metrics(1.5, 1.4)
    row = ablations.row("wide", 1.25, metrics(1.45, 1.41), first, metrics(1.52, 1.4))
    assert row == "| wide | 1.25 | 1.4500 (-0.0500) | 1.4100 (+0.0100) | 1.5200 (+0.0200) | 1.4000 (+0.0000) |"


def test_a_variant_is_a_name_and_what_it_changes():
    assert ablations.parse(LARGE) == ("large", {"model.hidden_dim": "512", "model.num_layers": "2"})


@pytest.mark.slow
def test_a_costlier_variant_has_a_second_run_of_equal_time(tmp_path):
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    (tmp_path / "words.txt").write_text(some_text())
    options = ["--config", str(tmp_path / "tiny.yaml"), "--data", str(tmp_path / "words.txt"), "--steps", "6"]
    options += ["--threads", "1", "--rounds", "3", "--vary", "same:train.seed=1", "--vary", LARGE]
    ran = CliRunner().invoke(cli(ablations.main), options)
    assert ran.exit_code == 0, ran.output
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) \(.*\) \| .* \| ([\d.]+) \(.*\) \| .* \|$", ran.output, re.M)
    assert [name for name, *_ in rows] == ["base", "same", "large"]
    base, same, (_, cost, equal_steps, equal_time) = rows
    assert float(base[1]) == 1
    assert base[2] == base[3] == same[2]  # as the base but for what it names
    assert float(cost) > 1.5
    assert equal_steps != equal_time  # fewer steps in the same time
