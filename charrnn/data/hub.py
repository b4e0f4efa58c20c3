"""Datasets that Hugging Face's `datasets` library reads: from its hub, from its cache, or from a folder.

`hf:NAME[,CONFIG][:SPLIT]`, where NAME is a dataset of the hub or a folder on this machine. It lies on disk as Arrow
files, which are read memory-mapped.
"""

import http.client
import os
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from charrnn.data.parts import Part, record_part
from charrnn.data.records import check_column, column_texts
from charrnn.errors import CorpusError, listing
from charrnn.io import Advance, expanded, say

PREFIX = "hf:"
_SPEC = re.compile(r"(?P<name>.+?)(,(?P<config>[^,:/]+))?(:(?P<split>[A-Za-z_][\w.-]*(\[[^\]]*\])?))?")
_ROWS = 1000
_HUB = "https://huggingface.co"
_HUB_TIMEOUT_S = 10.0


def hub_part(source: str, field: str, progress: bool) -> Part:
    """The dataset that `source` names, a text of the column `field` a document.

    Raises: CorpusError when it cannot be brought, or has no such split or column.
    """
    spec = _parsed(source)
    if not expanded(spec["name"]).exists():
        _go_offline_without_hub(progress)
    library = _library()
    say(f"reading {source} with the datasets library", progress)
    if not progress:
        library.disable_progress_bars()
    found = _load(library, spec["name"], spec["config"], spec["split"], source)
    if isinstance(found, library.DatasetDict):
        found = _only_split(found, source)
    check_column(found.features.arrow_schema, field, source)
    return record_part(source, found.data.nbytes, partial(read_dataset, found, field, source))


def bare_name(source: str) -> str:
    """What a dataset is called, without its owner, folder or split. Raises: CorpusError when it is not named."""
    return Path(_parsed(source)["name"]).name


def _parsed(source: str) -> re.Match[str]:
    spec = _SPEC.fullmatch(source.removeprefix(PREFIX))
    if spec is None:
        raise CorpusError(f"--data {source}: write hf:NAME, hf:NAME:SPLIT or hf:NAME,CONFIG:SPLIT")
    return spec


def read_dataset(dataset: Any, field: str, name: str, advance: Advance) -> Iterator[str]:
    """The texts in a column of a `datasets.Dataset`. advance: called with its bytes, by rows."""
    size, told, row, rows = dataset.data.nbytes, 0, 1, max(1, len(dataset))
    batches = dataset.select_columns([field]).with_format("arrow").iter(_ROWS)
    while True:
        try:
            batch = next(batches, None)
        except Exception as error:  # as in _load
            raise CorpusError(f"{name} cannot be read on from row {row}: {_reason(error)}; bring it anew") from error
        if batch is None:
            return
        yield from column_texts(batch.column(0), row, field, name)
        row += batch.num_rows
        now = size * (row - 1) // rows
        advance(now - told)
        told = now


def _go_offline_without_hub(progress: bool) -> None:
    """Has the library look into its cache alone when the hub does not answer.

    By itself it tries every file of a dataset six times over, for a minute or more.
    """
    if os.environ.get("HF_HUB_OFFLINE") or "huggingface_hub" in sys.modules:  # which reads the environment once
        return
    endpoint = os.environ.get("HF_ENDPOINT", _HUB)
    try:
        request = urllib.request.Request(endpoint, method="HEAD")
        urllib.request.urlopen(request, timeout=_HUB_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return  # an answer all the same
    except (OSError, ValueError, http.client.HTTPException) as error:
        say(f"{endpoint} cannot be reached ({error}); looking for the dataset in the cache alone", progress)
        os.environ["HF_HUB_OFFLINE"] = "1"


def _library() -> Any:
    try:
        import datasets
    except ModuleNotFoundError:
        raise CorpusError("reading hf: needs the package datasets: pip install 'charrnn[data]'") from None
    return datasets


def _load(library: Any, name: str, config: str | None, split: str | None, source: str) -> Any:
    path = expanded(name)
    try:
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            found = library.load_from_disk(str(path))  # what Dataset.save_to_disk wrote
            return found if split is None else _named_split(library, found, split, source)
        return library.load_dataset(str(path) if path.exists() else name, config, split=split)
    except CorpusError:
        raise
    except Exception as error:  # the library, and those below it, raise errors of a dozen unrelated kinds
        raise CorpusError(f"--data {source} cannot be read: {_reason(error)}; {_way_out(path)}") from error


def _named_split(library: Any, found: Any, split: str, source: str) -> Any:
    if not isinstance(found, library.DatasetDict):
        raise CorpusError(f"--data {source}: the folder holds one dataset without splits; leave :{split} out")
    if split not in found:
        raise CorpusError(f"--data {source}: no split {split!r}; it has {listing(list(found))}")
    return found[split]


def _only_split(found: Any, source: str) -> Any:
    if len(found) == 1 or "train" in found:
        return found["train"] if "train" in found else next(iter(found.values()))
    raise CorpusError(
        f"--data {source}: several splits, {listing(list(found))}; name one: {source}:{next(iter(found))}"
    )


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


def _way_out(path: Path) -> str:
    if path.exists():
        return "look at the folder, or name its files themselves (.jsonl, .parquet, .txt)"
    return (
        "look at the name; without a network, bring it on another machine with datasets' save_to_disk, and name that "
        "folder: --data hf:FOLDER"
    )
