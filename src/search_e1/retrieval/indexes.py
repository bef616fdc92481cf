"""Builds and opens indexes of any kind."""

from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from search_e1.errors import ConfigError, DataError
from search_e1.retrieval import directory as directories
from search_e1.retrieval.base import Index
from search_e1.retrieval.convention import EncoderSettings
from search_e1.retrieval.directory import StoredIndex
from search_e1.retrieval.hybrid import HybridIndex
from search_e1.runs.progress import Progress, silent
from search_e1.types import Passage

_CLASSES = {"bm25": "bm25:Bm25Index", "dense": "dense:DenseIndex"}


class DenseSettings(NamedTuple):
    """Settings of a dense index."""

    encoder: EncoderSettings
    faiss: str = "exact"  # preset or factory string; see ``dense.layout``
    parameters: str | None = None  # FAISS search parameters


def build_index(
    corpus: Iterable[Passage],
    directory: Path,
    progress: Progress = silent,
    *,
    dense: DenseSettings | None = None,
    source: str | None = None,
    processes: int = 1,
    language: str = "auto",
) -> Index:
    """Build a BM25 index of ``corpus``, or a dense one; see ``Bm25Index.build`` and ``DenseIndex.build``.

    Raises:
        ConfigError: the kind needs an extra that is not installed.
    """
    if dense is None:
        settings: dict[str, Any] = {"source": source, "processes": processes, "language": language}
        return _import_class("bm25", directory).build(corpus, directory, progress, **settings)
    index = _import_class("dense", directory)
    encoder = import_module("search_e1.retrieval.encoder").Encoder.of(dense.encoder)
    settings = {"index": dense.faiss, "parameters": dense.parameters, "source": source}
    return index.build(corpus, directory, encoder, progress, **settings)


def import_index(
    corpus: Iterable[Passage],
    directory: Path,
    file: Path,
    dense: DenseSettings,
    progress: Progress = silent,
    source: str | None = None,
) -> Index:
    """Import a FAISS index from ``file``; see ``DenseIndex.take_over``.

    Raises:
        ConfigError: the extra is not installed.
    """
    index = _import_class("dense", directory)
    encoder = import_module("search_e1.retrieval.encoder").Encoder.of(dense.encoder)
    return index.take_over(corpus, directory, encoder, progress, file=file, parameters=dense.parameters, source=source)


def open_index(
    directory: Path, encoder: EncoderSettings | None = None, parameters: str | None = None, device: str = "auto"
) -> StoredIndex:
    """Open the index in ``directory``. Only the libraries of its kind are imported.

    ``encoder``, ``parameters`` and ``device``: see ``DenseIndex.open``; ignored by other kinds.

    Raises:
        DataError: the index is missing, damaged, of another version or of an unknown kind.
        ConfigError: the kind needs an extra that is not installed.
    """
    kind = directories.read(directory).kind
    if kind not in _CLASSES:
        raise DataError(f"{directory}: an index of unknown kind {kind!r}; this version knows {', '.join(_CLASSES)}")
    index = _import_class(kind, directory)
    if kind == "dense":
        return index.open(directory, encoder, parameters=parameters, device=device)
    return index.open(directory)


def open_indexes(
    indexes: Sequence[Path], encoder: EncoderSettings | None = None, parameters: str | None = None, device: str = "auto"
) -> Index:
    """Open one index, or several with fused rankings; see ``open_index`` and ``HybridIndex``."""
    opened = [open_index(directory, encoder, parameters, device) for directory in indexes]
    return opened[0] if len(opened) == 1 else HybridIndex(opened)


def _import_class(kind: str, directory: Path) -> Any:
    module, name = _CLASSES[kind].split(":")
    try:
        if kind == "dense":
            import_module("sentence_transformers")
        return getattr(import_module(f"search_e1.retrieval.{module}"), name)
    except ModuleNotFoundError as error:
        problem = f"{directory}: a {kind} index needs {error.name}"
        raise ConfigError(f"{problem}; install it with `pip install 'search-e1[{kind}]'`") from None
