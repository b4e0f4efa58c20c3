"""The base model: how a run becomes one, and what fine-tuning it keeps, drops and adds."""

import json
import string

import pytest
import torch
from training import make_trainer, some_text, tiny_config

from charrnn.errors import CheckpointError
from train.checkpoint.folders import base_folder
from train.checkpoint.format import load, load_for_inference
from train.checkpoint.vocab_transfer import plain_form
from train.recipe.base_model import shrink

TINY = ["model.rnn=LSTM", "model.layer_norm=true"]


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A base model of this test's own, trained for 12 steps on words and some characters that few texts have."""
    text = some_text() + "".join(f"{c}\n" for c in "ÀÈÌ{}[]") * 20
    trainer = make_trainer(tiny_config(tmp_path, TINY, text))
    trainer.fit()
    folder = shrink(tmp_path / "run", tmp_path / "base")
    monkeypatch.setattr("train.checkpoint.folders.BASE_FOLDERS", (folder,))
    return folder


def fine_tuned(folder, text, *assignments, **options):
    (folder / "words.txt").write_text(text, encoding="utf-8")
    fields = [*TINY, "train.init_from=base", f"train.run_dir={folder / 'tuned'}", *assignments]
    return make_trainer(tiny_config(folder, fields), **options)


def test_a_base_is_in_half_precision_without_paths(base, tmp_path):
    small, run = load(base), load_for_inference(tmp_path / "run")
    assert small.vocab == run.vocab
    for name, weights in run.weights.items():
        assert small.weights[name].dtype == torch.float16
        assert torch.allclose(small.weights[name].float(), weights, atol=1e-3)
    for path in base.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name
    with pytest.raises(CheckpointError, match="exists; name another --out"):
        shrink(tmp_path / "run", base)


def test_the_vocabulary_is_that_of_the_text(base, tmp_path):
    trainer = fine_tuned(tmp_path, "the owl & the fox\n" * 200)
    assert trainer.config.train.init_from == "base"
    assert trainer.data.vocab == trainer.data.corpus.vocab
    old, new = load(base), trainer.model.state_dict()
    for name in ("embedding.weight", "head.weight", "head.bias"):
        rows = old.weights[name].float()
        for i, symbol in enumerate(trainer.data.vocab.symbols):
            known = symbol in old.vocab.symbols
            expected = rows[old.vocab.symbols.index(symbol)] if known else rows.mean(0)
            assert torch.allclose(new[name][i], expected, atol=1e-6), symbol
    assert torch.equal(new["rnn.weight_hh_l0"], old.weights["rnn.weight_hh_l0"].float())


def test_the_plain_form_of_a_character():
    assert "".join(map(plain_form, "\u2019\u201c\u2014éÅ\u2026жa")) == "'\"-eA.жa"


def test_new_characters_start_from_their_plain_forms(base, tmp_path):
    trainer = fine_tuned(tmp_path, "thé owl over a lázy dog ж\n" * 200)
    old, new, symbols = load(base), trainer.model.state_dict(), trainer.data.vocab.symbols
    rows = old.weights["head.weight"].float()
    for symbol, plain in (("é", "e"), ("á", "a")):
        assert torch.equal(new["head.weight"][symbols.index(symbol)], rows[old.vocab.symbols.index(plain)])
    assert torch.allclose(new["head.weight"][symbols.index("ж")], rows.mean(0), atol=1e-6)


def test_an_installation_without_a_base_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("train.checkpoint.folders.BASE_FOLDERS", (tmp_path / "nowhere",))
    with pytest.raises(CheckpointError, match="restore that folder, or use --init-from none"):
        base_folder()


def test_the_shipped_base_is_whole_small_and_in_half_precision():
    folder = base_folder()
    shipped = load(folder)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 16 << 20
    assert {tensor.dtype for tensor in shipped.weights.values()} == {torch.float16}
    assert all(torch.isfinite(tensor).all() for tensor in shipped.weights.values())
    assert {*string.ascii_letters, *string.digits, *" \n.,;:!?'\"-()"} <= set(shipped.vocab.symbols)
    assert json.loads((folder / "trainer.json").read_text())["corpus"]["name"] == "novels"
