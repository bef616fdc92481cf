"""What a retriever is. An extension point: anything with this method serves."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from search_e1.types import Passage


@runtime_checkable
class Retriever(Protocol):
    """Finds passages for queries."""

    def search(self, queries: Sequence[str], topk: int) -> list[list[Passage]]:
        """At most ``topk`` passages for each query, best first; one list per query, in their order.

        Raises:
            RetrievalError: for anything that keeps a query from being answered. An empty list means that nothing matched.
        """
        ...
