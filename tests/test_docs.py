"""The documents: their Python runs, their links resolve, their tables are what the code does, their letters agree."""

import ast
import contextlib
import math
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from launches import ROOT, python

from charrnn.config import ModelConfig, RunConfig, field_names
from charrnn.model.rnn import CharRNN
from charrnn.vocab import Vocab
from infer.engine import Engine
from infer.model_file import loader as model_file
from train.checkpoint.format import Checkpoint
from train.export import exporter as export

HOW_IT_WORKS = ROOT / "docs" / "how-it-works.md"
MODEL_FILE = ROOT / "docs" / "model-file.md"
INFERENCE = ROOT / "docs" / "inference.md"
FOLDERS = (".", "docs", "checkpoints", "configs", "launch", "benchmarks", "tests")
DOCUMENTS = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.md"))

LETTERS = ["B", "T", "E", "H", "L", "V", "N"]
# Suffixes that make `section.something` a file or a module rather than a config field.
PACKAGES = tuple(p.name for p in (ROOT / "train").iterdir() if (p / "__init__.py").exists())
NO_FIELD = ("onnx", "safetensors", "main", "py", "json", "yaml", *PACKAGES)

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
each_cell = pytest.mark.parametrize("rnn", ["GRU", "LSTM"])


@dataclass(frozen=True)
class Block:
    """A fenced block; line is where its first line of code stands, from 0."""

    language: str
    code: str
    line: int


def fenced_blocks(text: str) -> list[Block]:
    pattern = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    return [Block(m[1], m[2], text[: m.start(2)].count("\n")) for m in pattern.finditer(text)]


def prose(text: str) -> str:
    """The text without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Tensors as small as a document's are slower on several threads, and twenty times so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def run_python(document: Path) -> None:
    """Executes a document's Python blocks in one namespace; tracebacks show the document's own lines."""
    namespace: dict[str, object] = {"__name__": "document"}
    with torch.random.fork_rng(), one_thread():
        for block in fenced_blocks(document.read_text(encoding="utf-8")):
            if block.language == "python":
                exec(compile("\n" * block.line + block.code, str(document), "exec"), namespace)


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives a document's headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", prose(text), re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        repeats = (f"{slug}-{i}" if i else slug for i in range(len(found) + 1))
        found.add(next(name for name in repeats if name not in found))
    return found


def link_targets(text: str) -> list[str]:
    plain = re.sub(r"`[^`\n]*`", "code", prose(text))
    patterns = (r"\]\(\s*<?([^)\s>]+)", r"^\[[^\]]+\]:\s*(\S+)", r'\b(?:src|href)="([^"]+)"')
    return [target for pattern in patterns for target in re.findall(pattern, plain, re.MULTILINE)]


def broken_links(document: Path, root: Path) -> list[str]:
    """The relative links of a document that lead to no file, out of `root`, or to no heading."""
    broken = []
    for target in link_targets(document.read_text(encoding="utf-8")):
        if re.match(r"[a-z][a-z0-9+.-]*:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        exists = path.exists() and path.is_relative_to(root)
        if not exists or (anchor and anchor not in anchors(path.read_text(encoding="utf-8"))):
            broken.append(target)
    return broken


def table_rows(text: str, header: str) -> list[list[str]]:
    """The cells of the table whose first header cell is `header`, without backticks."""
    table = re.search(rf"^\| {header} \|[^\n]*\n\|[-|]+\|\n((?:\|[^\n]*\n)+)", text, re.MULTILINE)
    assert table, f"no table that begins with {header}"
    lines = table[1].replace("`", "").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def legends(text: str) -> list[str]:
    """The paragraphs that say what the letters mean, with emphasis and line breaks removed."""
    paragraphs = (" ".join(p.replace("*", "").split()) for p in prose(text).split("\n\n"))
    return [p for p in paragraphs if p.startswith("Letters")]


@pytest.fixture
def exported(rnn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """model.onnx in the current folder, exported from fresh weights in which every letter has its own number."""
    vocab = Vocab.of_chars("ROMEO: and Juliet, the sun.\n")
    config = RunConfig(model=ModelConfig(rnn=rnn, embedding_dim=5, hidden_dim=12, num_layers=2))
    torch.manual_seed(0)
    trainer = {
        "step": 3,
        "corpus": {"name": "test", "source": "test.txt", "num_chars": 28, "sha256": "0" * 64},
        "metrics": {"step": 3},
    }
    checkpoint = Checkpoint(config, vocab, CharRNN(config.model, len(vocab)).state_dict(), trainer)
    path = tmp_path / "model.onnx"
    export.export_checkpoint(checkpoint, path)
    monkeypatch.chdir(tmp_path)
    return path


def sizes(path: Path) -> dict[str, int]:
    engine = Engine(path)
    model = engine.config["model"]
    numbers = {"L": model["num_layers"], "H": model["hidden_dim"], "E": model["embedding_dim"], "V": len(engine.vocab)}
    assert len(set(numbers.values())) == len(numbers)
    return numbers


# --- snippets


def test_how_it_works_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_python(HOW_IT_WORKS)
    assert not list(tmp_path.iterdir()), "a snippet left files behind"


def test_every_snippet_of_how_it_works_asserts_something() -> None:
    blocks = [b for b in fenced_blocks(HOW_IT_WORKS.read_text(encoding="utf-8")) if b.language == "python"]
    assert len(blocks) > 20
    silent = [b.line for b in blocks if not any(isinstance(n, ast.Assert) for n in ast.walk(ast.parse(b.code)))]
    assert not silent, f"no assert in the blocks that begin at line {silent}"


def test_python_in_docs_stands_only_in_documents_that_are_run() -> None:
    with_python = {
        document
        for document in (ROOT / "docs").glob("*.md")
        if any(b.language == "python" for b in fenced_blocks(document.read_text(encoding="utf-8")))
    }
    assert with_python == {HOW_IT_WORKS, MODEL_FILE, INFERENCE}


@each_document
def test_every_fence_is_closed_and_names_its_language(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    fences = [line for line in text.splitlines() if line.lstrip().startswith("```")]
    blocks = fenced_blocks(text)
    assert len(fences) == 2 * len(blocks)
    assert {b.language for b in blocks} <= {"python", "bash", "text", "json", "yaml", "toml", "mermaid"}


# --- inference


def test_the_python_of_inference_runs(capsys: pytest.CaptureFixture[str]) -> None:
    run_python(INFERENCE)
    assert len(capsys.readouterr().out) == 200


def test_the_limits_in_inference_are_the_pages() -> None:
    guard, limits = pytest.importorskip("infer.ui.guard"), pytest.importorskip("infer.http_limits")
    from infer.ui.app import MAX_QUEUE

    text = " ".join(INFERENCE.read_text(encoding="utf-8").split())
    for sentence in (
        f"{MAX_QUEUE} requests wait in the queue, {guard.MAX_WAITING_PER_CLIENT} of them of one client",
        f"{limits.MAX_CONNECTIONS_PER_CLIENT} connections per client",
        f"{limits.HEADER_TIMEOUT_S:g} s to send a request's headers, {guard.BODY_TIMEOUT_S:g} s for its body",
        f"{guard.MAX_BODY_BYTES >> 20} MiB per body",
    ):
        assert sentence in text


# --- the model file's specification


@each_cell
def test_minimal_client_prints_what_the_command_beside_it_prints(
    rnn: str, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_python(MODEL_FILE)
    ours = capsys.readouterr().out
    blocks = fenced_blocks(MODEL_FILE.read_text(encoding="utf-8"))
    (command,) = [b.code for b in blocks if b.language == "bash"]
    program, *arguments = shlex.split(command)
    assert program == "infer"
    infer = python("-m", "infer.cli", *arguments, folder=exported.parent)
    assert ours == infer.stdout
    assert len(ours) == len("ROMEO:") + 200 + len("\n")


def test_minimal_client_is_25_lines_of_numpy_and_onnxruntime() -> None:
    client = fenced_blocks(MODEL_FILE.read_text(encoding="utf-8"))
    code = next(b.code for b in client if b.language == "python")
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 25
    imports = [n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Import | ast.ImportFrom)]
    assert all(isinstance(n, ast.Import) for n in imports)
    assert {a.name for n in imports for a in n.names} == {"json", "numpy", "onnxruntime"}


def test_minimal_client_refuses_a_newer_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[1] x) => (float[1] y) {y = Neg(x)}'
    )
    onnx.helper.set_model_props(proto, {"charrnn.format_version": "2"})
    onnx.save(proto, tmp_path / "model.onnx")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="format version 2"):
        run_python(MODEL_FILE)


@each_cell
def test_specified_tensors_are_those_of_the_file(rnn: str, exported: Path) -> None:
    letter_of = {number: letter for letter, number in sizes(exported).items()}
    session = onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])
    found = [
        ["optional " * n.type.startswith("optional") + direction, n.name, re.sub(r".*\((\w+)\)+", r"\1", n.type)]
        + [letter_of.get(d, d) for d in n.shape]
        for direction, nodes in (("input", session.get_inputs()), ("output", session.get_outputs()))
        for n in nodes
    ]
    assert not session.get_overridable_initializers()
    rows = table_rows(MODEL_FILE.read_text(encoding="utf-8"), "Name")
    specified = [
        [direction, name, kind, *shape.strip("()").split(", ")]
        for name, direction, kind, shape, cell in rows
        if cell in ("both", rnn)
    ]
    assert found == specified


@each_cell
def test_specified_weights_are_those_of_the_file(rnn: str, exported: Path) -> None:
    numbers = sizes(exported) | {"G": sizes(exported)["H"] * {"GRU": 3, "LSTM": 4}[rnn]}
    shapes = {i.name: tuple(i.dims) for i in onnx.load(exported).graph.initializer}
    rows = table_rows(MODEL_FILE.read_text(encoding="utf-8"), "Weight")
    assert [name for name, *_ in rows] == ["table", "input1", "recurrent0", "head"]
    for name, shape, _ in rows:
        assert shapes[name] == tuple(numbers[d] for d in re.findall(r"\w+", shape)), name
        if name != "table":
            assert shapes[f"{name}_bias"] == shapes[name][1:]
    weights = {name for name in shapes if np.prod(shapes[name]) > numbers["L"] * 2 and not name.endswith("_bias")} - {
        "ranks"
    }
    assert weights == {name for name, *_ in rows} | {"recurrent1"}


@each_cell
def test_specified_metadata_is_that_of_the_file(rnn: str, exported: Path) -> None:
    rows = table_rows(MODEL_FILE.read_text(encoding="utf-8"), "Key")
    assert {key for key, *_ in rows} == set(Engine(exported).metadata)


@pytest.mark.parametrize(
    ("key", "required"),
    [(key, required) for key, _, required in table_rows(MODEL_FILE.read_text(encoding="utf-8"), "Key")],
)
@pytest.mark.parametrize("rnn", ["GRU"])
def test_infer_needs_exactly_the_metadata_marked_required(rnn: str, exported: Path, key: str, required: str) -> None:
    proto = onnx.load(exported)
    kept = {p.key: p.value for p in proto.metadata_props if p.key != key}
    onnx.helper.set_model_props(proto, kept)
    onnx.save(proto, exported)
    if required == "yes":
        with pytest.raises(model_file.ModelFileError, match=re.escape(key)):
            Engine(exported)
    else:
        assert required == "no"
        assert "".join(Engine(exported).generate("ROMEO:", length=3, seed=0))


def test_specified_version_is_what_export_writes_and_infer_reads() -> None:
    versions = re.findall(r"format version \*\*(\d+)\*\*", MODEL_FILE.read_text(encoding="utf-8"))
    assert versions == [str(export.FORMAT_VERSION)] == [str(model_file.FORMAT_VERSION)]


# --- links


@each_document
def test_every_relative_link_leads_to_a_file_and_a_heading(document: Path) -> None:
    assert broken_links(document, ROOT) == []


# --- letters, names and figures


def test_letters_legend_is_the_same_in_every_document() -> None:
    legend = legends(HOW_IT_WORKS.read_text(encoding="utf-8"))
    assert len(legend) == 1
    assert re.findall(r"\b([A-Z]) \w", legend[0]) == LETTERS
    assert legends(MODEL_FILE.read_text(encoding="utf-8")) == legend
    for document in DOCUMENTS:
        assert set(legends(document.read_text(encoding="utf-8"))) <= set(legend), document


def test_letters_table_explains_the_legend() -> None:
    rows = table_rows(HOW_IT_WORKS.read_text(encoding="utf-8"), "Letter")
    assert [letter for letter, *_ in rows] == LETTERS


@each_document
def test_every_config_field_that_is_named_exists(document: Path) -> None:
    known = field_names()
    sections = "|".join(RunConfig.model_fields)
    named = re.findall(rf"`(?:--set )?((?:{sections})\.(\w+))(?:=[^`]*)?`", prose(document.read_text(encoding="utf-8")))
    unknown = [name for name, field in named if name not in known and field not in NO_FIELD]
    assert unknown == []


def test_nats_bits_and_perplexities_in_the_table_belong_together() -> None:
    rows = table_rows(HOW_IT_WORKS.read_text(encoding="utf-8"), "A model that knows")
    assert len(rows) == 4
    for _, nats, bits, perplexity in rows:
        assert math.isclose(float(bits), float(nats) / math.log(2), abs_tol=0.01)
        assert math.isclose(float(perplexity.split()[0]), math.exp(float(nats)), rel_tol=0.01)
