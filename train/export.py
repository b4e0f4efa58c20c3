"""Checkpoint -> one self-contained ONNX file -> parity check.  `python -m train.export RUN|CHECKPOINT [--out FILE]`"""

import json
import math
import re
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from charrnn.checkpoint import Checkpoint, load_for_inference
from charrnn.errors import CharRNNError, ExportError
from charrnn.model import CharRNN
from charrnn.storage import temporary
from charrnn.vocab import Vocab
from infer.engine import Engine
from train.graph import build_onnx

FORMAT_VERSION = 1
PARITY_TOLERANCE = 1e-4


def export_model(model: CharRNN, vocab: Vocab, metadata: dict[str, str], out: Path) -> float:
    """Writes `out` and returns the largest |difference| of its logits from torch's.

    Raises: ExportError, leaving no file, when the difference reaches `PARITY_TOLERANCE` or the disk refuses.
    """
    weights = {name: tensor.detach().float().cpu().numpy() for name, tensor in model.state_dict().items()}
    proto = build_onnx(model.config, vocab, weights, metadata)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with temporary(out) as partial:
            partial.write_bytes(proto.SerializeToString())
            difference = parity(model, Engine(partial))
            if not difference < PARITY_TOLERANCE:
                raise ExportError(
                    f"onnxruntime's logits differ from torch's by {difference:.2e} (limit {PARITY_TOLERANCE:.0e}), so "
                    f"{out} was not written; update onnxruntime, and report this with both versions if it stays"
                )
            partial.replace(out)
    except OSError as error:
        raise ExportError(f"cannot write {out}: {error.strerror}; free the disk or choose another --out") from None
    return difference


def parity(model: CharRNN, engine: Engine) -> float:
    """The largest |difference| of logits and states between torch and onnxruntime.

    Compared over batches {1, 3} x lengths {1, 7}, each from random ids and a random state, drawn from a fixed seed.
    """
    model = model.eval().cpu().float()
    draw = torch.Generator().manual_seed(0)
    worst = 0.0
    for batch, length in ((1, 1), (1, 7), (3, 1), (3, 7)):
        ids = torch.randint(model.head.out_features, (batch, length), generator=draw)
        state = tuple(torch.randn(part.shape, generator=draw) for part in model.zero_state(batch))
        with torch.no_grad():
            logits, state_next = model(ids, state)
        theirs, theirs_next = engine.step(ids.numpy(), tuple(part.numpy() for part in state))
        for ours, other in zip((logits, *state_next), (theirs, *theirs_next), strict=True):
            # max() passes over a NaN, and a NaN must fail.
            difference = float(np.abs(ours.numpy() - other).max())
            worst = difference if math.isnan(difference) else max(worst, difference)
    return worst


def export_checkpoint(checkpoint: Checkpoint, out: Path) -> float:
    """Exports a checkpoint to `out`; returns the parity difference. Raises: ExportError."""
    model = CharRNN(checkpoint.config.model, len(checkpoint.vocab))
    model.load_state_dict(checkpoint.weights)
    return export_model(model, checkpoint.vocab, metadata_of(checkpoint), out)


def metadata_of(checkpoint: Checkpoint) -> dict[str, str]:
    """The model file's metadata: all that a stranger needs to use the file and to know where it came from."""
    corpus = checkpoint.trainer["corpus"]
    source = without_folders(corpus["source"])
    config = checkpoint.config.model_dump(mode="json")
    # Where things lay on the machine that trained is nobody's business who gets the file.
    config["data"] |= {"source": source, "cache_dir": "", "mirror": ""}
    config["train"] |= {"run_dir": ""}
    return {
        "charrnn.format_version": str(FORMAT_VERSION),
        "charrnn.vocab": checkpoint.vocab.to_json(),
        "charrnn.config": json.dumps(config),
        "charrnn.metrics": json.dumps(checkpoint.trainer["metrics"]),
        "charrnn.corpus": json.dumps({"name": corpus["name"], "source": source, "num_chars": corpus["num_chars"]}),
        "charrnn.corpus_sha256": corpus["sha256"],
    }


def without_folders(source: str) -> str:
    """The last part of a path or address, without its query: enough to recognise the text by."""
    return re.split(r"[?#]", source)[0].replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]


def command(
    source: Annotated[Path, typer.Argument(metavar="RUN|CHECKPOINT", help="A run folder (its best/) or a checkpoint.")],
    out: Annotated[Path | None, typer.Option(help="The file to write. [default: model.onnx in the run folder]")] = None,
) -> None:
    """Write a checkpoint as one ONNX file and check it against torch."""
    checkpoint = load_for_inference(source)
    run_dir = source if (source / "best").is_dir() else source.parent
    out = out or run_dir / "model.onnx"
    difference = export_checkpoint(checkpoint, out)
    size = out.stat().st_size / 2**20
    typer.echo(f"{out}  {size:.2f} MiB, step {checkpoint.step}, largest difference from torch {difference:.1e}")


def main() -> None:
    """Entry of `python -m train.export`."""
    try:
        typer.run(command)
    except CharRNNError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
