"""Digests of the graphs that train.export writes: made by `python tests/graph_digests.py`."""

DIGESTS: frozenset[str] = frozenset()
