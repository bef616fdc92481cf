"""Records of a corpus: from files, directories of files, and data sets on the Hub."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from search_e1.data import hub, lines, tables
from search_e1.data.formats.arrays import array_items, is_array
from search_e1.data.formats.passages import CorpusColumns
from search_e1.errors import DataError
from search_e1.runs import sha256_text

Record = bytes | Mapping[str, Any] | lines.BadRecordError
"""An unparsed line, a row, or the error of an unreadable row."""

_LINES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst")
_PARQUET = ".parquet"
_HUB = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(:(?P<config>[^:/]*))?(:(?P<split>[^:/]+))?")
_BATCH = 1024  # rows
_FILES = (*_LINES, *tables.SUFFIXES, _PARQUET)
INSTEAD = "give a file of JSON lines, CSV or TSV (plain, .gz or .zst) or Parquet, or a directory of such files"


def records(place: str | Path, most: int, columns: CorpusColumns) -> Iterator[tuple[str, Record]]:
    """Location (``corpus.jsonl:3``) and content of each record; a line longer than ``most`` bytes is cut.

    Raises:
        DataError: the place cannot be read, or a table lacks one of ``columns``.
    """
    if dataset := _hub_dataset(place):
        yield from _hub_rows(str(place), dataset, columns)
        return
    for file in files(Path(place)):
        if file.suffix.lower() == _PARQUET:
            yield from parquet_rows(file, columns)
        elif file.name.lower().endswith(tables.SUFFIXES):
            yield from tables.corpus_rows(file, most, columns.choose)
        elif is_array(file):
            for number, item in array_items(file):
                yield f"{file}:{number}", item
        else:
            for number, line in lines.raw_lines(file, most):
                yield f"{file}:{number}", line


def checksum(place: str | Path) -> str:
    """The checksum of a file's bytes, or of a directory's file names and bytes; for a Hub data set, its newest commit.

    Raises:
        DataError: the place cannot be read.
    """
    if dataset := _hub_dataset(place):
        return f"{place} {_commit(str(place), dataset['name'])}"
    found = files(Path(place))
    if found == [Path(place)]:
        return lines.checksum(found[0])
    parts = [f"{file.relative_to(place)} {lines.checksum(file)}" for file in found]
    return sha256_text("\n".join(parts))


def files(path: Path) -> list[Path]:
    """``path`` itself, or the corpus files in and below a directory, sorted by name, without hidden files.

    Raises:
        DataError: the directory holds no corpus file.
    """
    if not path.is_dir():
        return [path]
    below = (p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts))
    found = sorted(p for p in below if p.name.lower().endswith(_FILES) and p.is_file())
    if not found:
        raise DataError(f"{path}: no file in it that could be a corpus; {INSTEAD}")
    return found


def parquet_rows(path: Path, wanted: CorpusColumns | None = None) -> Iterator[tuple[str, bytes | Mapping[str, Any]]]:
    """Location and content of each row: all columns, or those ``wanted``.

    Raises:
        DataError: the file cannot be read, or lacks a wanted column.
    """
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        # No pre-buffering: a row group may be the whole file.
        with parquet.ParquetFile(path, pre_buffer=False) as file:
            columns = None if wanted is None else wanted.choose(file.schema_arrow.names, str(path))
            for batch in file.iter_batches(_BATCH, columns=columns):
                for row in _rows(batch):
                    number += 1
                    yield f"{path}:{number}", row
    except (OSError, pyarrow.ArrowException) as error:
        where = f"{path}:{number + 1}" if number else str(path)
        problem = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise DataError(f"{where}: cannot be read ({problem}); {INSTEAD}") from None


def _rows(batch: Any) -> Iterator[bytes | Mapping[str, Any]]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:  # in some cell: yield that row as a JSON line with the same invalid bytes, to be reported
        for i in range(len(batch)):
            try:
                yield from batch.slice(i, 1).to_pylist()
            except UnicodeDecodeError as error:
                yield b'"' + error.object + b'"'


def _hub_dataset(place: str | Path) -> dict[str, Any] | None:
    """Name, configuration and split of a Hub data set, if ``place`` is no local path and has that form."""
    if Path(place).is_absolute() or Path(place).exists():
        return None
    match = _HUB.fullmatch(str(place))
    return match.groupdict() if match and not match["name"].lower().endswith((*_FILES, ".gz", ".zst")) else None


def _hub_rows(place: str, dataset: Mapping[str, Any], columns: CorpusColumns) -> Iterator[tuple[str, Record]]:
    import datasets

    name, config = dataset["name"], dataset["config"] or None
    commit = _commit(place, name)
    number = 0
    try:
        with hub.quiet():  # not around the rows: the caller's code runs between them
            split = dataset["split"] or _only_split(place, datasets.get_dataset_split_names(name, config, revision=commit))
            rows = datasets.load_dataset(name, config, split=split, revision=commit, streaming=True)
        for row in rows:
            if not number:
                columns.choose(list(row), place)
            number += 1
            yield f"{place}:{number}", row
    except DataError:
        raise
    except Exception as error:  # see `hub.info`
        where = f"{place}:{number + 1}" if number else place
        raise DataError(f"{where}: cannot be read from the Hub ({hub.one_line(error)}); {INSTEAD}") from None


def _only_split(place: str, splits: list[str]) -> str:
    if len(splits) > 1 and "train" not in splits:
        raise DataError(f"{place}: has the splits {', '.join(splits)}; name one, as in {place.split(':')[0]}::{splits[0]}")
    return "train" if "train" in splits else splits[0]


def _commit(place: str, name: str) -> str:
    return str(hub.info(name, f"{place}: no such file, and ", INSTEAD).sha)
