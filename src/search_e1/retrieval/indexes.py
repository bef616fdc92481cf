"""Open an index of whatever kind."""

from importlib import import_module
from pathlib import Path

from search_e1.errors import ConfigError, DataError
from search_e1.retrieval import directory as directories
from search_e1.retrieval.base import Index

_KINDS = {"bm25": "bm25:Bm25Index", "dense": "dense:DenseIndex"}


def open_index(directory: Path) -> Index:
    """The index in ``directory``, of the kind that its manifest names. Only that kind's libraries are loaded.

    Raises:
        DataError: there is none, or it is damaged, of another version or of an unknown kind.
        ConfigError: its kind needs an extra that is not installed.
    """
    kind = directories.read(directory).kind
    if kind not in _KINDS:
        raise DataError(f"{directory}: an index of the unknown kind {kind!r}; this version knows {', '.join(_KINDS)}")
    module, name = _KINDS[kind].split(":")
    try:
        found = import_module(f"search_e1.retrieval.{module}")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{directory}: a {kind} index needs {error.name}; install it with `pip install 'search-e1[{kind}]'`"
        ) from error
    return getattr(found, name).open(directory)
