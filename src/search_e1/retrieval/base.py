"""What a retriever is. An extension point: anything with this method serves."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from search_e1.types import Passage


class Hit(Passage):
    """A passage that was found."""

    score: float
    """Greater is better; comparable within one query of one retriever only."""


@runtime_checkable
class Retriever(Protocol):
    """Finds passages for queries."""

    def search(self, queries: Sequence[str], topk: int) -> Sequence[Sequence[Passage]]:
        """At most ``topk`` passages for each query, best first; one list per query, in their order.

        Raises:
            RetrievalError: for anything that keeps a query from being answered. An empty list means that nothing matched.
        """
        ...


class Index(Retriever, Protocol):
    """A retriever over passages on this machine."""

    @property
    def checksum(self) -> str:
        """The sha256, in hexadecimal, of all that its answers depend on: passages, kind, settings, encoder."""
        ...

    def __len__(self) -> int:
        """Passages."""
        ...

    def search(self, queries: Sequence[str], topk: int) -> list[list[Hit]]:
        """See ``Retriever``."""
        ...
