"""The page: what it streams, and that it runs without Gradio's telemetry or, when Gradio is missing, says so."""

import itertools
import sys

import pytest
from tiny_models import write_model

from charrnn.errors import ConfigError, VocabError
from infer.engine import Engine
from infer.ui import build_page, stream


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return Engine(write_model(tmp_path_factory.mktemp("model") / "m.onnx"))


def test_the_stream_grows_to_the_text_that_the_engine_writes(engine):
    states = list(stream(engine, "the ", 100, 0.8, 0, 1, 3))
    assert len(states) > 5
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(states))
    assert states[-1] == "the " + "".join(engine.generate("the ", length=100, temperature=0.8, seed=3))


def test_a_prompt_the_model_cannot_read_is_refused(engine):
    with pytest.raises(VocabError):
        list(stream(engine, "\u4e16", 10, 0.8, 0, 1, 3))


def test_without_gradio_the_remedy_is_named(engine, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ConfigError, match=r"pip install 'charrnn\[ui\]'"):
        build_page(engine)


def test_the_page_writes_stops_and_sends_nothing(engine):
    pytest.importorskip("gradio", reason="the extra ui is not installed")
    page = build_page(engine)
    assert not page.analytics_enabled
    labels = {block.label for block in page.blocks.values() if getattr(block, "label", None)}
    assert {"Prompt", "Text", "Seed", "Length (characters)"} <= labels
    assert page.fns
