"""Build and open indexes of whatever kind."""

from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from search_e1.errors import ConfigError, DataError
from search_e1.retrieval import directory as directories
from search_e1.retrieval.base import Index
from search_e1.retrieval.convention import EncoderSettings
from search_e1.retrieval.hybrid import HybridIndex, StoredIndex
from search_e1.runs.progress import Progress, silent
from search_e1.types import Passage

_KINDS = {"bm25": "bm25:Bm25Index", "dense": "dense:DenseIndex"}


class DenseSettings(NamedTuple):
    """What a dense index is built with, beside the corpus."""

    encoder: EncoderSettings
    faiss: str = "exact"
    """A preset or a factory string: see ``dense.layout``."""
    parameters: str | None = None
    """For searching."""


def build_index(
    corpus: Iterable[Passage],
    directory: Path,
    progress: Progress = silent,
    *,
    dense: DenseSettings | None = None,
    source: str | None = None,
    processes: int = 1,
) -> Index:
    """A BM25 index of ``corpus`` in ``directory``, or a dense one: see ``Bm25Index.build`` and ``DenseIndex.build``.

    Raises:
        ConfigError: its kind needs an extra that is not installed.
    """
    if dense is None:
        return _kind("bm25", directory).build(corpus, directory, progress, source=source, processes=processes)
    made = _kind("dense", directory)
    encoder = import_module("search_e1.retrieval.encoder").Encoder.of(dense.encoder)
    return made.build(
        corpus, directory, encoder, progress, index=dense.faiss, parameters=dense.parameters, source=source
    )


def open_index(
    directory: Path, encoder: EncoderSettings | None = None, parameters: str | None = None, device: str = "auto"
) -> StoredIndex:
    """The index in ``directory``, of the kind that its manifest names. Only that kind's libraries are loaded.

    ``encoder``, ``parameters`` and ``device``: see ``DenseIndex.open``; other kinds have none.

    Raises:
        DataError: there is none, or it is damaged, of another version or of an unknown kind.
        ConfigError: its kind needs an extra that is not installed.
    """
    kind = directories.read(directory).kind
    if kind not in _KINDS:
        raise DataError(f"{directory}: an index of the unknown kind {kind!r}; this version knows {', '.join(_KINDS)}")
    found = _kind(kind, directory)
    if kind == "dense":
        return found.open(directory, encoder, parameters=parameters, device=device)
    return found.open(directory)


def open_indexes(
    indexes: Sequence[Path],
    encoder: EncoderSettings | None = None,
    parameters: str | None = None,
    device: str = "auto",
) -> Index:
    """The index of one directory, or those of several fused: see ``open_index`` and ``HybridIndex``."""
    opened = [open_index(directory, encoder, parameters, device) for directory in indexes]
    return opened[0] if len(opened) == 1 else HybridIndex(opened)


def _kind(kind: str, directory: Path) -> Any:
    module, name = _KINDS[kind].split(":")
    try:
        return getattr(import_module(f"search_e1.retrieval.{module}"), name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{directory}: a {kind} index needs {error.name}; install it with `pip install 'search-e1[{kind}]'`"
        ) from error
