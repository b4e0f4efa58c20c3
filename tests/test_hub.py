"""hf: sources, from datasets on this machine and without a hub."""

from pathlib import Path
from typing import Any

import pytest
from folders import find
from launches import python
from packed import json_lines, write, write_parquet

from charrnn.config import DataConfig
from charrnn.data.corpus import prepare
from charrnn.data.parts import Source
from charrnn.errors import CorpusError

TEXTS = [f"text number {number}\n" for number in range(2300)]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def records(source: Source) -> list[str]:
    [part] = source.parts
    return list(part.documents())


def save(folder: str, splits: dict[str, dict[str, Any]] | None = None) -> None:
    import datasets

    if splits is None:
        datasets.Dataset.from_dict({"text": TEXTS, "id": list(range(len(TEXTS)))}).save_to_disk(folder)
    else:
        datasets.DatasetDict({k: datasets.Dataset.from_dict(v) for k, v in splits.items()}).save_to_disk(folder)


def test_a_saved_dataset_is_its_texts() -> None:
    save("books")
    found = find("hf:books")
    assert found.name == "books"
    assert records(found) == TEXTS
    corpus = prepare(DataConfig(source="hf:books"))
    assert corpus.vocab.decode(corpus.ids.tolist()) == "".join(TEXTS)


def test_a_split_is_chosen_by_name_or_is_the_only_one_or_train() -> None:
    save("many", {"train": {"text": ["a"]}, "test": {"text": ["b"]}})
    save("one", {"test": {"text": ["c"]}})
    assert [records(find(f"hf:{spec}")) for spec in ("many", "many:test", "one")] == [["a"], ["b"], ["c"]]


def test_splits_that_leave_a_choice_are_named() -> None:
    save("many", {"a": {"text": ["a"]}, "b": {"text": ["b"]}})
    with pytest.raises(CorpusError, match=r"several splits, a, b; name one: hf:many:a"):
        find("hf:many")
    with pytest.raises(CorpusError, match=r"no split 'c'; it has a, b"):
        find("hf:many:c")
    save("none")
    with pytest.raises(CorpusError, match=r"one dataset without splits; leave :train out"):
        find("hf:none:train")


def test_a_folder_of_data_files_is_a_dataset() -> None:
    write_parquet("books/train.parquet", {"body": ["one", "two"], "id": [1, 2]})
    assert records(find("hf:books", text_field="body")) == ["one", "two"]
    write("lines/train.jsonl", json_lines({"text": "one"}, {"text": "two"}, {"text": "three"}))
    assert records(find("hf:lines:train[:2]")) == ["one", "two"]


def test_a_column_that_is_missing_or_no_text_is_refused() -> None:
    save("books")
    with pytest.raises(CorpusError, match=r"hf:books: no field 'body' \(--text-field\); it has text, id"):
        find("hf:books", text_field="body")
    with pytest.raises(CorpusError, match=r"hf:books: the field 'id' holds int64, not a text; fields with text: text"):
        find("hf:books", text_field="id")
    save("holes", {"train": {"text": ["a", None]}})
    with pytest.raises(CorpusError, match=r"hf:holes, row 2: the field 'text' holds null"):
        prepare(DataConfig(source="hf:holes"))


def test_a_folder_that_is_no_dataset_is_refused() -> None:
    write("books/state.json", "{")
    with pytest.raises(CorpusError, match=r"hf:books cannot be loaded: .*; check the folder"):
        find("hf:books")
    with pytest.raises(CorpusError, match="write hf:NAME"):
        find("hf:")


def test_an_unknown_dataset_without_a_hub_is_one_line_with_a_remedy(tmp_path: Path) -> None:
    code = (
        "from charrnn.data.sources import find_source; from charrnn.errors import CorpusError\n"
        "from charrnn.config import DataConfig\n"
        "try: find_source(DataConfig(source='hf:nobody/nothing'))\n"
        "except CorpusError as error: print(error)"
    )
    ran = python("-c", code, HF_HOME=str(tmp_path / "hf"), HF_HUB_OFFLINE="1")
    assert "--data hf:nobody/nothing cannot be loaded" in ran.stdout
    assert "without a network, save it elsewhere with save_to_disk" in ran.stdout
