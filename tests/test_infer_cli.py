"""The `infer` command line: what it prints and where, its exit codes, and that it needs no torch."""

import errno
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_models import CHARS, random_weights, run_config, write_model

import charrnn
from charrnn.errors import escape_control
from charrnn.sampling import SamplingOptions
from charrnn.vocab import Vocab
from infer import Engine
from infer.cli import run

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def model(folder: Path) -> str:
    return str(write_model(folder / "tiny.onnx"))


@pytest.fixture
def cli(capfd):
    """Runs a command in this process. capfd sees what onnxruntime writes past Python, too."""

    def call(*arguments: str) -> SimpleNamespace:
        capfd.readouterr()
        code = run([str(a) for a in arguments])
        sys.stdout.flush()
        out, err = capfd.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return call


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory):
    """Runs a command as a process of its own, where importing torch fails."""
    poison = tmp_path_factory.mktemp("poison")
    (poison / "torch.py").write_text("raise ImportError('torch must not be imported')\n")

    def call(*arguments: str, program: tuple[str, ...] = ("-m", "infer.cli"), **kwargs) -> subprocess.Popen:
        environment = os.environ | {"PYTHONPATH": f"{poison}{os.pathsep}{ROOT}"} | kwargs.pop("env", {})
        command = [sys.executable, *program, *map(str, arguments)]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | kwargs
        return subprocess.Popen(command, env=environment, cwd=poison, **pipes)

    return call


def finish(process: subprocess.Popen, text: str | None = None) -> SimpleNamespace:
    out, err = process.communicate(None if text is None else text.encode(), timeout=60)
    return SimpleNamespace(code=process.returncode, out=out.decode(), err=err.decode())


# generate


def engine_text(model, prompt="ROME", length=60, temperature=0.8, **options) -> str:
    sampling = SamplingOptions(temperature=temperature, **options)
    return "".join(Engine(model).generate(prompt, length, sampling, seed=3))


@pytest.mark.parametrize(
    ("given", "lead", "how"),
    [
        ("--temp 0.9 --top-k 9 --top-p 0.9", "ROME", {"temperature": 0.9, "top_k": 9, "top_p": 0.9}),
        ("--min-p 0.2", "ROME", {"min_p": 0.2}),
        ("--repetition-penalty 3", "ROME", {"repetition_penalty": 3.0}),
        ("--repetition-penalty 3 --repetition-window 2", "ROME", {"repetition_penalty": 3.0, "repetition_window": 2}),
        ("--greedy", "ROME", {"temperature": 0.0}),
        ("--temp 0", "ROME", {"temperature": 0.0}),
        ("--threads 2", "ROME", {}),
        ("--no-stream", "ROME", {}),
        ("--no-echo", "", {}),
    ],
)
def test_generate_prints_the_engines_text_with_every_option(cli, model, given, lead, how):
    result = cli("generate", "-m", model, "-p", "ROME", "-n", 80, "--seed", 3, *given.split())
    text = engine_text(model, length=80, **how)
    assert (result.code, result.out, result.err) == (0, f"{lead}{text}\n", "")
    assert not how or text != engine_text(model, length=80)


def test_defaults_are_500_characters_at_0_8_and_a_new_seed(cli, model):
    assert cli("generate", "-m", model, "-p", "ROME", "--seed", 3).out == f"ROME{engine_text(model, length=500)}\n"
    assert cli("generate", "-m", model, "-n", 60, "--seed", 3).out == f"{engine_text(model, prompt=chr(10))}\n"
    assert cli("generate", "-m", model).out != cli("generate", "-m", model).out


def test_the_stop_text_ends_the_output_and_is_not_printed(cli, model):
    text = engine_text(model, length=200)
    stop = text[40:43]
    for options in ([], ["--no-stream"]):
        result = cli("generate", "-m", model, "-p", "ROME", "-n", 200, "--seed", 3, "--stop", stop, *options)
        assert result.out == f"ROME{text.split(stop)[0]}\n"


def test_samples_are_whole_and_marked_with_their_seeds(cli, model):
    out = cli("generate", "-m", model, "-p", "ROME", "-n", 40, "--seed", 7, "--num-samples", 3).out
    texts = [cli("generate", "-m", model, "-p", "ROME", "-n", 40, "--seed", 7 + i).out for i in range(3)]
    assert out == "".join(f"--- sample {i + 1} (seed {7 + i}) ---\n{text}" for i, text in enumerate(texts))


def test_a_prompt_file_is_read_as_corpora_are(cli, model, tmp_path):
    (tmp_path / "prompt.txt").write_bytes("\ufeffRO\r\nME".encode())
    result = cli("generate", "-m", model, "--prompt-file", tmp_path / "prompt.txt", "-n", 30, "--seed", 1)
    assert result.out == cli("generate", "-m", model, "-p", "RO\nME", "-n", 30, "--seed", 1).out


@pytest.mark.parametrize(("how", "read_as", "done"), [("skip", "ROME", "dropped"), ("replace", "RO!ME", "replaced")])
def test_unknown_characters_skip_or_replace_with_a_warning(cli, folder, how, read_as, done):
    path = write_model(folder / "replacing.onnx", Vocab("chars", CHARS.symbols, replacement="!"))
    result = cli("generate", "-m", path, "-p", "RO€ME", "-n", 30, "--seed", 1, "--unknown", how)
    assert result.out == cli("generate", "-m", path, "-p", read_as, "-n", 30, "--seed", 1).out
    assert result.err == f"warning: characters not in the vocabulary were {done}: '€'\n"


def test_stats_on_stderr_have_a_reproducing_seed(cli, model):
    result = cli("generate", "-m", model, "-p", "ROME", "-n", 30, "--stats")
    assert result.err.startswith("seed ")
    assert "30 characters in" in result.err
    assert result.err.count("\n") == 1
    seed = result.err.split(";")[0].removeprefix("seed ")
    assert cli("generate", "-m", model, "-p", "ROME", "-n", 30, "--seed", seed).out == result.out


# info and score


def test_info_describes_model_vocabulary_and_training(cli, model):
    out = cli("info", model).out
    facts = ["GRU, 2 layers of 24", "embedding 16", "12,345 parameters", "34 characters", "abcdefg"]
    facts += [
        "tiny, from tiny.txt",
        "1,200 steps",
        "on 2 cores",
        "stream 1.5000 nats/char (2.1640 bits/char)",
        "format version 1",
        "0" * 64,
    ]
    assert [fact for fact in facts if fact not in out] == []
    assert cli("info", "-m", model).out == out


def test_info_json_is_one_object_with_everything(cli, model):
    facts = json.loads(cli("info", model, "--json").out)
    vocab = {"kind": "chars", "size": 34, "symbols": list(CHARS.symbols)}
    assert facts["vocab"] == vocab | {"replacement": None, "document_end": None}
    assert facts["model"] == run_config().model.model_dump()
    assert facts["metrics"]["val/windows/loss"] == 1.5
    assert facts["corpus"] == {"name": "tiny", "source": "tiny.txt", "num_chars": 1000, "sha256": "0" * 64}
    assert facts["bytes"] == Path(model).stat().st_size
    assert facts["format_version"] == 1


@pytest.mark.parametrize(
    ("metrics", "corpus", "shown", "hidden"),
    [
        (
            {"step": "many", "parameters": None, "val/stream/loss": "low", "time_s": float("nan")},
            None,
            ["many steps, nan s", "stream low nats/char"],
            "corpus",
        ),
        ({"step": 10**400}, None, [str(10**400)], "corpus"),
        (
            {"val/stream/loss": float("nan"), "list": [float("inf")]},
            {"name": "x\x1b[2J\nfile        forged.onnx", "source": "\u202eevil"},
            ["int8", "nan nats/char", r"x\x1b[2J\nfile        forged.onnx, from \u202eevil"],
            "\nfile  ",
        ),
    ],
    ids=["mistyped", "400 digits", "hostile"],
)
def test_info_shows_what_the_file_says_escaped(cli, folder, metrics, corpus, shown, hidden):
    changed = {"metrics": json.dumps(metrics), "corpus_sha256": None, "corpus": corpus and json.dumps(corpus)}
    path = write_model(folder / "odd.onnx", changed=changed, precision="int8")
    result = cli("info", path)
    assert (result.code, result.err) == (0, "")
    assert result.out.replace("\n", "").isprintable()
    assert [text for text in shown if text not in result.out] == []
    assert hidden not in result.out
    facts = json.loads(cli("info", path, "--json").out, parse_constant=pytest.fail)  # NaN and infinity are no JSON
    assert facts["precision"] == "int8"
    assert facts["metrics"].get("list", [None]) == [None]


def test_info_of_a_byte_model_needs_no_listing(cli, folder):
    path = write_model(folder / "bytes.onnx", Vocab.of_bytes())
    assert "256 bytes" in cli("info", path).out
    assert json.loads(cli("info", path, "--json").out)["vocab"]["symbols"] == []


def test_score_of_a_uniform_model_is_log_vocab_size(cli, folder, tmp_path):
    weights = random_weights(run_config(), len(CHARS))
    weights["head.weight"][:], weights["head.bias"][:] = 0, 0
    path = write_model(folder / "uniform.onnx", weights=weights)
    (tmp_path / "text.txt").write_text("what a piece of work is a man\n" * 20)
    facts = json.loads(cli("score", path, tmp_path / "text.txt", "--json").out)
    for protocol in ("stream", "windows"):
        assert facts[protocol]["nats_per_char"] == pytest.approx(np.log(34))
        assert facts[protocol]["bits_per_char"] == pytest.approx(np.log2(34))
        assert facts[protocol]["perplexity"] == pytest.approx(34)
        assert facts[protocol]["chars"] == 599
    table = cli("score", path, tmp_path / "text.txt").out
    assert "600 characters, 0 of them unknown" in table
    assert table.count("3.5264") == 2


def test_score_counts_and_names_what_is_unknown(cli, model, tmp_path):
    (tmp_path / "text.txt").write_text("a price of 5€ or 6€ " * 10, encoding="utf-8")
    result = cli("score", model, tmp_path / "text.txt", "--unknown", "skip", "--json")
    facts = json.loads(result.out)
    assert (facts["chars"], facts["unknown_chars"], facts["unknown"]) == (200, 40, ["5", "6", "€"])
    assert facts["stream"]["chars"] == 159
    assert "dropped: '5', '6', '€'" in result.err


def test_score_of_a_split_scores_that_part_alone(cli, model, tmp_path):
    text = "".join(np.random.default_rng(0).choice(list(CHARS.symbols), 1000))
    (tmp_path / "all.txt").write_text(text)
    (tmp_path / "val.txt").write_text(text[900:])
    val = json.loads(cli("score", model, tmp_path / "all.txt", "--split", "val", "--json").out)
    part = json.loads(cli("score", model, tmp_path / "val.txt", "--json").out)
    assert (val["split"], val["chars"]) == ("val", 100)
    assert (val["stream"], val["windows"]) == (part["stream"], part["windows"])


# User errors: one line on stderr, exit code 2, nothing on stdout.


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bad")
    (folder / "text.onnx").write_text("no model\n" * 50)
    (folder / "latin1.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (folder / "good.txt").write_text("a good text\n" * 10)
    (folder / "unknown.txt").write_text("5€\n", encoding="utf-8")
    (folder / "one.txt").write_text("a")
    return {path.name: path for path in folder.iterdir()} | {"absent": folder / "absent", "folder": folder, "": ""}


BAD_MODELS = {"absent": "no model file", "": "is a folder", "text.onnx": "not an ONNX model"}
BAD_OPTIONS = {
    ("--temp", "-1"): "temperature must be 0 .*not -1",
    ("--seed", "-1"): "seed must .*-1",
    ("--num-samples", "0"): "num_samples must .*0",
    ("--threads", "0"): "threads must .*0",
    ("--stop", ""): "stop text is empty",
    ("-p", "5€"): r"2 character\(s\) not in the model's vocabulary of 34: '5' \(U\+0035\), '€' \(U\+20AC\)",
    ("-p", "€", "--unknown", "replace"): "no replacement entry",
    ("-p", "caf\udce9"): "the prompt is not UTF-8 .*0xe9 at offset 3",
    ("-p", "a", "--prompt-file", "FOLDER/good.txt"): "--prompt and --prompt-file were both given",
    ("--prompt-file", "FOLDER/absent"): "cannot read prompt file .*No such file",
    ("--prompt-file", "FOLDER"): "cannot read prompt file .*directory",
    ("--prompt-file", "FOLDER/latin1.txt"): "latin1.txt is not UTF-8 .*0xe9 at offset 3",
    ("--top-k", "many"): "--top-k.*valid int.*see: infer generate --help",
    ("--unknown", "maybe"): "--unknown.*'maybe'",
    ("--tpo-k", "3"): "No such option: --tpo-k",
    ("stray",): "stray",
}


def assert_user_error(result: SimpleNamespace, message: str) -> None:
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert re.search(message, result.err)


@pytest.mark.parametrize("name", BAD_MODELS)
def test_a_bad_model_file_is_one_line_and_exit_code_2(cli, faulty, name):
    for command in (["generate", "-m"], ["info"], ["info", "--json", "-m"]):
        assert_user_error(cli(*command, faulty[name]), BAD_MODELS[name])
    assert_user_error(cli("score", faulty[name], faulty["good.txt"]), BAD_MODELS[name])


@pytest.mark.parametrize("options", BAD_OPTIONS, ids=" ".join)
def test_a_bad_option_of_generate_is_one_line_and_exit_code_2(cli, model, faulty, options):
    given = [option.replace("FOLDER", str(faulty["folder"])) for option in options]
    assert_user_error(cli("generate", "-m", model, *given), BAD_OPTIONS[options])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("absent", [], "cannot read text .*No such file"),
        ("folder", [], "cannot read text .*directory"),
        ("latin1.txt", [], "not UTF-8"),
        ("unknown.txt", [], "'5' .*'€'"),
        ("one.txt", [], "at least 2"),
        ("good.txt", ["--split", "test"], "at least 2"),
        ("good.txt", ["--split", "middle"], "'middle'"),
    ],
)
def test_a_bad_text_to_score_is_one_line_and_exit_code_2(cli, model, faulty, name, options, message):
    assert_user_error(cli("score", model, faulty[name], *options), message)


def test_other_misuse_is_one_line_and_exit_code_2(cli, model):
    assert_user_error(cli("genrate"), "No such command 'genrate'")
    assert_user_error(cli("score", model), "Missing argument 'FILE")
    assert_user_error(cli("info", model, "-m", model), "two model files were given")
    assert_user_error(cli("--no-such-option"), "No such option")


# As a process.


TRAINING = {"torch", "charrnn.config", "yaml", "onnx", "accelerate", "train"}


def test_commands_import_nothing_heavy(shell, model, faulty):
    program = (
        "import sys; from infer.cli import run; import infer; code = run(sys.argv[2:]); "
        "heavy = eval(sys.argv[1]) & set(sys.modules); sys.exit(f'imported {heavy}' if heavy else code)"
    )
    for heavy, command in (
        (TRAINING | {"numpy", "onnxruntime", "rich"}, ["generate", "--help"]),
        (TRAINING, ["generate", "-m", model, "-n", "3", "--num-samples", "2"]),
        (TRAINING, ["info", model]),
        (TRAINING, ["score", model, faulty["good.txt"]]),
    ):
        result = finish(shell(str(heavy), *command, program=("-c", program)))
        assert (result.code, result.err) == (0, "")
        assert result.out
    assert finish(shell("import torch", program=("-c",))).code == 1  # as the Python API would
    api = f"from infer import Engine; print(''.join(Engine({model!r}).generate('ROME', length=20, seed=1)))"
    result = finish(shell(api, program=("-c",)))
    assert (result.code, result.out) == (0, "".join(Engine(model).generate("ROME", length=20, seed=1)) + "\n")


def test_help_shows_commands_and_every_default(shell, cli):
    result = finish(shell())
    assert result.code == 0
    assert all(command in result.out for command in ("generate", "info", "score"))
    assert result.out == cli("--help").out == cli("-h").out
    out = " ".join(cli("generate", "--help").out.split())
    defaults = ["500", "0.8", "0", "1.0", "error", "1", "stream", "echo", "the shipped model", "a new one each time"]
    assert [default for default in defaults if f"[default: {default}]" not in out] == []
    assert cli("--version").out == f"charrnn {charrnn.__version__}\n"


def test_ctrl_c_ends_a_stream_cleanly(shell, model):
    process = shell("generate", "-m", model, "-p", "ROME", "-n", "100000000", "--seed", "1")
    begun = process.stdout.read(200).decode()
    process.send_signal(signal.SIGINT)
    result = finish(process)
    assert (result.code, result.err) == (130, "\n")
    length = len(begun + result.out)
    expected = "ROME" + "".join(Engine(model).generate("ROME", length, SamplingOptions(0.8), seed=1))
    assert expected.startswith(begun + result.out)


WITHOUT_SIGPIPE = "import signal; del signal.SIGPIPE; from infer.cli import main; main()"


@pytest.mark.parametrize(("program", "code"), [(("-m", "infer.cli"), -13), (("-c", WITHOUT_SIGPIPE), 1)])
def test_a_closed_pipe_ends_it_quietly(shell, model, program, code):
    process = shell("generate", "-m", model, "-n", "100000000", program=program)
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == code


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("command", [["generate", "-n", "5"], ["info", "--json"], ["--help"]], ids=lambda c: c[0])
def test_a_full_disk_is_one_line_and_exit_code_2(shell, model, command):
    command = command if command == ["--help"] else [*command, "-m", model]
    with Path("/dev/full").open("wb") as full:
        process = shell(*command, stdout=full)
        said = process.stderr.read().decode()
    assert (process.wait(60), said) == (2, "error: cannot write to standard output: No space left on device\n")


@pytest.mark.skipif(os.name != "posix", reason="redirects by sh")
@pytest.mark.parametrize(
    ("redirect", "message"),
    [
        ("<&-", "error: cannot read prompt from standard input: it is closed; name a file instead\n"),
        (">&-", "error: standard output is closed; open it, or redirect it to a file\n"),
        (">&- 2>&-", ""),
        ("2>&- --stop '' --stats", ""),
    ],
)
def test_a_closed_stream_is_at_most_one_line_and_exit_code_2(model, redirect, message):
    script = f'exec "$0" -m infer.cli generate -m "$1" -p - -n 5 {redirect}'
    standard_input = {} if redirect == "<&-" else {"input": "a"}
    done = subprocess.run(["sh", "-c", script, sys.executable, model], capture_output=True, text=True, cwd=ROOT,
                          **standard_input)  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


@pytest.mark.skipif(os.name != "posix", reason="redirects by sh")
def test_messages_for_a_closed_stderr_do_not_reach_stdout(model):
    script = 'exec "$0" -m infer.cli generate -m "$1" -p ROME€ -n 0 --unknown skip --stats 2>&-'
    done = subprocess.run(["sh", "-c", script, sys.executable, model], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "ROME\n")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (MemoryError(), 2, "error: out of memory; generate fewer or shorter texts, or give a shorter one\n"),
        (KeyboardInterrupt(), 130, "\n"),
        (OSError(errno.EIO, "Input/output error", "weights.bin"), 2, "error: weights.bin: Input/output error\n"),
    ],
    ids=["memory", "interrupt", "file"],
)
def test_other_failures_are_one_line_and_an_exit_code(cli, model, monkeypatch, error, code, said):
    def generate(*args, **kwargs):
        raise error

    monkeypatch.setattr(Engine, "generate", generate)
    result = cli("generate", "-m", model)
    assert (result.code, result.out, result.err) == (code, "", said)


def test_a_prompt_and_a_text_can_come_from_standard_input(shell, cli, model, faulty):
    result = finish(
        shell("generate", "-m", model, "-p", "-", "-n", "30", "--seed", "1", stdin=subprocess.PIPE), "ROME\n"
    )
    assert result.out == cli("generate", "-m", model, "-p", "ROME\n", "-n", "30", "--seed", "1").out
    text = faulty["good.txt"].read_text()
    result = finish(shell("score", model, "-", "--json", stdin=subprocess.PIPE), text)
    from_file = json.loads(cli("score", model, faulty["good.txt"], "--json").out)
    assert json.loads(result.out) == from_file | {"file": "-"}


@pytest.mark.parametrize(
    "locale", [{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONIOENCODING": "latin-1"}]
)
def test_output_is_utf8_whatever_the_locale(shell, folder, locale):
    path = write_model(folder / "greek.onnx", Vocab.of_chars("αβγδ€é"))
    result = finish(shell("generate", "-m", path, "-n", "40", "--seed", "1", env=locale))
    assert (result.code, result.err) == (0, "")
    assert result.out == "".join(Engine(path).generate("", 40, SamplingOptions(0.8), seed=1)) + "\n"


def test_output_has_the_same_bytes_on_a_windows_console(shell, folder):
    """There standard output is in a code page such as cp1252 at first, and turns \\n into \\r\\n."""
    path = write_model(folder / "wide.onnx", Vocab.of_chars("\n\u2026世é"))
    program = (
        "import io, sys; from infer.cli import main\n"
        "for name in ('stdout', 'stderr'):\n"
        "    buffer = getattr(sys, name).detach()\n"
        "    setattr(sys, name, io.TextIOWrapper(buffer, encoding='cp1252', newline='\\r\\n'))\n"
        "main()"
    )
    process = shell("generate", "-m", path, "-n", "60", "--seed", "1", program=("-c", program))
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")
    text = "".join(Engine(path).generate("", 60, SamplingOptions(0.8), seed=1)) + "\n"
    assert {"\n", "\u2026", "世"} <= set(text)
    assert out == text.encode()
    said = finish(shell("generate", "-m", path, "-p", "\u2019", program=("-c", program)))
    assert (said.code, said.err.count("\r")) == (2, 0)
    assert "'\u2019'" in said.err


class Screen(io.StringIO):
    """Remembers what could be read at each flush."""

    def __init__(self):
        super().__init__()
        self.shown = []

    def flush(self):
        self.shown.append(self.getvalue())


def test_text_is_shown_as_it_comes_or_in_one_piece(model, monkeypatch):
    command = ["generate", "-m", model, "-p", "RO", "-n", "200", "--seed", "1"]
    monkeypatch.setattr(sys, "stdout", Screen())
    assert run(command) == 0
    lengths = [len(text) for text in sys.stdout.shown]
    assert lengths[0] == 2
    assert lengths[1] <= 2 + 16
    assert max(b - a for a, b in itertools.pairwise(lengths)) <= 128
    assert lengths[-1] == 203
    monkeypatch.setattr(sys, "stdout", Screen())
    assert run([*command, "--no-stream"]) == 0
    assert len(sys.stdout.shown[0]) == 203


def test_a_loss_beyond_what_has_a_perplexity_is_reported(cli, folder, tmp_path):
    weights = random_weights(run_config(), len(CHARS))
    weights["head.weight"] *= 2000
    path = write_model(folder / "wrong.onnx", weights=weights)
    (tmp_path / "text.txt").write_text("the romeo")
    assert "inf" in cli("score", path, tmp_path / "text.txt").out
    assert json.loads(cli("score", path, tmp_path / "text.txt", "--json").out)["stream"]["perplexity"] is None


def test_text_is_raw_in_a_pipe_and_escaped_on_a_terminal(cli, folder, monkeypatch):
    weights = random_weights(run_config(), 3)
    weights["head.bias"][0] = 1000
    path = write_model(folder / "obeyed.onnx", Vocab.of_chars("\x1ba\n"), weights=weights)
    vocab = Engine(path).vocab
    assert "\x1b" in vocab.symbols
    command = ("generate", "-m", path, "-p", "\x1b", "-n", 3, "--greedy")
    assert cli(*command).out.startswith("\x1b")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    shown = cli(*command).out
    assert "\x1b" not in shown
    assert shown.startswith(r"\x1b")
    text = "é 世界\u3000\xa0שלום 👩\u200d🚀\n\t"
    assert escape_control(text) == text
    assert escape_control("\r\x9b\u202e\u2066\x00") == r"\r\x9b\u202e\u2066\x00"


@pytest.mark.parametrize("module", ["train.main", "charrnn.data"])
def test_training_on_a_base_install_names_the_extra(shell, tmp_path, module):
    (tmp_path / "pydantic.py").write_text("raise ModuleNotFoundError(\"No module named 'pydantic'\", name='pydantic')")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    result = finish(shell(program=("-m", module), env={"PYTHONPATH": path}))
    assert result.code == 2
    assert result.err == "error: pydantic is not installed; it comes with: pip install 'charrnn[train]'\n"
