"""What a run starts from: nothing, another run's weights, or its own newest checkpoint; and who may continue what."""

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray

from charrnn.config import BASE, KEEP, SCRATCH, RunConfig
from charrnn.data.corpus import Corpus
from charrnn.errors import CheckpointError, CorpusError, listing
from charrnn.io import expand_user
from charrnn.model.rnn import CharRNN, State
from charrnn.vocab import Vocab
from train.base import base_folder
from train.checkpoint.format import BEST, Checkpoint, Tensors, load, load_for_inference, load_newest, step_folders

# Punctuation that Unicode does not decompose into ASCII.
_PLAIN_FORMS = {
    **dict.fromkeys("\u2018\u2019\u201a\u2032", "'"),
    **dict.fromkeys("\u201c\u201d\u201e\u00ab\u00bb\u2033", '"'),
    **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-"),
}

# A resumed run must agree with its checkpoint on these; the rest may change between segments.
_FIXED = {
    "data": (
        "encoding",
        "invalid",
        "newlines",
        "normalize",
        "vocab",
        "min_count",
        "unknown",
        "document_end",
        "split",
        "batch_size",
        "seq_len",
        "windows",
        "stride",
        "reset",
    ),
    "model": ("rnn", "embedding_dim", "hidden_dim", "num_layers", "dropout", "dropout_mask", "layer_norm"),
    "train": ("seed",),
    # These decide what is best: losses measured otherwise can't be compared with the best so far.
    "eval": ("best_by", "window", "stream_lanes", "stream_warmup", "sample"),
}


@dataclass(frozen=True)
class StartingPoint:
    """vocab: the run's vocabulary. table: (V_corpus,) its id for each id of the corpus, None when they are the same.

    new: the characters that `weights`, another model's, were given entries for.
    """

    vocab: Vocab
    table: NDArray[np.int64] | None = None
    weights: Tensors = field(default_factory=dict)
    resumed: Checkpoint | None = None
    new: tuple[str, ...] = ()


def starting_point(
    config: RunConfig,
    corpus: Corpus,
    run_dir: Path,
    *,
    resume: bool,
    warn: Callable[[str], None],
) -> StartingPoint:
    """Decides where the run starts.

    Raises: CheckpointError when the folder's run is another one, when it holds a run and `resume` is False or nothing
    to resume it from, or when the weights of `train.init_from` do not fit.
    """
    steps = step_folders(run_dir)
    if not resume and (steps or (run_dir / BEST).exists()):
        raise CheckpointError(
            f"{run_dir} holds a run, at {steps[0].name if steps else BEST}, and --resume never does not overwrite it; "
            "name another --run-dir, or delete that folder"
        )
    if not steps and (run_dir / BEST).exists():
        raise CheckpointError(
            f"{run_dir} holds {BEST}/ and no step checkpoint to resume from; name another --run-dir (with --init-from "
            f"{run_dir} to start from its weights), or delete that folder"
        )
    saved = load_newest(run_dir, warn, lambda c: _check_same_run(c, config, corpus, run_dir)) if resume else None
    if saved:
        table = table_between(saved.vocab, corpus, run_dir)
        return StartingPoint(saved.vocab, table, saved.weights, _with_usable_best(saved, run_dir, warn))
    init_from = config.train.init_from
    if init_from != SCRATCH:
        other = load_for_inference(origin_folder(init_from))
        differing = _differences(
            other.config, config, {"model": ("rnn", "embedding_dim", "hidden_dim", "num_layers", "layer_norm")}
        )
        if differing:
            raise CheckpointError(f"--init-from {init_from}: its model is another shape: {differing}; set these alike")
        return fine_tuning_start(other, config, corpus, init_from)
    if config.data.vocab == KEEP:
        raise CheckpointError("data.vocab keep is the vocabulary of a model; name it with --init-from, or use chars")
    return StartingPoint(corpus.vocab)


def _with_usable_best(saved: Checkpoint, run_dir: Path, warn: Callable[[str], None]) -> Checkpoint:
    """The checkpoint; where best/ is missing or damaged, as one that has yet to be evaluated."""
    if saved.trainer["best_step"] < 0:
        return saved
    try:
        load(run_dir / BEST)
    except CheckpointError as error:
        warn(f"the best checkpoint cannot be used ({error}); the best from step {saved.step} on replaces it")
        forgotten = {"best_loss": None, "best_step": -1, "evaluated_step": -1}
        return replace(saved, trainer=saved.trainer | forgotten)
    return saved


def origin_folder(init_from: str) -> Path:
    """The folder that `train.init_from` names: that of the shipped base, or a run or checkpoint."""
    return base_folder() if init_from == BASE else expand_user(init_from)


def fine_tuning_start(other: Checkpoint, config: RunConfig, corpus: Corpus, origin: str) -> StartingPoint:
    """Another model's weights, with entries for the characters that only the corpus has, unless data.vocab is keep.

    Of the shipped base, entries of characters that the corpus lacks are dropped: they would cost time and space.
    """
    vocab = other.vocab
    if config.data.vocab != KEEP and vocab.kind == corpus.vocab.kind == "chars":
        vocab = corpus.vocab if origin == BASE else vocab.extended_by(corpus.vocab)
    vocab = _with_document_end(vocab, corpus.vocab)
    new = tuple(other.vocab.unknown_in("".join(vocab.symbols)))
    weights = {name: tensor.float() for name, tensor in other.weights.items()}
    if vocab.symbols != other.vocab.symbols:
        weights = refitted_weights(weights, other.vocab, vocab)
    return StartingPoint(vocab, table_between(vocab, corpus, Path(origin)), weights, new=new)


def refitted_weights(weights: Tensors, vocab: Vocab, wanted: Vocab) -> Tensors:
    """The same for the V characters of `wanted`.

    embedding.weight: (V0, E) -> (V, E); head.weight: (V0, H) -> (V, H); head.bias likewise. A character that the V0 of
    `vocab` lack gets the entry of its plain form there, such as ' for a typographic apostrophe or e for é, and without
    one the mean of all entries. Its logit is then the mean of the others', so that, by Jensen's inequality, it gets at
    most the mean of their probabilities, and the loss on the old characters grows by at most ln(1 + new / V0).
    """
    places = {symbol: i for i, symbol in enumerate(vocab.symbols)}
    forms = [places.get(s, places.get(plain_form(s), len(vocab))) for s in wanted.symbols]
    index = torch.tensor(forms)  # (V,)
    refitted = dict(weights)
    for name in ("embedding.weight", "head.weight", "head.bias"):
        rows = weights[name]  # (V0, ...)
        mean = rows.double().mean(0, keepdim=True).to(rows.dtype)
        refitted[name] = torch.cat([rows, mean])[index]
    return refitted


def plain_form(symbol: str) -> str:
    """The ASCII character that a typographic or accented one stands for, else the first of its decomposition."""
    return unicodedata.normalize("NFKD", _PLAIN_FORMS.get(symbol, symbol))[0]


def _check_same_run(saved: Checkpoint, config: RunConfig, corpus: Corpus, run_dir: Path) -> None:
    fixed = dict(_FIXED)
    if "init_from" in config.train.model_fields_set:  # need not be repeated to resume
        fixed["train"] += ("init_from",)
    differing = _differences(saved.config, config, fixed)
    if differing:
        raise CheckpointError(
            f"{run_dir} holds a run with other settings: {differing}; set them as they were to continue it, "
            "or name another --run-dir"
        )
    with torch.device("meta"):  # shapes without memory
        wanted = CharRNN(config.model, len(saved.vocab)).state_dict()
    if {k: v.shape for k, v in saved.weights.items()} != {k: v.shape for k, v in wanted.items()}:
        raise CheckpointError(
            f"{run_dir} holds weights of another model than its config and vocabulary say; name another --run-dir"
        )
    theirs = saved.trainer["corpus"]["sha256"]
    if theirs != corpus.sha256:
        raise CheckpointError(
            f"{run_dir} holds a run on another text: its corpus has SHA-256 {theirs[:12]}..., this one "
            f"{corpus.sha256[:12]}...; bring back the text to continue, or name another --run-dir"
        )


def check_same_start(starts: Sequence[tuple[int, str]], run_dir: Path) -> None:
    """starts: every rank's step to go on from and its corpus's SHA-256.

    Raises: CheckpointError or CorpusError when they differ.
    """
    first_step, first_digest = starts[0]
    for rank, (step, digest) in enumerate(starts):
        if digest != first_digest:
            raise CorpusError(
                f"process {rank} has another text than process 0: SHA-256 {digest[:12]}... and {first_digest[:12]}...; "
                "give every machine the same --data"
            )
        if step != first_step:
            raise CheckpointError(
                f"process {rank} finds step {step} in {run_dir}, process 0 step {first_step}; put the run folder on a "
                "disk that all machines share, with --run-dir"
            )


def _differences(theirs: RunConfig, ours: RunConfig, names: dict[str, tuple[str, ...]]) -> str:
    clauses = []
    for section, keys in names.items():
        for key in keys:
            there, here = getattr(getattr(theirs, section), key), getattr(getattr(ours, section), key)
            if there != here:
                clauses.append(f"{section}.{key} is {_shown(there)} there and {_shown(here)} here")
    return ", ".join(clauses)


def _shown(value: object) -> object:
    """A value for a message: quoted where it would not be seen."""
    return repr(value) if isinstance(value, str) and not (value and value.isprintable()) else value


def _with_document_end(vocab: Vocab, corpus_vocab: Vocab) -> Vocab:
    """A model's vocabulary with the document end of the text it goes on to learn, if it knows that character."""
    end = corpus_vocab.document_end
    return vocab if end is not None and vocab.unknown_in(end) else replace(vocab, document_end=end)


def table_between(vocab: Vocab, corpus: Corpus, path: Path) -> NDArray[np.int64] | None:
    """(V_corpus,) the id in `vocab` of each entry of the corpus's vocabulary; None when they are the same."""
    if vocab == corpus.vocab:
        return None
    if vocab.kind != corpus.vocab.kind:
        raise CheckpointError(
            f"{path} has a vocabulary of {vocab.kind}, the corpus of {corpus.vocab.kind}; set data.vocab"
        )
    missing = [repr(c) for c in vocab.unknown_in("".join(corpus.vocab.symbols))]
    if missing:
        raise CheckpointError(
            f"the corpus has {len(missing)} character(s) that the model of {path} does not know: {listing(missing)}; "
            "leave out --vocab keep to give them entries, or remove them from the text"
        )
    return vocab.encode("".join(corpus.vocab.symbols)).astype(np.int64)


def seed_rank(seed: int, step: int, rank: int) -> None:
    """Seeds torch's generators, which dropout draws from, with a value that no other (step, rank) shares."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))


def rank_rng(device: torch.device) -> Tensors:
    """This rank's random generator states, which dropout draws from."""
    mine: Tensors = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        mine["cuda"] = torch.cuda.get_rng_state(device)
    return mine


def set_rank_rng(
    accelerator: Accelerator, saved: Checkpoint, config: RunConfig, message: Callable[[str], None]
) -> None:
    """Restore this rank's generators; after a change of ranks or device type, seed them anew with a message."""
    changes = []
    if len(saved.rng) != accelerator.num_processes:
        changes.append(f"{len(saved.rng)} process(es) before, {accelerator.num_processes} now")
    before, now = ("cuda" if "cuda" in saved.rng[0] else "cpu"), accelerator.device.type
    if before != now:
        changes.append(f"device {before} before, {now} now")
    if changes:
        anew = "dropout's random generators start anew, all else goes on" if config.model.dropout else "all goes on"
        message(f"{', '.join(changes)}: {anew}")
        seed_rank(config.train.seed, saved.step, accelerator.process_index)
        return
    mine = saved.rng[accelerator.process_index]
    torch.set_rng_state(mine["cpu"])
    if now == "cuda":
        torch.cuda.set_rng_state(mine["cuda"], accelerator.device)


def scatter_state(carried: State, rows: slice, device: torch.device) -> State:
    """This rank's rows of the carried state, each part (L, B, H) -> (L, B / world, H)."""
    return tuple(part[:, rows].contiguous().to(device) for part in carried)


def identity_fields(corpus: Corpus) -> dict[str, Any]:
    """What a checkpoint records of its corpus."""
    return {"name": corpus.name, "source": corpus.source, "sha256": corpus.sha256, "num_chars": corpus.num_chars}
