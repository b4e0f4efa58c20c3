"""Weights of one model for the vocabulary of another text: what fine-tuning starts from."""

import unicodedata
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from charrnn.config import BASE, KEEP, RunConfig
from charrnn.data.corpus import Corpus
from charrnn.errors import CheckpointError, listing
from charrnn.vocab import Vocab
from train.checkpoint.format import Checkpoint, Tensors

# Punctuation that Unicode does not decompose into ASCII.
_PLAIN_FORMS = {
    **dict.fromkeys("\u2018\u2019\u201a\u2032", "'"),
    **dict.fromkeys("\u201c\u201d\u201e\u00ab\u00bb\u2033", '"'),
    **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-"),
}


@dataclass(frozen=True)
class StartingPoint:
    """Where a run starts.

    Attributes:
        vocab: The run's vocabulary.
        table: (V_corpus,) its id for each id of the corpus; None if they are the same.
        weights: Initial weights; empty for random ones.
        resumed: The run's own checkpoint to resume.
        new: Characters that `weights`, from another model, were given entries for.
    """

    vocab: Vocab
    table: NDArray[np.int64] | None = None
    weights: Tensors = field(default_factory=dict)
    resumed: Checkpoint | None = None
    new: tuple[str, ...] = ()


def fine_tuning_start(other: Checkpoint, config: RunConfig, corpus: Corpus, origin: str) -> StartingPoint:
    """Start from another model's weights, with entries for characters that only the corpus has.

    With data.vocab keep the model's vocabulary stays as it is. Entries of the shipped base for characters that the
    corpus lacks are dropped: they would cost time and space.

    Args:
        other: The other model's checkpoint.
        config: The run's config.
        corpus: Its text.
        origin: `train.init_from`.

    Raises:
        CheckpointError: If the vocabularies do not fit.
    """
    vocab = other.vocab
    if config.data.vocab != KEEP and vocab.kind == corpus.vocab.kind == "chars":
        vocab = corpus.vocab if origin == BASE else vocab.extended_by(corpus.vocab)
    end = corpus.vocab.document_end
    if end is None or not vocab.unknown_in(end):
        vocab = replace(vocab, document_end=end)
    weights = {name: tensor.float() for name, tensor in other.weights.items()}
    if vocab.symbols != other.vocab.symbols:
        weights = transfer_weights(weights, other.vocab, vocab)
    new = tuple(other.vocab.unknown_in("".join(vocab.symbols)))
    return StartingPoint(vocab, table_between(vocab, corpus, origin), weights, new=new)


def transfer_weights(weights: Tensors, vocab: Vocab, wanted: Vocab) -> Tensors:
    """Convert weights for the V0 characters of `vocab` to the V characters of `wanted`.

    embedding.weight: (V0, E) -> (V, E); head.weight: (V0, H) -> (V, H); head.bias likewise. A character that `vocab`
    lacks gets the entry of its plain form, such as ' for a typographic apostrophe or e for é, and without one the mean
    of all entries. Its logit is then the mean of the others', so that, by Jensen's inequality, it gets at most the mean
    of their probabilities, and the loss on the old characters grows by at most ln(1 + new / V0).
    """
    ids = {symbol: i for i, symbol in enumerate(vocab.symbols)}
    index = torch.tensor([ids.get(s, ids.get(plain_form(s), len(vocab))) for s in wanted.symbols])  # (V,)
    converted = dict(weights)
    for name in ("embedding.weight", "head.weight", "head.bias"):
        rows = weights[name]  # (V0, ...)
        mean = rows.double().mean(0, keepdim=True).to(rows.dtype)
        converted[name] = torch.cat([rows, mean])[index]
    return converted


def plain_form(symbol: str) -> str:
    """The ASCII character that a typographic or accented one stands for, else the first of its decomposition."""
    return unicodedata.normalize("NFKD", _PLAIN_FORMS.get(symbol, symbol))[0]


def check_same_vocab(vocab: Vocab, other: Vocab, name: str, other_name: str) -> None:
    """Check that two models assign the same ids. Raises: CheckpointError."""
    if vocab == other:
        return
    only = sorted({*vocab.symbols} ^ {*other.symbols})
    differing = f", which differ in {listing([repr(c) for c in only])}" if only else ""
    raise CheckpointError(
        f"{name} has a vocabulary of {len(vocab)} {vocab.kind}, {other_name} one of {len(other)} {other.kind}"
        f"{differing}; train both on the same text, or with the same data.vocab FILE and data.document_end"
    )


def table_between(vocab: Vocab, corpus: Corpus, path: str | Path) -> NDArray[np.int64] | None:
    """Map a corpus's ids to a model's.

    Args:
        vocab: The model's vocabulary.
        corpus: The text.
        path: Where the model is, for messages.

    Returns:
        (V_corpus,) the id in `vocab` of each entry of the corpus's vocabulary; None if they are the same.

    Raises:
        CheckpointError: If the model lacks a character of the corpus.
    """
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
