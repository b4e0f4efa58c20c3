"""From what `--data` names to memory-mapped ids: sources, readers, encoding and the cache of prepared corpora.

`python -m charrnn.data inspect TEXT` describes a corpus.
"""
