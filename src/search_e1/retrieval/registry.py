"""Registry of retriever kinds; opens the retriever of a config.

A kind is a function from the config section ``[retrieval]`` to a ``Retriever``. A user's own needs no registration: a config
names it as ``kind = "module:attribute"``.
"""

from collections.abc import Callable
from typing import Any

from search_e1.errors import ConfigError
from search_e1.retrieval.base import Retriever
from search_e1.runs.registry import Registry

Section = Any
"""The section ``[retrieval]``, a ``search_e1.config.RetrievalConfig``, which imports this module."""
KINDS: Registry[Callable[[Section], Retriever]] = Registry("kind of retriever")
_INDEXES = {"bm25": ("bm25",), "dense": ("dense",), "hybrid": ("bm25", "dense")}
"""Kind of retriever -> kinds of index that a run builds from its corpus, unless ``index`` is given."""


@KINDS.register("bm25")
@KINDS.register("dense")
@KINDS.register("hybrid")
def _open_index(section: Section) -> Retriever:
    from search_e1.retrieval.indexes import open_indexes

    return open_indexes(section.index, section.encoder, section.parameters)


@KINDS.register("url")
def _connect(section: Section) -> Retriever:
    from search_e1.retrieval.client import HttpRetriever

    return HttpRetriever(str(section.url), section.timeout, section.attempts, section.time_limit)


def check_kind(name: str) -> str:
    """``name``, if it is registered or has the form ``module:attribute`` (imported only when opened).

    Raises:
        ConfigError: it is neither; suggests the closest registered name.
    """
    if ":" not in name:
        KINDS.get(name, "retrieval.kind")
    return name


def index_kinds(section: Section) -> tuple[str, ...]:
    """Kinds of index that ``section`` searches; empty for a server and for a user's own retriever."""
    return _INDEXES.get(_kind_name(section), ())


def open_retriever(section: Section, topk: int = 3) -> Retriever:
    """Open the retriever of ``section``; if it has a method ``probe(topk)``, probe it.

    Raises:
        ConfigError: the kind is unknown, does not return a retriever, or needs an extra that is not installed.
        RetrievalError: the probe fails.
    """
    name = _kind_name(section)
    kind = KINDS.get(name, "retrieval.kind")
    if not callable(kind):
        raise ConfigError(f"retrieval.kind = {name!r}: not callable; give a function of the section or a class")
    retriever = kind(section)
    if not isinstance(retriever, Retriever):
        raise ConfigError(f"retrieval.kind = {name!r}: gave a {type(retriever).__name__}, which has no method search")
    if probe := getattr(retriever, "probe", None):
        probe(topk)
    return retriever


def _kind_name(section: Section) -> str:
    return "url" if section.url and section.kind in _INDEXES else section.kind
