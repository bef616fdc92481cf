"""Protocols of retrievers and indexes. Any object with the method ``search`` is a retriever."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from search_e1.types import Passage


class Hit(Passage):
    """A retrieved passage."""

    score: float
    """Higher is better; comparable only within one query of one retriever."""


@runtime_checkable
class Retriever(Protocol):
    """Returns passages for queries."""

    def search(self, queries: Sequence[str], topk: int) -> Sequence[Sequence[Passage]]:
        """At most ``topk`` passages for each query, best first; one list per query, in order.

        Raises:
            RetrievalError: a query could not be answered. An empty list means that nothing matches.
        """


class Index(Retriever, Protocol):
    """A retriever over passages on this machine."""

    @property
    def checksum(self) -> str:
        """sha256 of everything that results depend on: passages, kind, settings, encoder."""

    def __len__(self) -> int:
        """Number of passages."""

    def passage(self, key: str) -> Passage | None:
        """The passage with this id, else the first one with this title (case-insensitive), else ``None``."""

    def search(self, queries: Sequence[str], topk: int) -> list[list[Hit]]:
        """See ``Retriever``."""
