"""Writes infer/model_file/graph_digests.py from files of every kind: `python tests/graph_digests.py`."""

import itertools
from collections.abc import Iterator
from pathlib import Path

from tiny_models import CHARS, model_bytes

from charrnn.vocab import Vocab
from infer.model_file import graph_digests, graph_structure, validator
from infer.model_file.layout import Sizes
from infer.model_file.protobuf import Reader

LARGE = [chr(i) for i in range(0x4E00, 0x4E00 + 700)]
VOCABS = {
    "": CHARS,
    "large": Vocab.of_chars(LARGE),
    "documents": Vocab.of_chars(CHARS.symbols, document_end="\n"),
    "large documents": Vocab.of_chars(LARGE, document_end=LARGE[0]),
}
HEAD = '''"""Digests of the graphs that train.export writes; made by `python tests/graph_digests.py`.

See `graph_structure.structure_digest`. There is one per cell, precision, kind of vocabulary, with and without documents
and layer normalisation, and for one layer and several.
"""

DIGESTS = frozenset(
    """
'''
TAIL = '''""".strip().splitlines()
)
'''


def files(layers: tuple[int, ...] = (1, 2)) -> Iterator[tuple[str, bytes, Sizes]]:
    """Yields a file of every kind, with its name and sizes."""
    for (kind, vocab), rnn, precision, norm, num_layers in itertools.product(
        VOCABS.items(), ("GRU", "LSTM"), ("fp32", "int8"), (False, True), layers
    ):
        name = " ".join(filter(None, [rnn, precision, "norm" if norm else "", kind, str(num_layers)]))
        data = model_bytes(vocab, rnn=rnn, precision=precision, layer_norm=norm, num_layers=num_layers)
        yield name, data, Sizes(rnn, len(vocab), 24, num_layers, vocab.document_end_id)


def digest(data: bytes, sizes: Sizes) -> str:
    reader: Reader = validator.outline(data).reader
    graph = reader.fields(validator.outline(data).graph, graph_structure.GRAPH, "graph")
    return graph_structure.structure_digest(reader, graph, validator._read_weights(reader, graph, sizes), sizes)


def source(digests: set[str]) -> str:
    """infer/model_file/graph_digests.py with these."""
    return HEAD + "\n".join(sorted(digests)) + "\n" + TAIL


if __name__ == "__main__":
    found = {digest(data, sizes) for _, data, sizes in files()}
    Path(graph_digests.__file__).write_text(source(found), encoding="utf-8", newline="\n")
