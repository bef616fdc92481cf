"""BM25 over passages on disk: an index that is memory-mapped, so that processes share it and opening it takes no time."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

import bm25s
import numpy as np
import Stemmer
from bm25s.tokenization import Tokenizer

from search_e1.errors import DataError
from search_e1.progress import Progress, silent
from search_e1.retrieval import directory as directories
from search_e1.retrieval.base import Hit
from search_e1.retrieval.directory import IndexManifest
from search_e1.retrieval.passages import Passages
from search_e1.types import Passage

KIND = "bm25"
K1, B = 0.9, 0.4  # Anserini's and Pyserini's defaults for passages, not bm25s's
STOPWORDS, STEMMER = "english", "english"
SETTINGS = {"k1": K1, "b": B, "stopwords": STOPWORDS, "stemmer": STEMMER}

_SCORES = "bm25"


class Bm25Index:
    """An ``Index`` over one directory, which holds all that serving needs: scores, passages, manifest.

    What is searched is title and text; English stop words are left out and words are stemmed (Snowball).
    """

    def __init__(self, directory: Path, manifest: IndexManifest) -> None:
        """Use ``open`` or ``build``."""
        self.directory = directory
        self.manifest = manifest
        self.passages = Passages.open(directory)
        self._scores = bm25s.BM25.load(directory / _SCORES, mmap=True, show_progress=False)
        self._stemmer = Stemmer.Stemmer(STEMMER)

    @classmethod
    def build(
        cls,
        corpus: Iterable[Passage],
        directory: Path,
        progress: Progress = silent,
        *,
        source: str | None = None,
    ) -> Self:
        """Index ``corpus`` into ``directory``, which appears under its name only when it is complete.

        The corpus is read once and its texts are not held in memory. ``source`` tells it from others (the checksum of its
        file); with it a build that was interrupted goes on when it is run again.

        Raises:
            DataError: the corpus is empty or holds no word to search for.
            RunError: ``directory`` is there already, or cannot be written.
        """
        settings = source and {"kind": KIND, "format": directories.FORMAT, "source": source, **SETTINGS}
        with directories.building(directory, settings or None) as work:
            passages = work.passages(corpus, progress)
            _write(passages, work.path / _SCORES)
            manifest = work.finish(KIND, passages, SETTINGS, ("bm25s", "PyStemmer", "numpy"))
        return cls(directory, manifest)

    @classmethod
    def open(cls, directory: Path) -> Self:
        """The index that ``build`` left in ``directory``.

        Raises:
            DataError: there is none, or it is damaged, of another kind or of another version.
        """
        manifest = directories.read(directory, KIND)
        try:
            return cls(directory, manifest)
        except (OSError, ValueError, KeyError) as error:
            raise DataError(
                f"{directory}: a damaged BM25 index ({str(error).splitlines()[0]}); build it again with "
                "`search-e1 index build`"
            ) from error

    @property
    def checksum(self) -> str:
        """See ``Index``."""
        return self.manifest.checksum

    def __len__(self) -> int:
        """Passages in the index."""
        return len(self.passages)

    def search(self, queries: Sequence[str], topk: int) -> list[list[Hit]]:
        """See ``Retriever``. Passages that share no word with the query are never among them; ties in corpus order."""
        # Siblings of one group often ask the same thing in the same turn.
        found = {query: self._search(query, topk) for query in dict.fromkeys(queries)}
        return [list(found[query]) for query in queries]

    def _search(self, query: str, topk: int) -> list[Hit]:
        [words] = bm25s.tokenize(
            [query], stopwords=STOPWORDS, stemmer=self._stemmer, return_ids=False, show_progress=False
        )
        ids = self._scores.get_tokens_ids(words)
        if not ids:
            return []
        scores = self._scores.get_scores_from_ids(ids)
        return [self.passages.hit(i, float(scores[i])) for i in _best(scores, topk)]


def _best(scores: np.ndarray, topk: int) -> list[int]:
    """Indices of the ``topk`` greatest positive scores, best first.

    bm25s's own selection leaves it to ``argpartition`` which of several equal scores it keeps.
    """
    k = min(topk, len(scores))
    least = np.partition(scores, len(scores) - k)[len(scores) - k]
    candidates = np.flatnonzero((scores >= least) & (scores > 0))
    return candidates[np.argsort(-scores[candidates], kind="stable")][:k].tolist()


def _write(passages: Passages, directory: Path) -> None:
    """Write bm25s's files of ``passages`` into ``directory``."""
    tokenizer = Tokenizer(stopwords=STOPWORDS, stemmer=Stemmer.Stemmer(STEMMER))
    ids = list(tokenizer.streaming_tokenize(passages.texts(), allow_empty=False))
    vocabulary = tokenizer.get_vocab_dict()
    if not vocabulary:
        raise DataError(f"the corpus has {len(ids)} passages and not one word to search for; look at its contents")
    scores = bm25s.BM25(k1=K1, b=B)
    scores.index((ids, vocabulary), show_progress=False)
    scores.save(directory, show_progress=False)
