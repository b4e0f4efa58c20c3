"""A checkpoint, or a model file, -> one self-contained ONNX file -> parity check.

`python -m train.export RUN|CHECKPOINT|MODEL.onnx [--out FILE] [--precision int8]`
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import torch
import typer
from numpy.typing import NDArray

from charrnn.cli import run_command
from charrnn.config import ModelConfig
from charrnn.data.corpus import prepare
from charrnn.errors import ConfigError, CorpusError, ExportError
from charrnn.io import temporary
from charrnn.model.rnn import CharRNN
from charrnn.vocab import Vocab
from infer import scoring
from infer.engine import Engine
from train.checkpoint.format import Checkpoint, load_for_inference
from train.export.convert import is_model_file, matrices_of_file
from train.export.onnx_graph import Weights, build_of_matrices, build_onnx, matrices_of
from train.export.quantize import Precision
from train.texts import Encoding, Exclude, GivenText, Include, TextField

FORMAT_VERSION = 3
PARITY_TOLERANCE = 1e-4
# Mean nats by which a rounded model's predictions may lie from the exact one's, after random characters and states.
# Real text costs a hundredth of that (docs/performance.md); weights in a wrong place cost more than 1.
DIVERGENCE_LIMIT = {"int8": 0.05, "int4": 0.5}

State = tuple[NDArray[np.float32], ...]
Step = Callable[[NDArray[np.int64], State], tuple[NDArray[np.float32], State]]


class Rounding(StrEnum):
    """What the weights are kept in."""

    FP32 = "fp32"
    INT8 = "int8"
    INT4 = "int4"


def export_model(model: CharRNN, vocab: Vocab, metadata: dict[str, str], out: Path) -> float:
    """Writes `out` and returns the largest |difference| of its logits from torch's.

    Raises: ExportError, leaving no file, when the difference reaches `PARITY_TOLERANCE` or the disk refuses.
    """
    return write_checked(build_onnx(model.config, vocab, weights_of(model), metadata), step_of(model), out)


def weights_of(model: CharRNN) -> Weights:
    """A network's state dict as arrays."""
    return {name: tensor.detach().float().cpu().numpy() for name, tensor in model.state_dict().items()}


def write_checked(
    proto: onnx.ModelProto, exact: Step, out: Path, precision: Precision = "fp32", ids: NDArray[Any] | None = None
) -> float:
    """Writes a graph to `out`, and returns how far from `exact` it is: by `parity`, or by `divergence` if rounded.

    ids: (N,) a text on which the file is scored; the losses become those of its metadata.
    Raises: ExportError, leaving no file, when it is too far or the disk refuses.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with temporary(out) as partial:
            partial.write_bytes(proto.SerializeToString())
            engine = Engine(partial)
            difference = parity(exact, engine) if precision == "fp32" else divergence(exact, engine)
            limit = DIVERGENCE_LIMIT.get(precision, PARITY_TOLERANCE)
            if not difference < limit:
                raise ExportError(
                    f"onnxruntime's logits differ from torch's by {difference:.2e} (limit {limit:.0e}), so "
                    f"{out} was not written; update onnxruntime, and report this with both versions if it stays"
                )
            if ids is not None:
                record_scores(proto, engine, ids)
                partial.write_bytes(proto.SerializeToString())
            partial.replace(out)
    except OSError as error:
        raise ExportError(f"cannot write {out}: {error.strerror}; free the disk or choose another --out") from None
    return difference


def step_of(model: CharRNN) -> Step:
    """The network as a function of arrays, in float32 on the CPU."""
    model = model.eval().cpu().float()

    @torch.no_grad()
    def step(ids: NDArray[np.int64], state: State) -> tuple[NDArray[np.float32], State]:
        logits, after = model(torch.from_numpy(ids), tuple(torch.from_numpy(part) for part in state))
        return logits.numpy(), tuple(part.numpy() for part in after)

    return step


def parity(exact: Step, engine: Engine) -> float:
    """The largest |difference| of logits and states between two implementations of a model."""
    worst = 0.0
    for (logits, state), (theirs, theirs_next) in _both(exact, engine):
        for ours, other in zip((logits, *state), (theirs, *theirs_next), strict=True):
            # max() passes over a NaN, and a NaN must fail.
            difference = float(np.abs(ours - other).max())
            worst = difference if math.isnan(difference) else max(worst, difference)
    return worst


def divergence(exact: Step, engine: Engine) -> float:
    """The mean Kullback-Leibler divergence, in nats, of an engine's predictions from the exact ones."""

    def log_shares(logits: NDArray[np.float32]) -> NDArray[np.float64]:
        wide = logits.astype(np.float64)
        return wide - np.logaddexp.reduce(wide, axis=-1, keepdims=True)

    found = []
    for (logits, _), (theirs, _) in _both(exact, engine):
        p, q = log_shares(logits), log_shares(theirs)
        found.append((np.exp(p) * (p - q)).sum(axis=-1).ravel())
    return float(np.concatenate(found).mean())


def _both(exact: Step, engine: Engine) -> list[tuple[tuple[Any, State], tuple[Any, State]]]:
    """What both make of batches {1, 3} x lengths {1, 7}, each of random ids and a random state from a fixed seed."""
    draw = np.random.default_rng(0)
    found = []
    for batch, length in ((1, 1), (1, 7), (3, 1), (3, 7)):
        ids = draw.integers(len(engine.vocab), size=(batch, length))
        # h lies between -1 and 1 by nature.
        state = tuple(draw.uniform(-1, 1, part.shape).astype(np.float32) for part in engine.zero_state(batch))
        found.append((exact(ids, state), engine.step(ids, state)))
    return found


def record_scores(proto: onnx.ModelProto, engine: Engine, ids: NDArray[Any]) -> None:
    """Puts the engine's losses on a text, ids (N,), into a graph's metadata, as `infer score` gives them."""
    metrics = dict(engine.metrics)
    for name, score in scoring.score(engine, ids).items():
        metrics |= {f"val/{name}/loss": score.nats_per_char, f"val/{name}/bpc": score.bits_per_char}
    entry = next(p for p in proto.metadata_props if p.key == "charrnn.metrics")
    entry.value = json.dumps(metrics)


def export_checkpoint(checkpoint: Checkpoint, out: Path) -> float:
    """Exports a checkpoint to `out` in float32; returns the parity difference. Raises: ExportError."""
    return export_model(model_of(checkpoint), checkpoint.vocab, metadata_of(checkpoint), out)


def model_of(checkpoint: Checkpoint) -> CharRNN:
    """The network with a checkpoint's weights."""
    model = CharRNN(checkpoint.config.model, len(checkpoint.vocab), checkpoint.vocab.document_end_id)
    model.load_state_dict(checkpoint.weights)
    return model


def metadata_of(checkpoint: Checkpoint) -> dict[str, str]:
    """The model file's metadata: all that a stranger needs to use the file and to know where it came from."""
    checkpoint = without_paths(checkpoint)
    corpus = checkpoint.trainer["corpus"]
    return {
        "charrnn.format_version": str(FORMAT_VERSION),
        "charrnn.precision": "fp32",
        "charrnn.vocab": checkpoint.vocab.to_json(),
        "charrnn.config": checkpoint.config.model_dump_json(),
        "charrnn.metrics": json.dumps(checkpoint.trainer["metrics"]),
        "charrnn.corpus": json.dumps({name: corpus[name] for name in ("name", "source", "num_chars")}),
        "charrnn.corpus_sha256": corpus["sha256"],
    }


def without_paths(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint without the folders of the machine that trained it, which are nobody's business who gets it."""
    config, corpus = checkpoint.config, checkpoint.trainer["corpus"]
    source = without_folders(corpus["source"])
    data = config.data.model_copy(update={"source": source, "cache_dir": "", "mirror": ""})
    train = config.train.model_copy(update={"run_dir": "", "init_from": without_folders(config.train.init_from)})
    return replace(
        checkpoint,
        config=config.model_copy(update={"data": data, "train": train}),
        trainer={**checkpoint.trainer, "corpus": {**corpus, "source": source}},
    )


def rounded(metadata: dict[str, str], precision: Precision) -> dict[str, str]:
    """The metadata of a file in that precision; the losses of the exact weights go under `fp32/`."""
    if precision == "fp32":
        return metadata
    metrics = json.loads(metadata["charrnn.metrics"])
    metrics = {f"fp32/{name}" if name.startswith("val/") else name: value for name, value in metrics.items()}
    return metadata | {"charrnn.precision": precision, "charrnn.metrics": json.dumps(metrics)}


def without_folders(source: str) -> str:
    """The last part of a path or address, without its query: enough to recognise the text by."""
    return re.split(r"[?#]", source)[0].replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]


def validation_ids(text: GivenText, config: dict[str, Any], vocab: Vocab) -> NDArray[Any]:
    """The validation split of a text, (N,), as a run with this config has it. Raises: ConfigError, CorpusError."""
    recorded = config.get("data")
    corpus = prepare(text.config(recorded if isinstance(recorded, dict) else {}), progress=True)
    if corpus.vocab != vocab:
        raise CorpusError(
            f"{text.data} has other characters than the text that the model was trained on; give that text"
        )
    return np.asarray(corpus.val)


@dataclass(frozen=True)
class Exact:
    """A model as it is before rounding. matrices: of onnx_graph.matrices_of. home: where its files lie."""

    step: Step
    shape: ModelConfig
    vocab: Vocab
    matrices: Weights
    metadata: dict[str, str]
    home: Path


def exact_model(source: Path) -> Exact:
    """What a run, a checkpoint or a float32 model file holds. Raises: CheckpointError, ModelFileError, ExportError."""
    if is_model_file(source):
        engine = Engine(source)
        told = engine.config["model"]
        shape = ModelConfig(rnn=told["rnn"], num_layers=told["num_layers"], hidden_dim=told["hidden_dim"])
        metadata = {"charrnn.metrics": "{}"} | engine.metadata
        metadata |= {"charrnn.format_version": str(FORMAT_VERSION), "charrnn.precision": "fp32"}
        matrices = matrices_of_file(source, shape, engine.metadata)
        return Exact(engine.step, shape, engine.vocab, matrices, metadata, source.parent)
    checkpoint = load_for_inference(source)
    model = model_of(checkpoint)
    matrices = matrices_of(model.config, weights_of(model))
    home = source if (source / "best").is_dir() else source.parent
    return Exact(step_of(model), model.config, checkpoint.vocab, matrices, metadata_of(checkpoint), home)


def default_name(source: Path, precision: Precision) -> str:
    """What the file is called when nobody says: model.onnx, model-int8.onnx, or after the model file it is made of."""
    if is_model_file(source):
        return f"{source.stem}-{precision}.onnx"
    return "model.onnx" if precision == "fp32" else f"model-{precision}.onnx"


def export(source: Path, out: Path | None, precision: Precision, text: GivenText | None) -> tuple[Path, float, str]:
    """Writes a run, a checkpoint or a model file as a model file.

    text: the training text, on which to measure the loss of the file. Returns the file, its difference from the exact
    model, and a line on what it is. Raises: CharRNNError.
    """
    exact = exact_model(source)
    out = out or exact.home / default_name(source, precision)
    if not out.name or out.is_dir():
        raise ExportError(f"--out {out} is a folder; name a file in it, such as {out / 'model.onnx'}")
    if out.exists() and not out.is_file():  # a device or pipe would be replaced by the file
        raise ExportError(f"--out {out} is not a regular file; name another")
    ids = validation_ids(text, json.loads(exact.metadata["charrnn.config"]), exact.vocab) if text else None
    metadata = rounded(exact.metadata, precision)
    proto = build_of_matrices(exact.shape, exact.vocab, exact.matrices, metadata, precision)
    difference = write_checked(proto, exact.step, out, precision, ids)
    metrics = Engine(out).metrics
    what = f"{out.stat().st_size / 2**20:.2f} MiB, {precision}, step {metrics.get('step', 'unknown')}"
    if precision == "fp32":
        return out, difference, f"{what}, largest difference from torch {difference:.1e}"
    losses = [f"{p} {metrics[f'val/{p}/loss']:.4f}" for p in ("stream", "windows") if ids is not None]
    measured = f"validation loss {', '.join(losses)} nats/char" if losses else "its loss not measured: give --data TEXT"
    return out, difference, f"{what}, predictions {difference:.1e} nats from the exact ones; {measured}"


def command(
    source: Annotated[
        Path,
        typer.Argument(metavar="RUN|CHECKPOINT|MODEL", help="A run folder (its best/), a checkpoint or a model file."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="The file to write.", show_default="model.onnx or model-int8.onnx in the run folder"),
    ] = None,
    precision: Annotated[Rounding, typer.Option(help="What the weights are kept in.")] = Rounding.FP32,
    data: Annotated[
        str | None,
        typer.Option(
            help="The training text (file or name): measure the file's validation loss on it.",
            show_default="not measured",
        ),
    ] = None,
    include: Include = None,
    exclude: Exclude = None,
    text_field: TextField = None,
    encoding: Encoding = None,
) -> None:
    """Write a checkpoint or a model file as one ONNX file and check it against the exact model."""
    text = GivenText(data, include or None, exclude or None, text_field, encoding)
    if not data and text != GivenText(data):
        raise ConfigError("--include, --exclude, --text-field and --encoding are of the text; name it with --data")
    path, _, line = export(source, out, precision.value, text if data else None)
    typer.echo(f"{path}  {line}")


def main() -> None:
    """Entry of `python -m train.export`."""
    run_command(lambda: typer.run(command))
