"""Builds bm25s's index files in bounded memory.

bm25s itself holds all words of the corpus and the whole score matrix in memory, about 50 GB for 21 million passages. Here
words are counted passage by passage and written to disk; each posting (word, passage, count) is scored and appended to its
block of words; each block is sorted in memory and appended to the files, which are bit-identical to bm25s's. Only the
vocabulary and 16 bytes per passage grow with the corpus.
"""

import json
import math
import multiprocessing
import os
import signal
import threading
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from search_e1.errors import DataError, RunError
from search_e1.retrieval.analysis import analysis_of
from search_e1.retrieval.bm25s_import import bm25s
from search_e1.retrieval.passages import Passages, hash64, npy_header
from search_e1.runs import write_atomically
from search_e1.runs.languages import ENGLISH
from search_e1.runs.progress import Progress

K1, B = 0.9, 0.4  # Anserini's and Pyserini's defaults for passages, not bm25s's
WORDS, MAX_SCORES = "words.npy", "most.npy"
"""Additional files: ``WORD`` [words], sorted by digest; and the maximum score of each word id, float32 [words]."""
WORD = np.dtype([("digest", "<u8"), ("id", "<i4")])
"""Hash of a word's stem, and its id in bm25s."""
POSTINGS = 2**24
"""Postings sorted in memory at once, 40 bytes each."""
CHUNK_BYTES = 2**23
"""Bytes of passages that one process counts at a time."""
_SYNC_EVERY = 8  # chunks; at most this many are lost to preemption

_POSTING = np.dtype([("word", "<i4"), ("passage", "<i4"), ("score", "<f4")])
_COUNTED, _STEMS = "counted.json", "stems.txt"
_NUMBERS = ("lengths.i4", "distinct.i4", "words.i4", "counts.i4")
"""int32 files. Per passage: number of words, of distinct words. Per posting, by passage: word id, count."""


def build(
    passages: Passages,
    directory: Path,
    scratch: Path,
    progress: Progress,
    processes: int = 1,
    postings: int = POSTINGS,
    language: str = ENGLISH,
) -> float:
    """Write bm25s's files for ``passages``, ``WORDS`` and ``MAX_SCORES`` into ``directory``, resuming from ``scratch``.

    Returns the share of passages without a word to search for.

    Raises:
        DataError: no passage has a word.
        RunError: a worker process was killed.
    """
    vocabulary = _count(passages, scratch, progress, processes, language)
    if not vocabulary:
        raise DataError(f"the corpus has {len(passages)} passages but not one word to search for; check its contents")
    numbers = {name: np.memmap(scratch / name, dtype=np.int32, mode="r") for name in _NUMBERS}
    frequencies = np.zeros(len(vocabulary), dtype=np.int64)
    for start in range(0, len(numbers["words.i4"]), postings):
        frequencies += np.bincount(numbers["words.i4"][start : start + postings], minlength=len(vocabulary))
    ends = np.concatenate(([0], np.cumsum(frequencies)))
    # Saves parameters, vocabulary and the offset of each word; `_sort` writes the two arrays that are empty here.
    model = bm25s.BM25(k1=K1, b=B)
    model.scores = {"data": np.empty(0), "indices": np.empty(0), "indptr": ends, "num_docs": len(passages)}
    model.nonoccurrence_array = None
    model.vocab_dict = vocabulary | {"": len(vocabulary)}
    model.save(directory, show_progress=False)
    blocks = _blocks(ends, postings)
    _scatter(numbers, frequencies, blocks, scratch, progress)
    _write_npy(directory / MAX_SCORES, _sort(ends, blocks, scratch, directory, progress))
    words = np.empty(len(vocabulary), dtype=WORD)
    words["digest"] = np.fromiter(map(hash64, vocabulary), dtype=np.uint64, count=len(vocabulary))
    words["id"] = np.arange(len(vocabulary))
    _write_npy(directory / WORDS, words[np.argsort(words["digest"])])
    return 1 - np.count_nonzero(numbers["distinct.i4"]) / len(passages)


def _write_npy(path: Path, values: np.ndarray) -> None:
    with path.open("wb") as file:
        file.write(npy_header(values.dtype, len(values)))
        file.write(values.data)


class Counted(NamedTuple):
    """Word counts of a range of passages."""

    stems: list[str]  # in order of appearance; ``words`` index this list
    lengths: np.ndarray
    distinct: np.ndarray
    words: np.ndarray
    counts: np.ndarray


class _Numbers(dict[str, int]):
    """Word -> number of its stem in ``stems``, in order of appearance; -1 for a stop word."""

    def __init__(self, stem: Callable[[str], str]) -> None:
        super().__init__()
        self.stems: dict[str, int] = {}
        self._stem = stem

    def __missing__(self, word: str) -> int:
        root = self._stem(word)
        self[word] = number = self.stems.setdefault(root, len(self.stems)) if root else -1
        return number


def count(directory: Path, start: int, stop: int, language: str = ENGLISH) -> Counted:
    """Count the words of passages ``start`` to ``stop`` in ``directory``."""
    analysis, ids, lengths = analysis_of(language), array("i"), []
    numbers = _Numbers(analysis.stem)
    for text in Passages.open(directory).texts(start, stop):
        parts = analysis.split(text)
        ids.extend(map(numbers.__getitem__, parts))
        lengths.append(len(parts))
    words = np.frombuffer(ids, dtype=np.int32)
    passage = np.repeat(np.arange(stop - start), lengths)[words >= 0]
    keys = passage * (len(numbers.stems) + 1) + words[words >= 0]
    postings, counts = np.unique(keys, return_counts=True)
    by_passage, word = np.divmod(postings, len(numbers.stems) + 1)
    per_passage = (np.bincount(column, minlength=stop - start) for column in (passage, by_passage))
    return Counted(list(numbers.stems), *(column.astype(np.int32) for column in (*per_passage, word, counts)))


def _count(passages: Passages, scratch: Path, progress: Progress, processes: int, language: str) -> dict[str, int]:
    """Write ``_NUMBERS`` for all passages; returns stem -> id, in order of appearance."""
    mark = scratch / _COUNTED
    state: dict[str, Any] = {"passages": 0, "bytes": dict.fromkeys((_STEMS, *_NUMBERS), 0)}
    if mark.exists():
        state = json.loads(mark.read_text())
    done: int = state["passages"]
    bounds = [done + bound for bound in _blocks(passages.offsets[done:], CHUNK_BYTES)]
    with ExitStack() as stack:
        files = {name: stack.enter_context(_truncated(scratch / name, size)) for name, size in state["bytes"].items()}
        stems = (scratch / _STEMS).read_text(encoding="utf-8").split("\n")[:-1]
        vocabulary = {stem: number for number, stem in enumerate(stems)}
        for number, counted in enumerate(_counted(passages, bounds, processes, language), 1):
            fresh = [stem for stem in counted.stems if stem not in vocabulary]
            vocabulary.update(zip(fresh, range(len(vocabulary), len(vocabulary) + len(fresh)), strict=True))
            ids = np.fromiter(map(vocabulary.__getitem__, counted.stems), dtype=np.int32, count=len(counted.stems))
            files[_STEMS].write("".join(f"{stem}\n" for stem in fresh).encode())
            arrays = (counted.lengths, counted.distinct, ids[counted.words], counted.counts)
            for name, values in zip(_NUMBERS, arrays, strict=True):
                files[name].write(values)
            done = bounds[number]
            if number % _SYNC_EVERY == 0 or done == len(passages):
                for file in files.values():
                    file.flush()
                    os.fsync(file.fileno())
                sizes = {name: file.tell() for name, file in files.items()}
                write_atomically(mark, json.dumps({"passages": done, "bytes": sizes}))
            progress(done, len(passages), f"{len(vocabulary):,} words")
    return vocabulary


def _truncated(path: Path, size: int) -> BinaryIO:
    """Open ``path``, truncated to ``size`` bytes, for appending."""
    file = path.open("r+b" if path.exists() else "w+b")
    file.truncate(size)
    file.seek(size)
    return file


def _counted(passages: Passages, bounds: Sequence[int], processes: int, language: str) -> Iterator[Counted]:
    """``count`` of each part between ``bounds``, in order."""
    parts = list(pairwise(bounds))
    directory = passages.path.parent
    if processes == 1 or len(parts) < 2 * processes:
        for start, stop in parts:
            yield count(directory, start, stop, language)
        return
    # Spawned: forking a process with threads, such as torch's, may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=_start_worker) as pool:
        ahead: deque[Future[Counted]] = deque()
        try:
            for start, stop in parts:
                ahead.append(pool.submit(count, directory, start, stop, language))
                if len(ahead) > 2 * processes:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        except BrokenProcessPool as error:
            problem = "a process that counts words was killed, perhaps for lack of memory"
            raise RunError(f"{problem}; run the command again with fewer --processes") from error
        finally:
            for future in ahead:
                future.cancel()


def _start_worker() -> None:
    """Initialize a worker: ignore interrupts, and exit when the parent does, even if it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def leave() -> None:
        parent = multiprocessing.parent_process()
        if parent:
            parent.join()
            os._exit(1)

    threading.Thread(target=leave, daemon=True).start()


def _blocks(ends: np.ndarray, most: int) -> list[int]:
    """Boundaries [0, ..., n] of parts of size at most ``most``; item i has size ``ends[i + 1] - ends[i]``.

    An item larger than ``most`` is a part of its own.
    """
    cuts = [0]
    while cuts[-1] < len(ends) - 1:
        fit = int(np.searchsorted(ends, ends[cuts[-1]] + most, side="right")) - 1
        cuts.append(max(fit, cuts[-1] + 1))
    return cuts


def _block(scratch: Path, number: int) -> Path:
    return scratch / f"block-{number}"


def _scatter(
    numbers: Mapping[str, np.ndarray], frequencies: np.ndarray, blocks: Sequence[int], scratch: Path, progress: Progress
) -> None:
    """Score each posting and append it to its block's file.

    Lucene's BM25 in its accurate variant (Kamphuis et al., Which BM25 do you mean?, ECIR 2020), with bm25s's rounding.
    """
    lengths, distinct, words, counts = (numbers[name] for name in _NUMBERS)
    total, average = len(lengths), lengths.mean()
    different, where = np.unique(frequencies, return_inverse=True)
    idf = np.array([math.log(1 + (total - n + 0.5) / (n + 0.5)) for n in different.tolist()], dtype=np.float32)[where]
    ends = np.concatenate(([0], np.cumsum(distinct, dtype=np.int64)))
    cuts = _blocks(ends, POSTINGS // 8)  # a posting takes about 100 bytes here
    with ExitStack() as stack:
        files = [stack.enter_context(_block(scratch, i).open("wb")) for i in range(len(blocks) - 1)]
        for start, stop in pairwise(cuts):
            here = slice(ends[start], ends[stop])
            records = np.empty(ends[stop] - ends[start], dtype=_POSTING)
            records["word"] = words[here]
            records["passage"] = np.repeat(np.arange(start, stop, dtype=np.int32), distinct[start:stop])
            tf, length = counts[here].astype(np.float32), lengths[records["passage"]]
            records["score"] = idf[records["word"]] * (tf / (K1 * ((1 - B) + B * length / average) + tf))
            block = (np.searchsorted(blocks, records["word"], side="right") - 1).astype(np.uint16)
            records = records[np.argsort(block, kind="stable")]
            bounds = np.concatenate(([0], np.cumsum(np.bincount(block, minlength=len(files)))))
            for file, first, last in zip(files, bounds, bounds[1:], strict=False):
                file.write(records[first:last].data)
            progress(stop, total, f"{ends[stop]:,} postings")


def _sort(ends: np.ndarray, blocks: Sequence[int], scratch: Path, directory: Path, progress: Progress) -> np.ndarray:
    """Write bm25s's two large arrays; returns the maximum score of each word, float32 [words]."""
    most = np.empty(len(ends) - 1, dtype=np.float32)
    paths = directory / "data.csc.index.npy", directory / "indices.csc.index.npy"
    with paths[0].open("wb") as data, paths[1].open("wb") as indices:
        data.write(npy_header(np.float32, int(ends[-1])))
        indices.write(npy_header(np.int32, int(ends[-1])))
        for number, (first, last) in enumerate(pairwise(blocks)):
            records = np.fromfile(_block(scratch, number), dtype=_POSTING)
            order = np.argsort(records["word"].astype(np.int64) << 32 | records["passage"])
            scores = records["score"][order]
            data.write(scores.data)
            indices.write(records["passage"][order].data)
            most[first:last] = np.maximum.reduceat(scores, ends[first:last] - ends[first])
            _block(scratch, number).unlink()
            progress(number + 1, len(blocks) - 1, "sorted")
    return most
