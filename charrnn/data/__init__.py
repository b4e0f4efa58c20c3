"""Turns what `--data` names into memory-mapped ids: sources, readers, encoding, and the cache of prepared corpora.

sources     what --data names; remote, named, hub: where it is downloaded from; collect: which files are taken
readers     a file's format; streams: compression and zip; records: JSON lines, Parquet; -> parts
corpus      prepare(): scan (symbols, checksum) -> vocabulary -> encode (ids) -> cache
decode      bytes to normalized text, document by document
stats       entropy, n-gram baseline, lines; inspect: `python -m charrnn.data inspect TEXT` prints them
"""
