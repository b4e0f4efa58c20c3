"""Runs without --config: sized once, resumed as they were, and what the user sets is kept."""

import os
import re
import subprocess
import sys
import time

import pytest
import torch
from launches import ROOT, logged
from training import fresh_accelerator, make_trainer, some_text, tiny_config

from charrnn.config import UNSIZED, ModelConfig, load_config
from charrnn.data import corpus
from charrnn.data.corpus import prepare
from infer.engine import Engine
from train.checkpoint.format import load_newest
from train.recipe import size_run
from train.recipe.base_model import shrink
from train.recipe.machine_speed import Speed, training_speed
from train.recipe.size_run import UserSettings
from train.run import run

RUSSIAN = "съешь же ещё этих мягких французских булок, да выпей чаю\n" * 100


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a text and a tiny base model, and a machine of a known speed."""
    trainer = make_trainer(tiny_config(tmp_path, ["model.rnn=LSTM", "model.layer_norm=true"]))
    trainer.fit()
    monkeypatch.setattr("train.checkpoint.folders.BASE_FOLDERS", (shrink(tmp_path / "run", tmp_path / "base"),))
    monkeypatch.setattr(size_run, "training_speed", lambda *_: Speed(1e11))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def started(*assignments, **options):
    """Runs train/main.py's work with the options ("section__key" = value) and --set assignments."""
    fresh_accelerator()
    fixed = {"data.source": "words.txt", "sample.length": 10, "train.mixed_precision": "no", "train.time_limit": 0}
    chosen = UserSettings({**fixed, **{name.replace("__", "."): v for name, v in options.items()}}, assignments)
    return run(chosen.apply(UNSIZED), config_name="", resume=True, settings=chosen)


def test_a_text_alone_suffices_and_the_run_resumes(folder, capsys, monkeypatch):
    counted, loss = [], corpus.ngram_loss
    monkeypatch.setattr(corpus, "ngram_loss", lambda *args: counted.append(args) or loss(*args))
    assert started(train__max_steps=12).resolve() == folder / "checkpoints" / "words" / "model.onnx"
    assert len(counted) == 1  # for the recipe, the opening lines and the closing ones
    run_dir = folder / "checkpoints" / "words"
    said = r"^recipe    fine-tune the base model \(LSTM 2 x 16, \d\.\d\d nats/char on .*\), dropout \S+, \d+ rows x"
    assert re.search(said, capsys.readouterr().err, re.MULTILINE)
    config = load_config(run_dir / "config.yaml", {})
    assert (config.train.init_from, config.model.hidden_dim, config.train.max_steps) == ("base", 16, 12)
    assert len(Engine(run_dir / "model.onnx").vocab) == len(set(some_text()))

    started(train__max_steps=20)
    assert "resumed at step 12" in (printed := capsys.readouterr().err)
    assert "recipe" not in printed
    assert load_newest(run_dir).step == 20
    again = load_config(run_dir / "config.yaml", {})
    assert again.model_copy(update={"train": config.train}) == config


def test_the_config_of_a_run_reproduces_it(folder):
    started(train__max_steps=12)
    run_dir = folder / "checkpoints" / "words"
    config = load_config(run_dir / "config.yaml", {"train.run_dir": str(folder / "copy")})
    fresh_accelerator()
    run(config, config_name="again", resume=True)
    assert logged(folder / "copy") == logged(run_dir) != {}


def test_what_the_user_sets_is_kept(folder):
    started("model.hidden_dim=24", "data.seq_len=8", "data.windows=sliding", train__max_steps=3, model__rnn="GRU")
    config = load_config(folder / "checkpoints" / "words" / "config.yaml", {})
    assert (config.model.rnn, config.model.hidden_dim, config.data.seq_len) == ("GRU", 24, 8)
    assert config.train.init_from == "none"  # the base has another network
    assert (config.data.reset, config.data.segment) == (0, 0)


def test_weights_that_the_user_names_decide_the_network(folder):
    other = ["model.rnn=GRU", "model.hidden_dim=20", f"train.run_dir={folder / 'other'}"]
    make_trainer(tiny_config(folder, other)).fit()
    started(train__max_steps=3, train__init_from="other")
    config = load_config(folder / "checkpoints" / "words" / "config.yaml", {})
    assert (config.model.rnn, config.model.hidden_dim, config.train.init_from) == ("GRU", 20, "other")


def test_a_reset_is_the_users_to_set_since_rows_are_carried():
    config = UserSettings({}, ("data.reset=0.2",)).apply(UNSIZED)
    assert (config.data.windows, config.data.reset) == ("carry", 0.2)


@pytest.mark.parametrize(
    ("text", "options", "helps"),
    [
        (some_text(), {}, True),
        ("l'été, où ça? à Orléans, très tôt\n" * 50, {}, True),
        (RUSSIAN, {}, False),
        (some_text(), {"data.vocab": "bytes"}, False),
        (some_text(), {"model.rnn": "GRU"}, False),
        (some_text(), {"model.dropout": 0.5}, True),
    ],
)
def test_the_base_serves_mostly_latin_text_of_its_own_network(folder, text, options, helps):
    (folder / "t.txt").write_text(text, encoding="utf-8")
    chosen = UserSettings({"data.source": "t.txt", **options})
    config = chosen.apply(UNSIZED)
    assert size_run._origin(chosen, config, prepare(config.data))[0] == ("base" if helps else "none")


@pytest.mark.parametrize(
    ("speed", "wanted", "said", "threads"),
    [
        (Speed(1e11, 0.95, 1.0), 0, "", 2),
        (Speed(1e11, 0.5, 1.0), 0, "2 thread(s) had 50% of their time", 2),
        (Speed(1e11, 0.5, 3.0), 0, "1 thread is 3.0 times as fast; training with 1", 1),
        (Speed(1e11, 0.5, 3.0), 2, "--set train.threads=1 uses one", 2),
    ],
)
def test_one_thread_trains_beside_other_processes(speed, wanted, said, threads):
    torch.set_num_threads(2)
    config = load_config(None, {"train.threads": wanted})
    flops, lines = size_run._choose_threads(speed, config)
    assert torch.get_num_threads() == threads
    assert said in "".join(lines)
    assert flops == (3e11 if threads == 1 else 1e11)


def test_measuring_the_speed_changes_no_random_state():
    accelerator = fresh_accelerator()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    began = time.perf_counter()
    speed = training_speed(ModelConfig(embedding_dim=8, hidden_dim=16), 30, accelerator)
    assert time.perf_counter() - began < 30
    assert speed.flops > 0
    assert 0 < speed.cpu_share < 2
    assert torch.equal(torch.get_rng_state(), before)


SHOW = "import os, sys, train; assert 'torch' not in sys.modules; print(os.environ.get('GOMP_SPINCOUNT'))"


@pytest.mark.parametrize(
    ("given", "shown"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_waiting_threads_spin_briefly_by_default(given, shown):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("GOMP_", "OMP_"))}
    environment |= {"PYTHONPATH": str(ROOT), **given}
    done = subprocess.run([sys.executable, "-c", SHOW], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == shown
