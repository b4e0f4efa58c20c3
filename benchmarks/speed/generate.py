"""Generation speed: this project's engine beside torch, in one process and in turns.

    python -m benchmarks.speed.generate [--rnn GRU] [--hidden-dim 256] ...

One stream, one thread, the same random weights for all. The sides:

- torch eager, top-k: a model of nn.Embedding, nn.GRU or nn.LSTM and nn.Linear, stepped from Python, its logits sampled
  by torch.topk, softmax and multinomial, as char-rnn programs and nanoGPT do.
- onnxruntime's own GRU or LSTM operator, stepped from Python and not sampled: what a plain export of torch's gives.
- stepped: this project's file, a run of the session a character, sampled by numpy.
- loop: the same file's own loop, in float32 and int8; and 64 streams of it.

Every round takes each side once, in turn, for about `--seconds`; the table has medians and quartiles over the rounds,
and of the ratios to the first side, taken within a round.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import onnx
import onnxruntime
import torch
import typer
from onnx import TensorProto, helper, numpy_helper

from benchmarks.machine import machine
from benchmarks.scaling.estimates import spread
from charrnn.config import ModelConfig, RunConfig
from charrnn.model.rnn import CharRNN
from charrnn.sampling import SamplingOptions
from charrnn.vocab import Vocab
from infer.bench import chars_per_s
from infer.engine import Engine
from infer.model_file.loader import FORMAT_VERSION
from train.export.exporter import ExactModel, write_checked
from train.export.parity import step_of
from train.export.quantize import Precision
from train.export.weights import fold

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_SYMBOLS = 65
_STREAMS = 64
_PRECISIONS: tuple[Precision, ...] = ("fp32", "int8")


@torch.inference_mode()
def torch_characters(model: CharRNN, temperature: float, top_k: int) -> Iterator[int]:
    """The usual loop: one character a step, drawn by torch."""
    state, token = model.zero_state(1), torch.zeros(1, 1, dtype=torch.int64)
    while True:
        logits, state = model(token, state)
        kept, ids = (logits[0, -1] / temperature).topk(top_k)
        token = ids[torch.multinomial(kept.softmax(-1), 1)][None]
        yield int(token)


def operator_session(model: CharRNN) -> onnxruntime.InferenceSession:
    """The network of one character by ONNX's own GRU or LSTM, with the model's sizes (its values do not matter)."""
    m = model.config
    gates, states = {"GRU": (3, ["h"]), "LSTM": (4, ["h", "c"])}[m.rnn]
    width, draw = m.hidden_dim, np.random.default_rng(0)
    arrays: dict[str, tuple[int, ...]] = {"embedding": (_SYMBOLS, m.embedding_dim), "head": (width, _SYMBOLS)}
    nodes = [helper.make_node("Gather", ["embedding", "ids"], ["x0"])]
    for i in range(m.num_layers):
        arrays[f"W{i}"] = (1, gates * width, m.embedding_dim if i == 0 else width)
        arrays |= {f"R{i}": (1, gates * width, width), f"B{i}": (1, 2 * gates * width)}
        inputs = [f"x{i}", f"W{i}", f"R{i}", f"B{i}", "", *(f"{s}{i}" for s in states)]
        outputs = [f"y{i}", *(f"{s}{i}_next" for s in states)]
        extra: dict[str, Any] = {"linear_before_reset": 1} if m.rnn == "GRU" else {}
        nodes.append(helper.make_node(m.rnn, inputs, outputs, hidden_size=width, **extra))
        nodes.append(helper.make_node("Squeeze", [f"y{i}", "axis"], [f"x{i + 1}"]))
    nodes.append(helper.make_node("MatMul", [f"x{m.num_layers}", "head"], ["logits"]))
    names = [f"{s}{i}" for s in states for i in range(m.num_layers)]
    tensor = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "operators",
        [tensor("ids", TensorProto.INT64, [1, 1])] + [tensor(n, TensorProto.FLOAT, [1, 1, width]) for n in names],
        [tensor("logits", TensorProto.FLOAT, [1, 1, _SYMBOLS])]
        + [tensor(f"{n}_next", TensorProto.FLOAT, [1, 1, width]) for n in names],
        [numpy_helper.from_array((draw.random(s) / 10).astype(np.float32), n) for n, s in arrays.items()]
        + [numpy_helper.from_array(np.array([1]), "axis")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(proto)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def operator_steps(session: onnxruntime.InferenceSession) -> Iterator[int]:
    """Runs that session over and over; yields a 0 a step."""
    names = [node.name for node in session.get_inputs()][1:]
    shapes = {node.name: node.shape for node in session.get_inputs()}
    state = {name: np.zeros(shapes[name], np.float32) for name in names}
    outputs = ["logits", *(f"{name}_next" for name in names)]
    while True:
        _, *after = session.run(outputs, {"ids": np.zeros((1, 1), np.int64), **state})
        state = dict(zip(names, after, strict=True))
        yield 0


def per_second(make: Callable[[], Iterator[int]], seconds: float) -> float:
    """Items a second of an iterator, the first ones left out."""
    items = make()
    for _ in range(20):
        next(items)
    count, began = 0, time.perf_counter()
    while (taken := time.perf_counter() - began) < seconds:
        next(items)
        count += 1
    return count / taken


def files(model: CharRNN, folder: Path) -> dict[Precision, Engine]:
    """The model in each precision."""
    vocab = Vocab.of_chars(map(chr, range(ord(" "), ord(" ") + _SYMBOLS)))
    weights = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    engines: dict[Precision, Engine] = {}
    for precision in _PRECISIONS:
        metadata = {
            "charrnn.format_version": str(FORMAT_VERSION),
            "charrnn.precision": "fp32",
            "charrnn.metrics": "{}",
            "charrnn.vocab": vocab.to_json(),
            "charrnn.config": RunConfig(model=model.config).model_dump_json(),
        }
        exact = ExactModel(step_of(model), model.config, vocab, fold(model.config, weights), metadata, folder)
        write_checked(exact, folder / f"{precision}.onnx", precision)
        engines[precision] = Engine(folder / f"{precision}.onnx", 1)
    return engines


@app.command()
def generate(
    rnn: Annotated[Literal["GRU", "LSTM"], typer.Option(help="Recurrent cell.")] = "GRU",
    hidden_dim: Annotated[int, typer.Option(help="Width of a layer's state.", min=1)] = 256,
    num_layers: Annotated[int, typer.Option(help="Recurrent layers.", min=1)] = 2,
    embedding_dim: Annotated[int, typer.Option(help="Width of a character's vector.", min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="Of the sampling.", min=0.01)] = 0.8,
    top_k: Annotated[int, typer.Option(help="Of the sampling.", min=1, max=_SYMBOLS)] = 40,
    rounds: Annotated[int, typer.Option(help="Turns of each side.", min=2)] = 9,
    seconds: Annotated[float, typer.Option(help="Length of a turn.", min=0.01)] = 0.4,
) -> None:
    """Compare generation by torch, by onnxruntime's operators and by this project's engine."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = ModelConfig(rnn=rnn, hidden_dim=hidden_dim, num_layers=num_layers, embedding_dim=embedding_dim)
    model = CharRNN(shape, _SYMBOLS).eval()
    options = SamplingOptions(temperature, top_k)
    with tempfile.TemporaryDirectory() as folder:
        engines = files(model, Path(folder))
        session = operator_session(model)
        sides: dict[str, Callable[[], float]] = {
            "torch eager, top-k": partial(per_second, partial(torch_characters, model, temperature, top_k), seconds),
            f"onnxruntime {rnn} op, not sampled": partial(per_second, partial(operator_steps, session), seconds),
            "stepped, fp32": partial(chars_per_s, engines["fp32"], 1, options, in_graph=False),
        }
        sides |= {f"loop, {p}": partial(chars_per_s, engines[p], 1, options) for p in _PRECISIONS}
        sides |= {
            f"loop, {p}, {_STREAMS} streams": partial(chars_per_s, engines[p], _STREAMS, options) for p in _PRECISIONS
        }
        taken: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, measure in sides.items():
                taken[name].append(measure())
        sizes = {p: engine.path.stat().st_size for p, engine in engines.items()}
    print("\n".join(table(shape, taken, sizes, rounds)))


def table(shape: ModelConfig, taken: dict[str, list[float]], sizes: dict[Precision, int], rounds: int) -> list[str]:
    """The lines to print. taken: characters a second of every side and round."""
    here: dict[str, Any] = machine()
    first = next(iter(taken.values()))
    lines = [
        f"machine  {here['cpu']}, {here['cores']} cores; torch {here['torch']}, onnxruntime {onnxruntime.__version__}; "
        f"{here['time']}",
        f"model    {shape.rnn} {shape.num_layers} x {shape.hidden_dim}, embedding {shape.embedding_dim}, V {_SYMBOLS}; "
        + ", ".join(f"{p} {size / 2**20:.2f} MiB" for p, size in sizes.items()),
        f"measured {rounds} rounds, one thread; median (quartiles)",
        "",
        f"{'':<36}{'characters/s':>32}{'us a character':>16}{'of the first':>26}",
    ]
    for name, values in taken.items():
        speed, ratio = spread(values), spread([v / f for v, f in zip(values, first, strict=True)])
        lines.append(
            f"{name:<36}{f'{speed.median:,.0f} ({speed.q1:,.0f} to {speed.q3:,.0f})':>32}{1e6 / speed.median:>16.1f}"
            f"{f'{ratio.median:.2f} ({ratio.q1:.2f} to {ratio.q3:.2f})':>26}"
        )
    return lines


if __name__ == "__main__":
    app()
