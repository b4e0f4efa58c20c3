"""Two CPU processes are one run: the same windows, the same losses, the same evaluation, one record."""

import pytest
from launches import logged, prepare_small_run, train_small


@pytest.mark.slow
@pytest.mark.parametrize("windows", ["sliding", "carry"])
def test_the_curve_does_not_depend_on_processes(tmp_path, windows):
    prepare_small_run(tmp_path)
    settings = ["--set", f"data.windows={windows}"]
    one = train_small(tmp_path, 1, "--run-dir", "one", *settings)
    two = train_small(tmp_path, 2, "--run-dir", "two", *settings)
    assert "1 process(es) x 1" in one
    assert "2 process(es) x 1" in two
    for name in ("train/loss", "train/grad_norm", "val/stream/loss", "val/windows/loss"):
        curve = logged(tmp_path / "one", name)
        assert len(curve) == (12 if name.startswith("train") else 2)
        assert logged(tmp_path / "two", name) == pytest.approx(curve, rel=1e-5)

    longer = train_small(tmp_path, 1, "--run-dir", "one", "--max-steps", "16", *settings)
    fewer = train_small(tmp_path, 1, "--run-dir", "two", "--max-steps", "16", *settings)
    assert "resumed at step 12" in longer
    assert "2 process(es) before, 1 now" in fewer
    curve = logged(tmp_path / "one", "train/loss")
    assert sorted(curve) == list(range(1, 17))
    assert logged(tmp_path / "two", "train/loss") == pytest.approx(curve, rel=1e-5)
