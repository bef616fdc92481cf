"""Reciprocal rank fusion of several indexes."""

import json
from collections.abc import Sequence

from search_e1.errors import ConfigError
from search_e1.retrieval.base import Hit
from search_e1.retrieval.directory import StoredIndex
from search_e1.runs import sha256_text
from search_e1.types import Passage

K = 60
"""Constant of reciprocal rank fusion: a passage's score is the sum of 1 / (K + rank) over the rankings, ranks from 1 (Cormack,
Clarke and Buettcher, Reciprocal rank fusion outperforms Condorcet and individual rank learning methods, SIGIR 2009)."""
DEPTH = 100
"""Number of hits of each ranking to fuse."""


class HybridIndex:
    """An ``Index`` that fuses two or more indexes of any kind over the same passages."""

    def __init__(self, indexes: Sequence[StoredIndex], depth: int = DEPTH, k: int = K) -> None:
        """``depth``: hits of each index to fuse, at least ``topk``. ``k``: see ``K``.

        Raises:
            ConfigError: fewer than two indexes, a repeated index, or different passages.
        """
        if len(indexes) < 2 or len({index.checksum for index in indexes}) < len(indexes):
            raise ConfigError("fusion needs two different indexes; give two, e.g. a bm25 and a dense one")
        corpora = {index.manifest.corpus: index.manifest for index in indexes}
        if len(corpora) > 1:
            sizes = " and ".join(f"{m.passages:,} passages, {m.corpus[:12]}" for m in corpora.values())
            raise ConfigError(f"indexes over different corpora cannot be fused ({sizes}); build them from the same corpus")
        self.indexes = tuple(indexes)
        self.depth, self.k = depth, k

    @property
    def checksum(self) -> str:
        """See ``Index``."""
        parts = {"rrf": [index.checksum for index in self.indexes], "depth": self.depth, "k": self.k}
        return sha256_text(json.dumps(parts))

    def __len__(self) -> int:
        """Number of passages."""
        return len(self.indexes[0])

    def passage(self, key: str) -> Passage | None:
        """See ``Index``."""
        return self.indexes[0].passage(key)

    def search(self, queries: Sequence[str], topk: int) -> list[list[Hit]]:
        """See ``Retriever``. Ties are broken by the order of the indexes and their rankings."""
        rankings = [index.search(queries, max(self.depth, topk)) for index in self.indexes]
        return [fuse(ranked, topk, self.k) for ranked in zip(*rankings, strict=True)]


def fuse(rankings: Sequence[Sequence[Hit]], topk: int, k: int = K) -> list[Hit]:
    """The top ``topk`` hits of several rankings of one query, with fused scores."""
    scores: dict[str, float] = {}
    hits: dict[str, Hit] = {}
    for ranking in rankings:
        for rank, hit in enumerate(ranking, 1):
            scores[hit.id] = scores.get(hit.id, 0.0) + 1 / (k + rank)
            hits.setdefault(hit.id, hit)
    best = sorted(scores, key=scores.__getitem__, reverse=True)[:topk]  # stable: ties keep the order of appearance
    return [hits[id].model_copy(update={"score": scores[id]}) for id in best]
