"""Checkpoints: whole or not there, never trusted unread."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from charrnn.checkpoint import (
    MANIFEST,
    Checkpoint,
    load,
    load_for_inference,
    load_newest,
    optimizer_tensors,
    restore_optimizer,
    save_best,
    save_step,
    step_folders,
)
from charrnn.config import ModelConfig, RunConfig
from charrnn.errors import CheckpointError
from charrnn.model import CharRNN
from charrnn.vocab import Vocab
from train.optimizer import make_optimizer

CONFIG = RunConfig(model=ModelConfig(embedding_dim=4, hidden_dim=6, num_layers=2))
VOCAB = Vocab.of_chars("abc\n")


def trained_model(seed=0, steps=2):
    torch.manual_seed(seed)
    model = CharRNN(CONFIG.model, len(VOCAB))
    optimizer = make_optimizer(model, CONFIG.optim)
    for _ in range(steps):
        logits, _ = model(torch.randint(4, (2, 5)), model.zero_state(2))
        logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def make(step, seed=0):
    model, optimizer = trained_model(seed)
    return Checkpoint(
        CONFIG,
        VOCAB,
        model.state_dict(),
        {"step": step, "note": "é"},
        optimizer_tensors(model, optimizer),
        (torch.randn(2, 3, 6),),
        ({"cpu": torch.get_rng_state()}, {"cpu": torch.get_rng_state() + 1}),
    )


def same_tensors(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    saved = make(7)
    folder = save_step(tmp_path, saved, keep=2)
    assert folder.name == "step-00000007"
    back = load(folder)
    assert (back.config, back.vocab, back.trainer, back.step) == (saved.config, saved.vocab, saved.trainer, 7)
    assert same_tensors(back.weights, saved.weights)
    assert same_tensors(back.optimizer, saved.optimizer)
    assert torch.equal(back.carried[0], saved.carried[0])
    assert len(back.rng) == 2
    assert all(same_tensors(a, b) for a, b in zip(back.rng, saved.rng, strict=True))


def test_a_restored_optimizer_makes_the_same_update(tmp_path):
    model, optimizer = trained_model()
    taken = {k: v.clone() for k, v in optimizer_tensors(model, optimizer).items()}
    twin = CharRNN(CONFIG.model, len(VOCAB))
    twin.load_state_dict(model.state_dict())
    twin_optimizer = make_optimizer(twin, CONFIG.optim)
    restore_optimizer(twin, twin_optimizer, taken)
    ids = torch.randint(4, (2, 5))
    for m, o in ((model, optimizer), (twin, twin_optimizer)):
        m(ids, m.zero_state(2))[0].square().mean().backward()
        o.step()
    assert same_tensors(model.state_dict(), twin.state_dict())


def test_only_the_newest_are_kept_and_the_newest_is_found(tmp_path):
    for step in (5, 90, 100, 1000):
        save_step(tmp_path, make(step), keep=2)
    assert [p.name for p in step_folders(tmp_path)] == ["step-00001000", "step-00000100"]
    assert load_newest(tmp_path, pytest.fail).step == 1000


def test_a_run_without_checkpoints_has_none(tmp_path):
    assert load_newest(tmp_path, pytest.fail) is None


def damage_truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def damage_flip(folder):
    path = folder / "optimizer.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def damage_remove(folder):
    (folder / "state.safetensors").unlink()


def damage_manifest(folder):
    (folder / MANIFEST).write_text("{")


DAMAGES = [damage_truncate, damage_flip, damage_remove, damage_manifest]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_with_one_line_for_the_older_whole_one(tmp_path, damage):
    save_step(tmp_path, make(1), keep=2)
    damage(save_step(tmp_path, make(2), keep=2))
    warnings = []
    assert load_newest(tmp_path, warnings.append).step == 1
    assert len(warnings) == 1
    assert "step-00000002" in warnings[0]
    assert "\n" not in warnings[0]


def test_with_no_whole_checkpoint_left_the_run_does_not_start_over(tmp_path):
    damage_flip(save_step(tmp_path, make(1), keep=2))
    with pytest.raises(CheckpointError, match="none of the 1 checkpoint"):
        load_newest(tmp_path, lambda text: None)


def test_best_is_replaced_and_a_replacement_cut_off_between_its_renames_is_undone(tmp_path):
    save_best(tmp_path, make(1))
    save_best(tmp_path, make(2, seed=5))
    assert load_for_inference(tmp_path).step == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best"]
    (tmp_path / "best").rename(tmp_path / ".replaced-best")
    assert load_for_inference(tmp_path).step == 2


def test_best_holds_what_inference_needs_and_no_more(tmp_path):
    folder = save_best(tmp_path, make(1))
    assert sorted(p.name for p in folder.iterdir()) == [
        MANIFEST, "config.json", "model.safetensors", "trainer.json", "vocab.json",
    ]  # fmt: skip


def test_a_path_that_is_no_run_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(CheckpointError, match="no run or checkpoint folder"):
        load_for_inference(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run"):
        load_for_inference(tmp_path)


def test_an_interrupted_write_leaves_no_checkpoint_and_the_next_one_succeeds(tmp_path, monkeypatch):
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


@pytest.mark.skipif(os.name == "nt", reason="no file size limits on Windows")
def test_a_disk_that_refuses_leaves_the_last_checkpoint_and_names_the_disk(tmp_path):
    save_step(tmp_path, make(1), keep=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(CheckpointError, match="free space or permissions on the disk") as caught:
            save_step(tmp_path, make(2), keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert str(tmp_path) in str(caught.value)
    assert load_newest(tmp_path, pytest.fail).step == 1
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


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
