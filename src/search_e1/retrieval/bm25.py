"""BM25 over passages on disk: an index that is memory-mapped, so that processes share it and opening it takes no time."""

import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import Any, BinaryIO, Self

import bm25s
import numpy as np
import Stemmer
from bm25s.tokenization import Tokenizer

from search_e1.errors import DataError
from search_e1.progress import Progress, silent
from search_e1.types import Passage

K1, B = 0.9, 0.4  # Anserini's and Pyserini's defaults for passages, not bm25s's
STOPWORDS, STEMMER = "english", "english"
FORMAT = 1
"""Version of the directory's layout; one of another version is refused."""

_MANIFEST, _PASSAGES, _OFFSETS, _SCORES = "manifest.json", "passages.jsonl", "offsets.npy", "bm25"
_TOLD_EVERY = 1000  # passages


class Bm25Index:
    """A ``Retriever`` over one directory, which holds all that serving needs: scores, passages, manifest.

    What is searched is title and text; English stop words are left out and words are stemmed (Snowball).
    """

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        """Use ``open`` or ``build``."""
        self.directory = directory
        self.manifest = manifest
        self._scores = bm25s.BM25.load(directory / _SCORES, mmap=True, show_progress=False)
        self._offsets = np.load(directory / _OFFSETS, mmap_mode="r")  # [passages + 1], int64, bytes
        with (directory / _PASSAGES).open("rb") as file:
            self._passages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._stemmer = Stemmer.Stemmer(STEMMER)

    @classmethod
    def build(cls, corpus: Iterable[Passage], directory: Path, progress: Progress = silent) -> Self:
        """Index ``corpus`` into ``directory``, which appears under its name only when it is complete.

        The corpus is read once and its texts are not held in memory.

        Raises:
            DataError: the corpus is empty or holds no word to search for, or ``directory`` is there already.
        """
        if directory.exists():
            raise DataError(f"{directory}: already there; delete it, or give another directory for the index")
        unfinished = directory.with_name(f".{directory.name}.unfinished-{os.getpid()}")
        try:
            (unfinished / _SCORES).mkdir(parents=True)
            manifest = _write(corpus, unfinished, progress)
            (unfinished / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
            unfinished.rename(directory)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        return cls(directory, manifest)

    @classmethod
    def open(cls, directory: Path) -> Self:
        """The index that ``build`` left in ``directory``.

        Raises:
            DataError: there is none, or it is damaged or of another version.
        """
        again = "make one with `search-e1 index build`"
        try:
            manifest = json.loads((directory / _MANIFEST).read_text(encoding="utf-8"))
            found = manifest["bm25_format"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{directory}: not a BM25 index (no manifest of one in it); {again}") from error
        if found != FORMAT:
            raise DataError(f"{directory}: a BM25 index of format {found}, not {FORMAT}; {again}")
        try:
            index = cls(directory, manifest)
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{directory}: a damaged BM25 index ({str(error).splitlines()[0]}); {again}") from error
        if len(index._passages) != index._offsets[-1] or len(index) != manifest["passages"]:
            raise DataError(f"{directory}: a damaged BM25 index ({_PASSAGES} is not of its length); {again}")
        return index

    def __len__(self) -> int:
        """Passages in the index."""
        return len(self._offsets) - 1

    def search(self, queries: Sequence[str], topk: int) -> list[list[Passage]]:
        """See ``Retriever``. Passages that share no word with the query are never among them; ties in corpus order."""
        # Siblings of one group often ask the same thing in the same turn.
        found = {query: self._search(query, topk) for query in dict.fromkeys(queries)}
        return [list(found[query]) for query in queries]

    def _search(self, query: str, topk: int) -> list[Passage]:
        [words] = bm25s.tokenize(
            [query], stopwords=STOPWORDS, stemmer=self._stemmer, return_ids=False, show_progress=False
        )
        ids = self._scores.get_tokens_ids(words)
        return [self._passage(i) for i in _best(self._scores.get_scores_from_ids(ids), topk)] if ids else []

    def _passage(self, index: int) -> Passage:
        start, end = self._offsets[index : index + 2].tolist()
        return Passage.model_validate_json(self._passages[start:end])


def _best(scores: np.ndarray, topk: int) -> list[int]:
    """Indices of the ``topk`` greatest positive scores, best first.

    bm25s's own selection leaves it to ``argpartition`` which of several equal scores it keeps.
    """
    k = min(topk, len(scores))
    least = np.partition(scores, len(scores) - k)[len(scores) - k]
    candidates = np.flatnonzero((scores >= least) & (scores > 0))
    return candidates[np.argsort(-scores[candidates], kind="stable")][:k].tolist()


def _write(corpus: Iterable[Passage], directory: Path, progress: Progress) -> dict[str, Any]:
    """Write all but the manifest, which is returned."""
    offsets, digest = [0], hashlib.sha256()
    tokenizer = Tokenizer(stopwords=STOPWORDS, stemmer=Stemmer.Stemmer(STEMMER))
    with (directory / _PASSAGES).open("wb") as file:
        texts = _texts(corpus, file, offsets, digest, progress)
        ids = list(tokenizer.streaming_tokenize(texts, allow_empty=False))
    if not ids:
        raise DataError("the corpus is empty; give one with at least one passage")
    vocabulary = tokenizer.get_vocab_dict()
    if not vocabulary:
        raise DataError(f"the corpus has {len(ids)} passages and not one word to search for; look at its contents")
    np.save(directory / _OFFSETS, np.array(offsets, dtype=np.int64))
    scores = bm25s.BM25(k1=K1, b=B)
    scores.index((ids, vocabulary), show_progress=False)
    scores.save(directory / _SCORES, show_progress=False)
    return {
        "bm25_format": FORMAT,
        "passages": len(ids),
        "words": len(vocabulary),
        "k1": K1,
        "b": B,
        "stopwords": STOPWORDS,
        "stemmer": STEMMER,
        "passages_sha256": digest.hexdigest(),
        "bm25s": bm25s.__version__,
    }


def _texts(
    corpus: Iterable[Passage], file: BinaryIO, offsets: list[int], digest: Any, progress: Progress
) -> Iterator[str]:
    """What is searched of each passage; on the way the passage is written to ``file`` and its end to ``offsets``."""
    total = len(corpus) if isinstance(corpus, Sized) else 0
    for done, passage in enumerate(corpus, 1):
        line = passage.model_dump_json().encode() + b"\n"
        file.write(line)
        digest.update(line)
        offsets.append(offsets[-1] + len(line))
        if done % _TOLD_EVERY == 0:
            progress(done, total, f"{done:,} passages")
        yield f"{passage.title} {passage.text}"
    progress(len(offsets) - 1, total, f"{len(offsets) - 1:,} passages")
