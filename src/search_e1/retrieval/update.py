"""Updates an index after its corpus changed: rebuilds it, reusing vectors of unchanged passages, and swaps it in."""

import shutil
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from search_e1.errors import DataError
from search_e1.retrieval import directory as directories
from search_e1.retrieval.base import Index
from search_e1.retrieval.convention import EncoderSettings
from search_e1.retrieval.indexes import build_index, open_index
from search_e1.retrieval.passages import Passages, hash64
from search_e1.runs import sync
from search_e1.runs.languages import ENGLISH
from search_e1.runs.progress import Progress, silent
from search_e1.types import Passage

_VECTORS = "vectors.faiss"
_DTYPES: dict[str, Any] = {"Flat": np.float32, "SQfp16": np.float16}


class Change(NamedTuple):
    """Differences between a corpus and an index's passages, by id."""

    before: int
    passages: int
    added: int
    changed: int
    removed: int
    same: bool
    """Whether the passages and their order are identical."""


def compare(index: Path, corpus: Iterable[Passage]) -> Change:
    """Compare ``corpus`` with the passages of ``index``; takes 32 bytes of memory per passage.

    Raises:
        DataError: the corpus cannot be read, or the index is missing.
    """
    old = _hashes(Passages.open(index))
    new = _hashes(corpus)
    added = int((~np.isin(new[:, 0], old[:, 0])).sum())
    removed = int((~np.isin(old[:, 0], new[:, 0])).sum())
    changed = int((~np.isin(new[:, 1], old[:, 1])).sum()) - added
    return Change(len(old), len(new), added, changed, removed, bool(np.array_equal(old, new)))


def _hashes(passages: Iterable[Passage]) -> np.ndarray:
    """Hashes of each passage's id and of its whole record, uint64 [passages, 2]."""
    found = array("Q")
    for passage in passages:
        found.extend((hash64(passage.id), hash64(passage.model_dump_json())))
    return np.frombuffer(found, dtype=np.uint64).reshape(-1, 2)


def build_updated(
    index: Path,
    corpus: Iterable[Passage],
    out: Path,
    progress: Progress = silent,
    *,
    source: str,
    encoder: EncoderSettings | None = None,
    device: str = "auto",
    processes: int = 1,
) -> tuple[Index, int]:
    """Build ``out``, an index of ``corpus`` with the settings of ``index``.

    ``source``: checksum of the corpus, by which an interrupted build is resumed. A dense index reuses the vectors of passages
    with unchanged title and text, unless its layout keeps no vectors. ``encoder``: current location of its encoder.

    Returns:
        The new index, and the number of passages that were encoded.

    Raises:
        DataError: the index is missing or damaged, or the corpus is empty.
        ModelError: the encoder does not load.
    """
    settings = directories.read(index).settings
    if directories.read(index).kind == "bm25":
        language = settings.get("language", ENGLISH)  # old indexes record no language
        return build_index(corpus, out, progress, source=source, processes=processes, language=language), 0
    opened: Any = open_index(index, encoder, device=device)
    reusing = _Reusing(opened, device)
    layout = {"index": settings["factory"], "parameters": settings["parameters"]}
    built = type(opened).build(corpus, out, reusing, progress, source=source, **layout)
    return built, reusing.encoded


class _Reusing:
    """Wraps a dense index's encoder; reuses the index's vectors and encodes only new passages."""

    def __init__(self, index: Any, device: str) -> None:
        settings, passages = index.manifest.settings, index.passages
        self._encoder = index.encoder
        if self._encoder.dtype != settings["dtype"]:  # queries are always encoded in float32
            opened = type(index.encoder).open
            self._encoder = opened(index.encoder.name, index.encoder.convention, device=device, dtype=settings["dtype"])
        self.encoded = 0
        file, dtype = index.directory / _VECTORS, _DTYPES.get(settings["stored"] or "")
        self._hashes, self._rows = np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.int64)
        if dtype is None:
            return
        # FAISS's flat format: a header, then one row per passage.
        shape = (len(passages), settings["dimension"])
        rows_at = file.stat().st_size - shape[0] * shape[1] * np.dtype(dtype).itemsize
        self._vectors = np.memmap(file, dtype=dtype, mode="r", offset=rows_at, shape=shape)
        hashes = np.fromiter(map(hash64, passages.contents()), dtype=np.uint64, count=len(passages))
        self._rows = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._rows]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def passages(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of passages, float32 [len(texts), dimension]."""
        wanted = np.fromiter(map(hash64, texts), dtype=np.uint64, count=len(texts))
        at = np.minimum(np.searchsorted(self._hashes, wanted), len(self._hashes) - 1)
        known = self._hashes[at] == wanted if len(self._hashes) else np.zeros(len(texts), dtype=bool)
        vectors = np.empty((len(texts), self._encoder.dimension), dtype=np.float32)
        if known.any():
            vectors[known] = self._vectors[self._rows[at[known]]]
        fresh = np.flatnonzero(~known)
        vectors[fresh] = self._encoder.passages([texts[i] for i in fresh.tolist()])
        self.encoded += len(fresh)
        return vectors


def beside(index: Path) -> Path:
    """The directory where the next version of ``index`` is built."""
    return index.with_name(f".{index.name}.next")


def take_place(index: Path) -> None:
    """Replace ``index`` by the index built ``beside`` it, with two renames.

    Processes that have the old index open keep using it: its files exist until they are closed. If this process is killed
    between the renames, ``recover`` restores the old index.
    """
    old = _old(index)
    shutil.rmtree(old, ignore_errors=True)
    index.rename(old)
    beside(index).rename(index)
    sync(index.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover(index: Path) -> None:
    """Restore ``index`` if an update was killed while replacing it, and remove a leftover completed build.

    Raises:
        DataError: there is no index.
    """
    if not index.exists() and _old(index).exists():
        _old(index).rename(index)
    directories.read(index)
    try:
        directories.read(beside(index))
    except DataError:
        return
    shutil.rmtree(beside(index))  # complete, but possibly of an older corpus


def _old(index: Path) -> Path:
    return index.with_name(f".{index.name}.old")
