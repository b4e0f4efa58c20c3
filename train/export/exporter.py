"""A checkpoint, or a float32 model file, as one self-contained model file, checked against the exact model."""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from charrnn.config import ModelConfig
from charrnn.data.corpus import prepare
from charrnn.errors import CorpusError, ExportError
from charrnn.io import temporary
from charrnn.vocab import Vocab
from infer import scoring
from infer.engine import Engine
from infer.model_file.loader import FORMAT_VERSION
from train.checkpoint.format import Checkpoint, load_for_inference, model_of
from train.export.onnx_graph import build_onnx
from train.export.parity import Step, divergence, parity, step_of
from train.export.quantize import Precision
from train.export.weights import Weights, fold, weights_in
from train.given_text import GivenText

PARITY_TOLERANCE = 1e-4
# Mean nats by which an int8 file's predictions may differ from the exact ones, after random characters and states.
# Real text costs a hundredth of that (docs/performance.md); weights in a wrong place cost more than 1.
DIVERGENCE_LIMIT = 0.05


@dataclass(frozen=True)
class ExactModel:
    """A model before quantization.

    Attributes:
        step: The network as a function of arrays.
        config: Its shape.
        vocab: Its vocabulary.
        folded: Its weights, of `train.export.weights.fold`.
        metadata: The file's metadata in float32.
    """

    step: Step
    config: ModelConfig
    vocab: Vocab
    folded: Weights
    metadata: dict[str, str]


def export(source: Path, out: Path | None, precision: Precision, text: GivenText | None) -> tuple[Path, float, str]:
    """Write a run, a checkpoint or a model file as a model file.

    Args:
        source: A run folder, a checkpoint folder or a float32 model file.
        out: The file to write; None is `default_name` in the run folder, or beside the checkpoint or file.
        precision: Of the weights.
        text: The training text, on which to measure the file's loss.

    Returns:
        The file, its difference from the exact model, and a line that describes it.

    Raises:
        CharRNNError: for a source that can't be read, a file that can't be written, or a difference above the limit.
    """
    exact = exact_model(source)
    folder = source if (source / "best").is_dir() else source.parent
    out = out or folder / default_name(source, precision)
    if not out.name or out.is_dir():
        raise ExportError(f"--out {out} is a folder; name a file in it, such as {out / 'model.onnx'}")
    if out.exists() and not out.is_file():  # a device or pipe would be replaced by the file
        raise ExportError(f"--out {out} is not a regular file; name another")
    ids = validation_ids(text, json.loads(exact.metadata["charrnn.config"]), exact.vocab) if text else None
    difference = write_checked(exact, out, precision, ids)
    return out, difference, _summary(out, precision, difference, ids is not None)


def export_checkpoint(checkpoint: Checkpoint, out: Path) -> float:
    """Write a checkpoint in float32; returns the parity difference. Raises: ExportError."""
    return write_checked(model_of_checkpoint(checkpoint), out)


def write_checked(
    exact: ExactModel, out: Path, precision: Precision = "fp32", ids: NDArray[Any] | None = None
) -> float:
    """Write a model file, and returns its difference from the exact model: by `parity`, or in int8 by `divergence`.

    Args:
        exact: The model.
        out: The file.
        precision: Of the weights.
        ids: (N,), a text on which the file is scored; the losses go into its metadata.

    Raises:
        ExportError: leaving no file, if the difference reaches the limit or the disk refuses.
    """
    metadata = _metadata_in(exact.metadata, precision)
    proto = build_onnx(exact.config, exact.vocab, exact.folded, metadata, precision)
    measure, limit = (parity, PARITY_TOLERANCE) if precision == "fp32" else (divergence, DIVERGENCE_LIMIT)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with temporary(out) as partial:
            partial.write_bytes(proto.SerializeToString())
            engine = Engine(partial)
            difference = measure(exact.step, engine)
            if not difference < limit:
                raise ExportError(
                    f"onnxruntime's logits differ from torch's by {difference:.2e} (limit {limit:.0e}), so "
                    f"{out} was not written; update onnxruntime, and report this with both versions if it stays"
                )
            if ids is not None:
                _record_scores(proto, engine, ids)
                partial.write_bytes(proto.SerializeToString())
            partial.replace(out)
    except OSError as error:
        raise ExportError(f"cannot write {out}: {error.strerror}; free the disk or choose another --out") from None
    return difference


def _record_scores(proto: onnx.ModelProto, engine: Engine, ids: NDArray[Any]) -> None:
    """Write the engine's losses on a text, ids (N,), into the metadata, as `infer score` computes them."""
    metrics = dict(engine.metrics)
    for name, score in scoring.score(engine, ids).items():
        metrics |= {f"val/{name}/loss": score.nats_per_char, f"val/{name}/bpc": score.bits_per_char}
    entry = next(p for p in proto.metadata_props if p.key == "charrnn.metrics")
    entry.value = json.dumps(metrics)


# ---- sources


def is_model_file(path: Path) -> bool:
    """Whether a path names a model file, and not a run or a checkpoint, which are folders."""
    return path.suffix == ".onnx" or path.is_file()


def exact_model(source: Path) -> ExactModel:
    """Return what a source holds. Raises: CheckpointError, ModelFileError, ExportError."""
    return _model_of_file(source) if is_model_file(source) else model_of_checkpoint(load_for_inference(source))


def model_of_checkpoint(checkpoint: Checkpoint) -> ExactModel:
    """Return a checkpoint's model."""
    model = model_of(checkpoint)
    weights = {name: tensor.detach().float().cpu().numpy() for name, tensor in model.state_dict().items()}
    folded = fold(model.config, weights)
    return ExactModel(step_of(model), model.config, checkpoint.vocab, folded, metadata_of(checkpoint))


def _model_of_file(path: Path) -> ExactModel:
    """Return a float32 model file's model. Raises: ModelFileError, ExportError for an int8 file."""
    engine = Engine(path)
    folded = weights_in(onnx.load(path, load_external_data=False))
    if folded is None:
        raise ExportError(
            f"{path} is {engine.metadata.get('charrnn.precision')}: its weights are rounded; export from the run, a "
            "checkpoint or a float32 model file"
        )
    model = engine.config["model"]
    config = ModelConfig(rnn=model["rnn"], num_layers=model["num_layers"], hidden_dim=model["hidden_dim"])
    metadata = {"charrnn.metrics": "{}"} | engine.metadata | {"charrnn.precision": "fp32"}
    return ExactModel(engine.step, config, engine.vocab, folded, metadata)


def default_name(source: Path, precision: Precision) -> str:
    """Return model.onnx, model-int8.onnx, or a name after the model file that the file is made of."""
    if is_model_file(source):
        return f"{source.stem}-{precision}.onnx"
    return "model.onnx" if precision == "fp32" else f"model-{precision}.onnx"


def validation_ids(text: GivenText, config: dict[str, Any], vocab: Vocab) -> NDArray[Any]:
    """Return a text's validation split, (N,), as a run with this config has it. Raises: ConfigError, CorpusError."""
    recorded = config.get("data")
    corpus = prepare(text.config(recorded if isinstance(recorded, dict) else {}))
    if corpus.vocab != vocab:
        raise CorpusError(
            f"{text.data} has other characters than the text that the model was trained on; give that text"
        )
    return np.asarray(corpus.val)


# ---- metadata


def metadata_of(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the model file's metadata: how to use the file, and where it came from."""
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
    """Remove the folders of the machine that trained the model, which are private."""
    config, corpus = checkpoint.config, checkpoint.trainer["corpus"]
    source = without_folders(corpus["source"])
    data = config.data.model_copy(update={"source": source, "cache_dir": "", "mirror": ""})
    train = config.train.model_copy(update={"run_dir": "", "init_from": without_folders(config.train.init_from)})
    distill = config.distill.model_copy(update={"teachers": tuple(map(without_folders, config.distill.teachers))})
    return replace(
        checkpoint,
        config=config.model_copy(update={"data": data, "train": train, "distill": distill}),
        trainer={**checkpoint.trainer, "corpus": {**corpus, "source": source}},
    )


def without_folders(source: str) -> str:
    """Return the last part of a path or address, without its query: enough to recognise the text by."""
    return re.split(r"[?#]", source)[0].replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]


def _metadata_in(metadata: dict[str, str], precision: Precision) -> dict[str, str]:
    """Return the metadata of a file in that precision; the losses of the exact weights go under `fp32/`."""
    if precision == "fp32":
        return metadata
    metrics = json.loads(metadata["charrnn.metrics"])
    metrics = {f"fp32/{name}" if name.startswith("val/") else name: value for name, value in metrics.items()}
    return metadata | {"charrnn.precision": precision, "charrnn.metrics": json.dumps(metrics)}


def _summary(out: Path, precision: Precision, difference: float, is_scored: bool) -> str:
    metrics = Engine(out).metrics
    what = f"{out.stat().st_size / 2**20:.2f} MiB, {precision}, step {metrics.get('step', 'unknown')}"
    if precision == "fp32":
        return f"{what}, largest difference from torch {difference:.1e}"
    losses = ", ".join(f"{p} {metrics[f'val/{p}/loss']:.4f}" for p in ("stream", "windows") if is_scored)
    measured = f"validation loss {losses} nats/char" if losses else "its loss not measured: give --data TEXT"
    return f"{what}, predictions {difference:.1e} nats from the exact ones; {measured}"
