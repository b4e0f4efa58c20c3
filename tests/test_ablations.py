"""benchmarks/quality/ablations.py: a variant differs from the base in what it names, and the table says by how much."""

import re

import pytest
from training import some_text
from typer.testing import CliRunner

from benchmarks.common import cli
from benchmarks.quality import ablations
from charrnn.config import load_config

CONFIG = """
data: {batch_size: 4, seq_len: 16}
model: {embedding_dim: 8, hidden_dim: 16, num_layers: 1}
eval: {stream_lanes: 2, stream_warmup: 32}
"""


@pytest.fixture
def base(tmp_path):
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    (tmp_path / "words.txt").write_text(some_text())
    return ablations.Base(tmp_path / "tiny.yaml", str(tmp_path / "words.txt"), 1, 1)


def test_a_variant_is_the_base_but_for_what_it_names(base):
    variant = ablations.Variant.parse("wide:model.hidden_dim=32 optim.lr=0.01")
    assert variant.name == "wide"
    plain, changed = (
        load_config(base.config, {}, base.assignments(v, 7)) for v in (ablations.Variant("base"), variant)
    )
    assert (plain.train.max_steps, plain.train.threads, plain.data.source) == (7, 1, base.data)
    assert (changed.model.hidden_dim, changed.optim.lr) == (32, 0.01)
    as_base = changed.model_copy(update={"model": plain.model, "optim": plain.optim})
    assert as_base == plain


def test_a_row_shows_the_differences_from_the_base():
    def metrics(windows, stream):
        return {"val/windows/loss": windows, "val/stream/loss": stream}

    first = metrics(1.5, 1.4)
    row = ablations.row("wide", 1.25, metrics(1.45, 1.41), first, metrics(1.52, 1.4))
    assert row == "| wide | 1.25 | 1.4500 (-0.0500) | 1.4100 (+0.0100) | 1.5200 (+0.0200) | 1.4000 (+0.0000) |"


@pytest.mark.slow
def test_a_costlier_variant_has_a_second_run_of_equal_time(base):
    options = ["--config", str(base.config), "--data", base.data, "--steps", "6", "--threads", "1", "--rounds", "3"]
    ran = CliRunner().invoke(cli(ablations.main), [*options, "--vary", "large:model.hidden_dim=512 model.num_layers=2"])
    assert ran.exit_code == 0, ran.output
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) \(.*\) \| .* \| ([\d.]+) \(.*\) \| .* \|$", ran.output, re.M)
    assert [name for name, *_ in rows] == ["base", "large"]
    (_, one, *same), (_, cost, equal_steps, equal_time) = rows
    assert float(one) == 1
    assert len(set(same)) == 1
    assert float(cost) > 1.5
    assert equal_steps != equal_time  # fewer steps in the same time
