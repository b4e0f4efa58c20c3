"""Generation speed: the engine beside torch and onnxruntime's own operators, in one process and in turns.

    python -m benchmarks.speed.generate [--rnn GRU] [--hidden-dim 256] ...

One stream, one thread, the same random weights for all. The sides:

- torch eager, top-k: nn.Embedding, nn.GRU or nn.LSTM and nn.Linear, stepped from Python, the logits sampled by
  torch.topk, softmax and multinomial, as char-rnn programs and nanoGPT do.
- onnxruntime's GRU or LSTM operator, stepped from Python and not sampled: what a plain export of torch's gives.
- stepped: this project's file, one session run a character, sampled by numpy.
- loop: the loop inside the same file, in float32 and int8; and 64 streams of it.

Each round takes every side once, in turn, for about `--seconds`; the table has medians and quartiles over the rounds,
and of the ratios to the first side within a round.
"""

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import onnxruntime
import torch
import typer
from onnx import TensorProto, helper, numpy_helper

from benchmarks.common import Cell, HiddenDim, NumLayers, Rnn, columns, in_turns, machine_line, quartiles, ratios, run
from charrnn.config import ModelConfig, RunConfig
from charrnn.model.rnn import CharRNN
from charrnn.sampling import SamplingOptions
from charrnn.vocab import Vocab
from infer.bench import chars_per_s
from infer.engine import Engine
from train.checkpoint.format import Checkpoint, save_for_inference
from train.export.exporter import export
from train.export.quantize import Precision

_SYMBOLS = 65
_STREAMS = 64
_PRECISIONS: tuple[Precision, ...] = ("fp32", "int8")
_WIDTHS = (36, 32, 16, 26)


@torch.inference_mode()
def torch_characters(model: CharRNN, temperature: float, top_k: int) -> Iterator[int]:
    """Draws one character a step with torch."""
    state, token = model.zero_state(1), torch.zeros(1, 1, dtype=torch.int64)
    while True:
        logits, state = model(token, state)  # (1, 1, V)
        kept, ids = (logits[0, -1] / temperature).topk(top_k)  # each (k,)
        token = ids[torch.multinomial(kept.softmax(-1), 1)][None]  # (1, 1)
        yield int(token)


def operator_session(m: ModelConfig) -> onnxruntime.InferenceSession:
    """Builds the network of one character from ONNX's own GRU or LSTM; its weights are random."""
    gates, states = {"GRU": (3, ["h"]), "LSTM": (4, ["h", "c"])}[m.rnn]
    width, draw = m.hidden_dim, np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"embedding": (_SYMBOLS, m.embedding_dim), "head": (width, _SYMBOLS)}
    nodes = [helper.make_node("Gather", ["embedding", "ids"], ["x0"])]
    for i in range(m.num_layers):
        shapes[f"W{i}"] = (1, gates * width, width if i else m.embedding_dim)
        shapes |= {f"R{i}": (1, gates * width, width), f"B{i}": (1, 2 * gates * width)}
        inputs = [f"x{i}", f"W{i}", f"R{i}", f"B{i}", "", *(f"{s}{i}" for s in states)]
        outputs = [f"y{i}", *(f"{s}{i}_next" for s in states)]
        extra: dict[str, Any] = {"linear_before_reset": 1} if m.rnn == "GRU" else {}
        nodes.append(helper.make_node(m.rnn, inputs, outputs, hidden_size=width, **extra))
        nodes.append(helper.make_node("Squeeze", [f"y{i}", "axis"], [f"x{i + 1}"]))
    nodes.append(helper.make_node("MatMul", [f"x{m.num_layers}", "head"], ["logits"]))
    tensor, names = helper.make_tensor_value_info, [f"{s}{i}" for s in states for i in range(m.num_layers)]

    def parts(suffix: str) -> list[onnx.ValueInfoProto]:
        return [tensor(name + suffix, TensorProto.FLOAT, [1, 1, width]) for name in names]

    weights = [numpy_helper.from_array((draw.random(s) / 10).astype(np.float32), n) for n, s in shapes.items()]
    graph = helper.make_graph(
        nodes,
        "operators",
        [tensor("ids", TensorProto.INT64, [1, 1]), *parts("")],
        [tensor("logits", TensorProto.FLOAT, [1, 1, _SYMBOLS]), *parts("_next")],
        [*weights, numpy_helper.from_array(np.array([1]), "axis")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(proto)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def operator_steps(session: onnxruntime.InferenceSession) -> Iterator[int]:
    """Runs that session over and over, its states fed back; yields 0 at every step."""
    shapes = {node.name: node.shape for node in session.get_inputs()}
    state = {name: np.zeros(shape, np.float32) for name, shape in shapes.items() if name != "ids"}
    outputs = ["logits", *(f"{name}_next" for name in state)]
    while True:
        _, *after = session.run(outputs, {"ids": np.zeros((1, 1), np.int64), **state})
        state = dict(zip(state, after, strict=True))
        yield 0


def per_second(make: Callable[[], Iterator[int]], seconds: float) -> float:
    """Returns the items a second of an iterator, the first 20 left out."""
    items, count = itertools.islice(make(), 20, None), 0
    next(items)
    began = time.perf_counter()
    while (taken := time.perf_counter() - began) < seconds:
        next(items)
        count += 1
    return count / taken


def engines_of(model: CharRNN, folder: Path) -> dict[str, Engine]:
    """Exports the model in each precision, as `python -m train.export` does."""
    vocab = Vocab.of_chars(map(chr, range(ord(" "), ord(" ") + _SYMBOLS)))
    corpus = {"name": "random", "source": "random", "num_chars": 0, "sha256": "0" * 64}
    record = {"step": 0, "metrics": {}, "corpus": corpus}
    save_for_inference(folder / "best", Checkpoint(RunConfig(model=model.config), vocab, model.state_dict(), record))
    return {p: Engine(export(folder, folder / f"{p}.onnx", p, None)[0], 1) for p in _PRECISIONS}


def generate(
    rnn: Rnn = Cell.GRU,
    hidden_dim: HiddenDim = 256,
    num_layers: NumLayers = 2,
    embedding_dim: Annotated[int, typer.Option(help="Width of a character's embedding.", min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="Of the sampling.", min=0.01)] = 0.8,
    top_k: Annotated[int, typer.Option(help="Of the sampling.", min=1, max=_SYMBOLS)] = 40,
    rounds: Annotated[int, typer.Option(help="Turns of each side.", min=2)] = 9,
    seconds: Annotated[float, typer.Option(help="Length of a turn of the first two sides.", min=0.01)] = 0.4,
) -> None:
    """Compare generation by torch, by onnxruntime's operators and by this project's engine."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = ModelConfig(rnn=rnn.value, hidden_dim=hidden_dim, num_layers=num_layers, embedding_dim=embedding_dim)
    model, session = CharRNN(shape, _SYMBOLS).eval(), operator_session(shape)
    options = SamplingOptions(temperature, top_k)
    with tempfile.TemporaryDirectory() as folder:
        engines = engines_of(model, Path(folder))
        sides: dict[str, Callable[[], float]] = {
            "torch eager, top-k": partial(per_second, partial(torch_characters, model, temperature, top_k), seconds),
            f"onnxruntime {rnn} op, not sampled": partial(per_second, partial(operator_steps, session), seconds),
            "stepped, fp32": partial(chars_per_s, engines["fp32"], 1, options, in_graph=False),
        }
        for streams in (1, _STREAMS):
            suffix = f", {streams} streams" if streams > 1 else ""
            sides |= {f"loop, {p}{suffix}": partial(chars_per_s, e, streams, options) for p, e in engines.items()}
        taken = in_turns(sides, rounds)
        sizes = ", ".join(f"{p} {engine.path.stat().st_size / 2**20:.2f} MiB" for p, engine in engines.items())
    print(machine_line())
    print(f"model    {rnn} {num_layers} x {hidden_dim}, embedding {embedding_dim}, V {_SYMBOLS}; {sizes}")
    print(f"measured {rounds} rounds, one thread; median (quartiles)\n")
    print(columns(["", "characters/s", "us a character", "of the first"], _WIDTHS))
    first = next(iter(taken.values()))
    for name, values in taken.items():
        speed = quartiles(values)
        print(columns([name, speed.show(), f"{1e6 / speed.median:.1f}", ratios(values, first).show(".2f")], _WIDTHS))


if __name__ == "__main__":
    run(generate)
