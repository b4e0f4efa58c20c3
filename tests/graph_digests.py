"""Writes infer/model_file/graph_digests.txt from files of every kind: `python tests/graph_digests.py`."""

import itertools
from collections.abc import Iterator
from pathlib import Path

from tiny_models import CHARS, model_bytes

from charrnn.vocab import Vocab
from infer.model_file import validator
from infer.model_file.layout import Sizes

LARGE = [chr(i) for i in range(0x4E00, 0x4E00 + 700)]
VOCABS = {
    "": CHARS,
    "large": Vocab.of_chars(LARGE),
    "documents": Vocab.of_chars(CHARS.symbols, document_end="\n"),
    "large documents": Vocab.of_chars(LARGE, document_end=LARGE[0]),
}


def files(layers: tuple[int, ...] = (1, 2)) -> Iterator[tuple[str, bytes, Sizes]]:
    """Yields a file of every kind, with its name and sizes."""
    for (kind, vocab), rnn, precision, norm, num_layers in itertools.product(
        VOCABS.items(), ("GRU", "LSTM"), ("fp32", "int8"), (False, True), layers
    ):
        name = " ".join(filter(None, [rnn, precision, "norm" if norm else "", kind, str(num_layers)]))
        data = model_bytes(vocab, rnn=rnn, precision=precision, layer_norm=norm, num_layers=num_layers)
        yield name, data, Sizes(rnn, len(vocab), 24, num_layers, vocab.document_end_id)


def digest(data: bytes, sizes: Sizes) -> str:
    return validator.graph_digest(validator.outline(data), sizes)


if __name__ == "__main__":
    digests = sorted({digest(data, sizes) for _, data, sizes in files()})
    path = Path(validator.__file__).with_name("graph_digests.txt")
    path.write_text("\n".join(digests) + "\n", encoding="ascii", newline="\n")
