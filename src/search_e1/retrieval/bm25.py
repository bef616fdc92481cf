"""BM25 over memory-mapped files, which processes share and which open at once."""

import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

import numpy as np

from search_e1.errors import DataError
from search_e1.retrieval import directory as directories
from search_e1.retrieval.base import Hit
from search_e1.retrieval.bm25_build import MAX_SCORES, WORDS, build
from search_e1.retrieval.bm25s_import import bm25s
from search_e1.retrieval.directory import IndexManifest
from search_e1.retrieval.passages import Passages
from search_e1.retrieval.postings import Postings
from search_e1.retrieval.words import STEMMER, STOPWORDS, Stems, digest, split
from search_e1.runs.progress import Progress, silent
from search_e1.types import Passage

KIND = "bm25"
K1, B = 0.9, 0.4  # Anserini's and Pyserini's defaults for passages, not bm25s's
SETTINGS = {"k1": K1, "b": B, "stopwords": STOPWORDS, "stemmer": STEMMER}

_SCORES = "bm25"


class Bm25Index:
    """An ``Index`` of titles and texts without English stop words, stemmed (Snowball)."""

    def __init__(self, directory: Path, manifest: IndexManifest) -> None:
        """Use ``open`` or ``build``."""
        self.directory = directory
        self.manifest = manifest
        self.passages = Passages.open(directory)
        # Without the vocabulary, a dictionary of a gigabyte for 21 million passages; WORDS stays on disk.
        model = bm25s.BM25.load(
            directory / _SCORES, mmap=True, load_vocab=False, show_progress=False, allow_pickle=False
        )
        self._postings = Postings(
            model.scores, np.load(directory / _SCORES / MAX_SCORES, mmap_mode="r", allow_pickle=False)
        )
        self._words = np.asarray(np.load(directory / _SCORES / WORDS, mmap_mode="r", allow_pickle=False))
        self._thread = threading.local()

    @classmethod
    def build(
        cls,
        corpus: Iterable[Passage],
        directory: Path,
        progress: Progress = silent,
        *,
        source: str | None = None,
        processes: int = 1,
    ) -> Self:
        """Build an index of ``corpus`` in ``directory``, which gets its name only when it is complete.

        The corpus is read once and its texts are not held in memory. ``source`` identifies it (the checksum of its file); with
        it, an interrupted build is resumed when it runs again. ``processes`` count words in parallel; more than one requires a
        main module that can be imported again (``multiprocessing``'s spawn).

        Raises:
            DataError: the corpus is empty or has no word to search for.
            RunError: ``directory`` exists, or cannot be written.
        """
        settings = source and {"kind": KIND, "format": directories.FORMAT, "source": source, **SETTINGS}
        with directories.building(directory, settings or None) as work:
            passages = work.passages(corpus, progress)
            build(passages, work.path / _SCORES, work.scratch, progress, k1=K1, b=B, processes=processes)
            manifest = work.finish(KIND, passages, SETTINGS, ("bm25s", "PyStemmer", "numpy"))
        return cls(directory, manifest)

    @classmethod
    def open(cls, directory: str | Path) -> Self:
        """Open the index in ``directory``.

        Raises:
            DataError: there is no index, or it is damaged, of another kind or of another version.
        """
        directory = Path(directory)
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

    def passage(self, key: str) -> Passage | None:
        """See ``Index``."""
        return self.passages.find(key)

    def search(self, queries: Sequence[str], topk: int) -> list[list[Hit]]:
        """See ``Retriever``. Every hit shares a word with the query; ties are in corpus order.

        Thread-safe; each thread takes 4 bytes a passage.
        """
        # Siblings of a group often send the same query in the same turn.
        hits = {query: self._search(query, topk) for query in dict.fromkeys(queries)}
        return [list(hits[query]) for query in queries]

    def _search(self, query: str, topk: int) -> list[Hit]:
        return [self.passages.hit(i, score) for i, score in self._postings.best(self._ids(query), topk)]

    def _ids(self, query: str) -> list[int]:
        """Ids of the query's words that occur in a passage."""
        if not hasattr(self._thread, "stems"):
            self._thread.stems = Stems()  # not thread-safe
        stems = [stem for word in split(query) if (stem := self._thread.stems[word])]
        digests = np.array([digest(stem) for stem in stems], dtype=np.uint64)
        at = np.minimum(np.searchsorted(self._words["digest"], digests), len(self._words) - 1)
        return self._words["id"][at[self._words["digest"][at] == digests]].tolist()
