"""Documents keep their boundaries: in training, both protocols, samples, the model file, scoring and generation."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packed import json_lines
from tiny_models import write_model
from training import make_trainer, some_text, tiny_config
from typer.testing import CliRunner

from charrnn.errors import CheckpointError, ConfigError
from charrnn.sampling import SamplingOptions
from charrnn.vocab import Vocab
from infer.commands import app
from infer.engine import Engine
from infer.scoring import read_text, score
from train.export.exporter import export
from train.loop.evaluation import sample_text
from train.loop.trainer import Trainer

END = "\0"
WORDS = some_text(6000).split("\n")
VOCAB = Vocab.of_chars("\n abcdefghij|", "|")


def documents_run(folder: Path, *assignments: str, **options: Any) -> Trainer:
    """A trainer on short documents of JSON lines."""
    (folder / "poems.jsonl").write_bytes(json_lines(*({"text": f"{words}\n"} for words in WORDS)))
    fields = [f"data.source={folder / 'poems.jsonl'}", r'data.document_end="\0"', *assignments]
    return make_trainer(tiny_config(folder, fields), **options)


@pytest.mark.parametrize("rnn", ["GRU", "LSTM"])
@pytest.mark.parametrize("windows", ["sliding", "carry"])
def test_the_trainers_losses_are_those_of_its_exported_file(windows: str, rnn: str, tmp_path: Path) -> None:
    trainer = documents_run(tmp_path, f"data.windows={windows}", f"model.rnn={rnn}")
    trainer.fit()
    path, difference, _ = export(Path(trainer.config.train.run_dir), None, "fp32", None)
    assert difference < 1e-4
    engine = Engine(path)
    assert engine.vocab.document_end == END
    joined = END.join(f"{words}\n" for words in WORDS) + END
    part = read_text(engine, joined.encode(), "val", "error")
    assert part.is_corpus
    assert part.ids.tolist() == trainer.data.corpus.val.tolist()
    assert (part.ids == engine.vocab.document_end_id).sum() > 2
    for protocol, found in score(engine, part.ids).items():
        assert found.nats_per_char == pytest.approx(engine.metrics[f"val/{protocol}/loss"], rel=1e-5)


def test_a_run_on_documents_resumes_and_not_with_another_end(tmp_path: Path) -> None:
    fields = ("data.windows=carry", "train.max_steps=5")
    documents_run(tmp_path, *fields).fit()
    assert documents_run(tmp_path, *fields).progress.step == 5
    with pytest.raises(CheckpointError, match=r"data.document_end is '\\x00' there and \| here"):
        documents_run(tmp_path, *fields, "data.document_end='|'")


def test_runs_with_and_without_an_end_go_on_from_each_others_weights(tmp_path: Path) -> None:
    trainer = documents_run(tmp_path)
    trainer.fit()
    run = Path(trainer.config.train.run_dir)
    plain = documents_run(tmp_path, "data.document_end=", f"train.run_dir={tmp_path / 'b'}", init_from=run)
    assert plain.data.vocab.document_end is None
    assert plain.model.document_end is None
    assert plain.data.vocab.symbols == trainer.data.vocab.symbols
    marked = documents_run(tmp_path, f"train.run_dir={tmp_path / 'c'}", init_from=run)
    assert marked.model.document_end == trainer.model.document_end is not None


def test_samples_of_the_trainer_begin_a_document_and_go_on_past_its_end(tmp_path: Path) -> None:
    trainer = documents_run(tmp_path, "sample.length=30")

    def sample(prompt: str) -> str:
        config = trainer.config.sample.model_copy(update={"prompt": prompt})
        return sample_text(trainer.model, trainer.data.vocab, config, torch.device("cpu"))

    assert sample("\n") == sample(END) == sample(f"the fox {END}")  # what stands before the end makes no difference
    assert sample("the") == sample(f"{END}the")
    assert len(sample("\n")) == 30


def test_a_document_end_for_bytes_is_one_byte() -> None:
    from charrnn.config import load_config

    with pytest.raises(ConfigError, match="document_end 'é' is more than one byte"):
        load_config(None, {"data.vocab": "bytes", "data.document_end": "é"})
    with pytest.raises(ConfigError, match=r"data.document_end"):
        load_config(None, {"data.document_end": "ab"})


# ---- the model file


@pytest.fixture(scope="module", params=["GRU", "LSTM"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine(write_model(tmp_path_factory.mktemp("models") / "m.onnx", VOCAB, rnn=request.param))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("rnn", ["GRU", "LSTM"])
def test_the_loop_the_step_and_the_whole_text_agree_past_the_end(precision: Any, rnn: str, tmp_path: Path) -> None:
    engine = Engine(write_model(tmp_path / "m.onnx", VOCAB, rnn=rnn, precision=precision, hidden_dim=32))
    drawn = [
        np.concatenate(list(engine.drawn(np.array([VOCAB.start_id]), 300, SamplingOptions(1.0), [1, 2], in_graph=s)), 1)
        for s in (False, True)
    ]
    assert np.array_equal(*drawn)
    assert (drawn[0] == VOCAB.document_end_id).sum() > 2


# ---- generation


def test_a_text_ends_where_its_document_does_unless_it_is_to_go_on(engine: Engine) -> None:
    for seed in range(5):
        whole = engine.generate_batch("", 1, 300, seed=seed, past_end=True)[0]
        assert len(whole) == 300
        assert "|" in whole
        assert engine.generate_batch("", 1, 300, seed=seed)[0] == whole.partition("|")[0]
        assert "".join(engine.generate("", 300, seed=seed)) == whole.partition("|")[0]


def test_a_stop_text_and_the_end_both_end_a_text(engine: Engine) -> None:
    whole = engine.generate_batch("", 1, 300, seed=3, past_end=True)[0]
    first = whole.partition("|")[0]
    stop = first[len(first) // 2 :][:1]
    assert "".join(engine.generate("", 300, seed=3, stop=stop)) == first.partition(stop)[0]
    assert "".join(engine.generate("", 300, seed=3, stop=f"{first[-1:]}|")) == first


def test_without_a_prompt_a_document_begins(engine: Engine) -> None:
    assert "".join(engine.generate("", 50, seed=1)) == "".join(engine.generate("abc|", 50, seed=1))


def test_a_prompt_is_the_beginning_of_a_document(engine: Engine) -> None:
    written = ["".join(engine.generate(prompt, 50, seed=2)) for prompt in ("abc", "|abc", "ghi|abc")]
    assert len(set(written)) == 1
    ids = VOCAB.encode("abc")
    assert VOCAB.begun(ids).tolist() == VOCAB.encode("|abc").tolist()
    assert VOCAB.begun(VOCAB.encode("|abc")).tolist() == VOCAB.encode("|abc").tolist()
    assert Vocab.of_chars("abc\n").begun(ids[:0]).tolist() == [0]


def test_the_command_line_ends_at_the_document_too(tmp_path: Path) -> None:
    path = str(write_model(tmp_path / "m.onnx", VOCAB))
    command = ["generate", "-m", path, "-n", "300", "--seed", "3", "--temp", "1"]
    ended, on = (CliRunner().invoke(app, [*command, *more]).output for more in ([], ["--past-end"]))
    assert on.startswith(ended[:-1] + "|")
    assert len(on) == 301


def test_info_says_where_documents_end(engine: Engine) -> None:
    said = CliRunner().invoke(app, ["info", str(engine.path)]).output
    assert "documents end with '|'" in said


def test_a_text_to_score_is_a_document_with_its_end(engine: Engine) -> None:
    assert read_text(engine, b"abc", "all", "error").ids.tolist() == VOCAB.encode("abc|").tolist()
    assert read_text(engine, b"ab|c|", "all", "error").ids.tolist() == VOCAB.encode("ab|c|").tolist()
    assert json.loads(engine.metadata["charrnn.vocab"])["document_end"] == "|"
