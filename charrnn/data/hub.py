"""`hf:NAME[,CONFIG][:SPLIT]`: read with Hugging Face's `datasets`, from its hub, its cache or a folder."""

import logging
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from charrnn.data.parts import Part, record_part
from charrnn.data.records import check_column, read_rows, reason_of
from charrnn.errors import CorpusError, listing
from charrnn.io import expand_user

PREFIX = "hf:"
_SPEC = re.compile(r"(?P<name>.+?)(,(?P<config>[^,:/]+))?(:(?P<split>[A-Za-z_][\w.-]*(\[[^\]]*\])?))?")
_ROWS = 1000

_logger = logging.getLogger(__name__)


def hub_part(source: str, field: str) -> Part:
    """Load the dataset that `source` names; each text of its column `field` is a document.

    Raises:
        CorpusError: It cannot be loaded, or has no such split or column.
    """
    spec = _parse(source)
    try:
        import datasets
    except ModuleNotFoundError:
        raise CorpusError("reading hf: needs the package datasets: pip install 'charrnn[data]'") from None
    _logger.info(f"loading {source} with the datasets library")
    if not _logger.isEnabledFor(logging.INFO):
        datasets.disable_progress_bars()
    found = _load(datasets, spec, source)
    if isinstance(found, datasets.DatasetDict):
        found = _chosen_split(found, spec["split"], source)
    elif spec["split"] and (expand_user(spec["name"]) / "state.json").exists():
        raise CorpusError(f"--data {source}: the folder holds one dataset without splits; leave :{spec['split']} out")
    check_column(found.features.arrow_schema, field, source)
    return record_part(source, None, partial(_read, found, field, source))


def dataset_name(source: str) -> str:
    """Return the dataset's name without owner, folder or split. Raises: CorpusError for a malformed source."""
    return Path(_parse(source)["name"]).name


def _parse(source: str) -> re.Match[str]:
    spec = _SPEC.fullmatch(source.removeprefix(PREFIX))
    if spec is None:
        raise CorpusError(f"--data {source}: write hf:NAME, hf:NAME:SPLIT or hf:NAME,CONFIG:SPLIT")
    return spec


def _read(dataset: Any, field: str, name: str) -> Iterator[str]:
    batches = dataset.select_columns([field]).with_format("arrow").iter(_ROWS)
    yield from read_rows(batches, field, name, "dataset", Exception)


def _load(library: Any, spec: re.Match[str], source: str) -> Any:
    """Return a dataset, or the DatasetDict of its splits."""
    path = expand_user(spec["name"])
    try:
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            return library.load_from_disk(str(path))  # written by Dataset.save_to_disk
        return library.load_dataset(str(path) if path.exists() else spec["name"], spec["config"], split=spec["split"])
    except Exception as error:  # the library, and those below it, raise errors of a dozen unrelated kinds
        remedy = "check the folder, or name its files themselves (.jsonl, .parquet, .txt)"
        if not path.exists():
            remedy = "check the name; without a network, save it elsewhere with save_to_disk, and name that folder"
            remedy += ": --data hf:FOLDER"
        raise CorpusError(f"--data {source} cannot be loaded: {reason_of(error)}; {remedy}") from error


def _chosen_split(found: Any, split: str | None, source: str) -> Any:
    """Return the split that is named, or else the only one, or train."""
    names = list(found)
    if split is None and len(names) > 1 and "train" not in names:
        raise CorpusError(f"--data {source}: several splits, {listing(names)}; name one: {source}:{names[0]}")
    split = split or ("train" if "train" in names else names[0])
    if split not in names:
        raise CorpusError(f"--data {source}: no split {split!r}; it has {listing(names)}")
    return found[split]
