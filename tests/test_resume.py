"""Which run may be resumed, and from what."""

import shutil

import pytest
from training import ListRecorder, make_trainer, tiny_config

from charrnn.data.corpus import prepare
from charrnn.errors import CheckpointError
from train.checkpoint.folders import BEST, step_folders
from train.checkpoint.format import load
from train.checkpoint.resume import starting_point


@pytest.fixture
def finished(tmp_path):
    make_trainer(tiny_config(tmp_path, ["sample.length=0"])).fit()
    return tmp_path


def resumed(folder, *assignments, resume=True):
    config = tiny_config(folder, ["sample.length=0", *assignments])
    return starting_point(config, prepare(config.data), folder / "run", resume=resume)


@pytest.mark.parametrize("origin", ["nowhere", "base", "elsewhere/run"])
def test_another_origin_than_the_runs_is_refused(finished, origin):
    with pytest.raises(CheckpointError, match=f"train.init_from is none there and {origin} here"):
        resumed(finished, f"train.init_from={origin}")


def test_an_origin_need_not_be_repeated_and_none_is_refused(tmp_path):
    make_trainer(tiny_config(tmp_path, ["train.run_dir=" + str(tmp_path / "origin")])).fit()
    origin = tmp_path / "origin"
    make_trainer(tiny_config(tmp_path), init_from=origin).fit()
    shutil.rmtree(origin)
    assert resumed(tmp_path).resumed
    assert resumed(tmp_path, f"train.init_from={origin}").resumed
    with pytest.raises(CheckpointError, match="origin there and none here"):
        resumed(tmp_path, "train.init_from=none")


@pytest.mark.parametrize(
    "change",
    ["eval.best_by=windows", "eval.window=64", "eval.sample=100", "eval.stream_lanes=2", "eval.stream_warmup=9"],
)
def test_a_change_of_what_is_best_is_refused(finished, change):
    with pytest.raises(CheckpointError, match=change.partition("=")[0]):
        resumed(finished, change)
    assert resumed(finished, "eval.batch_rows=2").resumed


@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_with_best_alone_is_not_overwritten(finished, resume):
    for folder in step_folders(finished / "run"):
        shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match=r"best.*another --run-dir"):
        resumed(finished, resume=resume)


@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_a_lost_best_is_made_again_from_the_step_checkpoint(finished, damage, caplog):
    best = finished / "run" / BEST
    if damage == "missing":
        shutil.rmtree(best)
    else:
        (best / "model.safetensors").write_bytes(b"damaged")
    assert resumed(finished).resumed.trainer["best_step"] == -1
    assert "best checkpoint cannot be used" in caplog.messages[-1]
    again = make_trainer(tiny_config(finished, ["sample.length=0"]), ListRecorder())
    again.fit()
    assert load(best).step == 12 == again.progress.best_step


def test_the_first_best_comes_with_a_step_checkpoint(tmp_path):
    trainer = make_trainer(tiny_config(tmp_path, ["eval.every=4", "checkpoint.every=100"]), ListRecorder(stop_at=6))
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert [folder.name for folder in step_folders(trainer.checkpoints.run_dir)] == ["step-00000004"]
    assert make_trainer(tiny_config(tmp_path)).progress.step == 4
