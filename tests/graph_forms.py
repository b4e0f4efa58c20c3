"""The forms of nodes in every kind of file that train.export writes; it writes infer/model_file/graph_forms.py."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from format_1 import format_1
from tiny_models import CHARS, model_bytes

from charrnn.vocab import Vocab
from infer import Engine
from infer.model_file import graph_forms
from infer.model_file import validator as onnx_scan

LARGE = [chr(i) for i in range(0x4E00, 0x4E00 + 700)]
VOCABS = {
    "": CHARS,
    "large": Vocab.of_chars(LARGE),
    "documents": Vocab.of_chars(CHARS.symbols, document_end="\n"),
    "large, documents": Vocab.of_chars(LARGE, document_end=LARGE[0]),
}
HEAD = '''"""How nodes are joined in model files: written by `python tests/graph_forms.py` from files of every kind.

A line is: the graph, the operator's domain and name, what gives each of its inputs, how many outputs it has, and its
attributes. An input comes from a constant by its name, weights (with their element type), an input of the graph, or an
operator's output by its place; ^ marks what a graph takes from those around it, - an input that is left out. Digits
that count layers are #, and of inputs that come once a layer every kind is there once.
"""

FORMS = frozenset(
    """
'''
MIDDLE = '''""".strip().splitlines()
)
# Of files that earlier states of train/export/onnx_graph.py wrote, in format version 2.
EARLIER = frozenset(
    """
'''
TAIL = '''""".strip().splitlines()
)
# Domain and name.
OPERATORS = frozenset(" ".join(form.split("(")[0].split(" ")[1:3]) for form in FORMS | EARLIER if "(" in form)
'''


def files(layers: tuple[int, ...] = (1, 2, 5)) -> Iterator[tuple[str, bytes]]:
    """A file of every kind, with its name."""
    cells, precisions = ("GRU", "LSTM"), ("fp32", "int8", "int4")
    for (kind, vocab), rnn, precision, norm, num_layers in itertools.product(
        VOCABS.items(), cells, precisions, (False, True), layers
    ):
        name = f"{rnn} {precision} {num_layers} {kind}{' norm' if norm else ''}"
        yield name, model_bytes(vocab, rnn=rnn, precision=precision, layer_norm=norm, num_layers=num_layers)
    for rnn, num_layers in itertools.product(cells, layers):
        yield f"{rnn} version 1 {num_layers}", format_1(rnn=rnn, num_layers=num_layers)


class Noted(set[str]):
    """A set that has everything, and keeps what it was asked for."""

    def __contains__(self, form: object) -> bool:
        self.add(str(form))
        return True


def forms_of(data: bytes, path: Path) -> set[str]:
    """The forms in a file, which is opened at `path`."""
    noted = Noted()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_scan, "FORMS", noted)
        patch.setattr(onnx_scan, "OPERATORS", Noted())
        path.write_bytes(data)
        Engine(path)
    return set(iter(noted))


def source(forms: set[str]) -> str:
    """infer/model_file/graph_forms.py with these forms."""
    earlier = sorted(graph_forms.EARLIER)
    return HEAD + "\n".join(sorted(forms)) + "\n" + MIDDLE + "\n".join(earlier) + "\n" + TAIL


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        found = set().union(*(forms_of(data, Path(folder) / "m.onnx") for _, data in files()))
    Path(graph_forms.__file__).write_text(source(found), encoding="utf-8", newline="\n")
