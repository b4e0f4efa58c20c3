"""Checkpoints: whole or not there, never trusted unread."""

import json
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from folders import names_in
from hypothesis import given, settings
from hypothesis import strategies as st
from training import logged, make_trainer, some_text, tiny_config

from charrnn.config import ModelConfig, RunConfig
from charrnn.data.corpus import prepare
from charrnn.errors import CheckpointError
from charrnn.model.rnn import CharRNN
from charrnn.vocab import Vocab
from train.checkpoint.folders import MANIFEST, step_folders
from train.checkpoint.format import (
    Checkpoint,
    load,
    load_for_inference,
    load_newest,
    optimizer_tensors,
    save_for_inference,
    save_step,
)
from train.checkpoint.resume import starting_point
from train.loop.optimizer import make_optimizer

CONFIG = RunConfig(model=ModelConfig(embedding_dim=4, hidden_dim=6, num_layers=2))
VOCAB = Vocab.of_chars("abc\n")


def make(step):
    """A checkpoint that can be resumed from."""
    model = CharRNN(CONFIG.model, len(VOCAB))
    moments = optimizer_tensors(model, make_optimizer(model, CONFIG.optim))
    rng = {"cpu": torch.get_rng_state()}
    return Checkpoint(CONFIG, VOCAB, model.state_dict(), {"step": step}, moments, model.zero_state(3), (rng,))


def same_tensors(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_only_the_newest_are_kept_and_the_newest_is_found(tmp_path):
    assert load_newest(tmp_path) is None
    for step in (5, 90, 100, 1000):
        save_step(tmp_path, make(step), keep=2)
    assert [p.name for p in step_folders(tmp_path)] == ["step-00001000", "step-00000100"]
    assert load_newest(tmp_path).step == 1000


def test_an_interrupted_replacement_of_best_is_undone(tmp_path):
    folder = save_for_inference(tmp_path / "best", make(1))
    assert names_in(folder) == [MANIFEST, "config.json", "model.safetensors", "trainer.json", "vocab.json"]
    save_for_inference(folder, make(2))
    assert load_for_inference(tmp_path).step == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best"]
    (tmp_path / "best").rename(tmp_path / ".replaced-best")
    assert load_for_inference(tmp_path).step == 2


def test_a_path_that_is_no_run_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(CheckpointError, match="no run or checkpoint folder"):
        load_for_inference(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run"):
        load_for_inference(tmp_path)


def test_an_interrupted_write_leaves_no_checkpoint(tmp_path, monkeypatch):
    save_step(tmp_path, make(1), keep=2)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            save_step(tmp_path, make(2), keep=2)
    assert [p.name for p in step_folders(tmp_path)] == ["step-00000001"]
    save_step(tmp_path, make(2), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_a_checkpoint_is_never_unpickled(tmp_path):
    """A pickle in a tensor file's place, with a manifest that vouches for it, is refused and not run."""
    folder = save_step(tmp_path, make(1), keep=2)
    bait = tmp_path / "ran"
    code = (
        "import hashlib, json, pickle, sys, pathlib\n"
        "folder, bait = map(pathlib.Path, sys.argv[1:])\n"
        "class Bomb:\n"
        "    def __reduce__(self): return (bait.write_text, ('x',))\n"
        "content = pickle.dumps(Bomb())\n"
        "(folder / 'model.safetensors').write_bytes(content)\n"
        "manifest = json.loads((folder / 'MANIFEST.json').read_text())\n"
        "manifest['model.safetensors'] = {'bytes': len(content), 'sha256': hashlib.sha256(content).hexdigest()}\n"
        "(folder / 'MANIFEST.json').write_text(json.dumps(manifest))\n"
    )
    subprocess.run([sys.executable, "-c", code, str(folder), str(bait)], check=True)
    assert json.loads((folder / MANIFEST).read_text())["model.safetensors"]
    with pytest.raises(CheckpointError, match="cannot be used"):
        load(folder)
    assert not bait.exists()


FILES = [
    *("config.json", "model.safetensors", "optimizer.safetensors", "state.safetensors", "trainer.json", "vocab.json"),
    MANIFEST,
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 12 steps, with checkpoints of steps 10 and 12."""
    trainer = make_trainer(tiny_config(tmp_path_factory.mktemp("trained"), ["data.windows=carry"]))
    trainer.fit()
    assert [folder.name for folder in step_folders(trainer.checkpoints.run_dir)] == ["step-00000012", "step-00000010"]
    assert sorted(names_in(trainer.checkpoints.run_dir / "step-00000012")) == sorted(FILES)
    return trainer


@pytest.fixture
def run_dir(trained, tmp_path):
    """A copy of that run's folder, to be spoilt."""
    return shutil.copytree(trained.checkpoints.run_dir, tmp_path / "run")


def start_of(trained, run_dir):
    """Where the run resumes, and the warnings about skipped checkpoints."""
    with logged() as warnings:
        start = starting_point(trained.config, trained.data.corpus, run_dir, resume=True)
    return start, warnings


def assert_skipped(trained, run_dir, *parts, newest="step-00000012", older=10):
    """One warning names `newest`, with all of `parts`, and the run resumes from step `older`."""
    start, warnings = start_of(trained, run_dir)
    assert start.resumed.step == older
    (line,) = warnings
    assert line.startswith("skipping ")
    for part in (newest, *parts):
        assert part in line
    assert "\n" not in line


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"\0")


def remove(path):
    path.unlink()


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


FAULTS = {
    truncate: "bytes, its manifest says",
    lengthen: "bytes, its manifest says",
    remove: "No such file",
    replace_by_folder: "Is a directory",
}


@pytest.mark.parametrize("damage", FAULTS)
@pytest.mark.parametrize("name", FILES)
def test_any_damaged_file_is_found_and_the_run_resumes_before_it(trained, run_dir, name, damage):
    damage(run_dir / "step-00000012" / name)
    assert_skipped(trained, run_dir, name, "no readable" if name == MANIFEST else FAULTS[damage])


@settings(max_examples=90)
@given(
    name=st.sampled_from(FILES),
    where=st.floats(0, 1, exclude_max=True),
    mask=st.one_of(st.just(0), st.integers(1, 255)),
)
def test_a_changed_byte_or_a_cut_is_found_wherever_it_is(trained, name, where, mask):
    """mask: 0 cuts the file there. In the manifest's white space a byte may change nothing; then nothing is lost."""
    path = trained.checkpoints.run_dir / "step-00000012" / name
    content = path.read_bytes()
    place, unchanged = int(where * len(content)), False
    spoilt = bytearray(content)
    spoilt[place] ^= mask
    path.write_bytes(spoilt if mask else content[:place])
    try:
        with suppress(ValueError):
            unchanged = mask and name == MANIFEST and json.loads(spoilt) == json.loads(content)
        if unchanged:
            assert start_of(trained, trained.checkpoints.run_dir)[0].resumed.step == 12
        else:
            assert_skipped(trained, trained.checkpoints.run_dir, *([] if mask else [name]))
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"null", b"\xff", b"{}", b'{"model.safetensors": 3}', b'{"model.safetensors": {"bytes": 3}}',
     b'{"model.safetensors": {"bytes": 1e3, "sha256": ""}}'],
)  # fmt: skip
def test_any_damaged_manifest_is_found(trained, run_dir, content):
    (run_dir / "step-00000012" / MANIFEST).write_bytes(content)
    assert_skipped(trained, run_dir)
    shutil.copytree(run_dir / "best", run_dir / "step-00000014")  # nor is a copy of best/ resumed from
    assert [re.search(r"step-\d+", line)[0] for line in start_of(trained, run_dir)[1]] == [
        "step-00000014",
        "step-00000012",
    ]


def test_resuming_an_older_checkpoint_gives_the_same_weights(trained, run_dir):
    truncate(run_dir / "step-00000012" / "optimizer.safetensors")
    config = trained.config.model_copy(
        update={"train": trained.config.train.model_copy(update={"run_dir": str(run_dir)})}
    )
    resumed = make_trainer(config)
    assert resumed.progress.step == 10
    resumed.fit()
    assert same_tensors(resumed.model.state_dict(), trained.model.state_dict())
    assert start_of(trained, run_dir)[0].resumed.step == 12


OTHERS = {
    "model": (["model.hidden_dim=24"], "model.hidden_dim is 24 there and 16 here"),
    "cell": (["model.rnn=LSTM"], "model.rnn is LSTM there and GRU here"),
    "vocabulary": (["data.vocab=bytes"], "data.vocab is bytes there and chars here"),
    "seed": (["train.seed=5"], "train.seed is 5 there and 1 here"),
    "windows": (["data.seq_len=8"], "data.seq_len is 8 there and 16 here"),
    "corpus": ([], "on another text: its corpus has SHA-256 "),
}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """foreign(kind) is a checkpoint of step 14 of a run that differs in `kind`."""
    made = {}

    def foreign(kind):
        if kind not in made:
            text = some_text(seed=1) if kind == "corpus" else None
            few = ["data.windows=carry", "train.max_steps=14", "eval.every=0", "sample.length=0"]
            config = tiny_config(tmp_path_factory.mktemp(kind), [*few, *OTHERS[kind][0]], text)
            trainer = make_trainer(config)
            trainer.fit()
            made[kind] = trainer.checkpoints.run_dir / "step-00000014"
        return made[kind]

    return foreign


@pytest.mark.parametrize("kind", OTHERS)
def test_a_checkpoint_of_another_run_is_skipped(trained, run_dir, foreign, kind):
    shutil.copytree(foreign(kind), run_dir / "step-00000014")
    line = f"skipping step-00000014, from another run: {run_dir} holds a run "
    assert_skipped(trained, run_dir, line, OTHERS[kind][1], newest="step-00000014", older=12)


@pytest.mark.parametrize("kind", OTHERS)
def test_foreign_checkpoints_alone_are_refused_with_differences(trained, run_dir, foreign, kind):
    for folder in step_folders(run_dir):
        shutil.rmtree(folder)
    shutil.copytree(foreign(kind), run_dir / "step-00000014")
    with pytest.raises(CheckpointError, match=re.escape(OTHERS[kind][1])):
        start_of(trained, run_dir)
    with pytest.raises(CheckpointError, match=re.escape(OTHERS[kind][1])):
        start_of(trained, damaged_too(run_dir))
    assert (run_dir / "step-00000014" / MANIFEST).exists()


def damaged_too(run_dir):
    shutil.copytree(run_dir / "step-00000014", run_dir / "step-00000020")
    (run_dir / "step-00000020" / "model.safetensors").unlink()
    return run_dir


def test_without_an_intact_checkpoint_nothing_is_touched(trained, run_dir):
    for folder in step_folders(run_dir):
        truncate(folder / "model.safetensors")
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    config = trained.config.model_copy(
        update={"train": trained.config.train.model_copy(update={"run_dir": str(run_dir)})}
    )
    refusal = rf"^none of the 2 checkpoint\(s\) in {run_dir} is intact; restore one"
    with logged() as warnings, pytest.raises(CheckpointError, match=refusal):
        starting_point(config, prepare(config.data), run_dir, resume=True)
    assert [re.search(r"step-\d+", line)[0] for line in warnings] == ["step-00000012", "step-00000010"]
    with pytest.raises(CheckpointError, match="none of the 2"):
        make_trainer(config)
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before
