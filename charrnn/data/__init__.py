"""Turns what `--data` names into memory-mapped ids: sources, readers, encoding, and the cache of prepared corpora.

`python -m charrnn.data inspect TEXT` prints statistics of a corpus.
"""
