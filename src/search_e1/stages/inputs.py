"""What the stages of a run read: questions, passages, and the retriever, each opened once.

In the order in which a mistake is cheapest to find; nothing here needs a policy.
"""

import difflib
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

from search_e1 import runs
from search_e1.config import Config, default_of
from search_e1.data.corpus import read_corpus
from search_e1.data.questions import load_many, load_questions, subset
from search_e1.errors import ConfigError, DataError
from search_e1.retrieval import directory as directories
from search_e1.retrieval.base import Index, Retriever
from search_e1.retrieval.cache import CachedRetriever
from search_e1.retrieval.client import HttpRetriever
from search_e1.retrieval.indexes import DenseSettings, build_index, open_indexes
from search_e1.retrieval.passages import Passages
from search_e1.runs import Artifact
from search_e1.runs.progress import Progress, silent
from search_e1.types import Question

Watch = Callable[[str], AbstractContextManager[Progress]]
"""Called with the name of a stage that is about to work; its context gives the stage something to tell progress to."""


def unwatched(stage: str) -> AbstractContextManager[Progress]:
    """A ``Watch`` for nobody."""
    return nullcontext(silent)


class Inputs:
    """Questions, passages and retriever of the run in ``root`` under ``config``."""

    def __init__(self, config: Config, root: Path, watch: Watch = unwatched) -> None:
        self.config = config
        self.root = root
        self.watch = watch

    @cached_property
    def train_questions(self) -> list[Question]:
        """The training questions, or the subset of them that the config asks for."""
        questions = load_many(self.config.data.train)
        return at_most(questions, self.config.data.max_train, self.config.seed)

    @cached_property
    def eval_questions(self) -> dict[str, list[Question]]:
        """Benchmark -> its questions."""
        data = self.config.data
        return {
            name: at_most(load_questions(path, name), data.max_eval, self.config.seed)
            for name, path in data.eval.items()
        }

    @cached_property
    def retriever(self) -> Retriever:
        """Connected and known to answer."""
        retrieval = self.config.retrieval
        if retrieval.url:
            return self._cached_server()
        if isinstance(retrieval.cache, Path):
            return CachedRetriever(self._index, retrieval.cache, self.retrieval_checksum())
        return self._index

    @cached_property
    def _index(self) -> Index:
        retrieval = self.config.retrieval
        return open_indexes(self._indexes, retrieval.encoder, retrieval.parameters)

    @cached_property
    def _verified(self) -> Index:
        """The index, whose every byte is as it was written; one that the run has built is verified with its artifact."""
        for directory in self.config.retrieval.index:
            with self.watch("index check") as progress:
                directories.verify(directory, progress)
        return self._index

    @property
    def _indexes(self) -> Sequence[Path]:
        """Directories of indexes over the same passages: given, or built."""
        return self.config.retrieval.index or [self.index().path / kind for kind in self._kinds]

    @property
    def _kinds(self) -> tuple[str, ...]:
        """Of the indexes that are built."""
        kind = self.config.retrieval.kind
        return ("bm25", "dense") if kind == "hybrid" else (kind,)

    @cached_property
    def _server(self) -> HttpRetriever:
        retrieval = self.config.retrieval
        client = HttpRetriever(str(retrieval.url), retrieval.timeout, retrieval.attempts, retrieval.time_limit)
        client.probe()
        return client

    def _cached_server(self) -> Retriever:
        retrieval = self.config.retrieval
        key = self._server.checksum or retrieval.cache_key
        if isinstance(retrieval.cache, Path) and not key:
            raise ConfigError(
                f"retrieval.cache: {retrieval.url} does not tell its index's checksum; name what it serves with "
                "retrieval.cache_key, or leave retrieval.cache out"
            )
        if not retrieval.cache or not key:
            return self._server
        path = self.root / "retrieval-cache.sqlite" if retrieval.cache is True else retrieval.cache
        return CachedRetriever(self._server, path, key)

    def index(self) -> Artifact:
        """The index of ``data.corpus``, or both if they are to be fused, each in a directory named by its kind."""
        corpus = self.config.data.corpus
        if corpus is None:
            raise DataError("data.corpus is missing; give it, or retrieval.index, or retrieval.url")
        if not corpus.is_file():
            raise DataError(f"data.corpus = {str(corpus)!r}: no such file; give the path of a JSON lines file")

        retrieval, checksum = self.config.retrieval, runs.checksum(corpus)

        def make(out: Path) -> dict[str, Any]:
            for kind in self._kinds:
                # Encoding can take hours, and what it has written outlives a kill here, unlike in the artifact's directory.
                place = self.root / f".index-{kind}"
                shutil.rmtree(place, ignore_errors=True)  # complete, but perhaps of other settings
                dense = (
                    DenseSettings(retrieval.encoder, retrieval.faiss) if kind == "dense" and retrieval.encoder else None
                )
                with self.watch("index") as progress:
                    build_index(read_corpus(corpus), place, progress, dense=dense, source=checksum)
                place.rename(out / kind)
            return {}

        settings = {} if retrieval.kind == "bm25" else retrieval.model_dump(include={"kind", "encoder", "faiss"})
        return runs.artifact(
            self.root / "index", stage="index", settings=settings, inputs={"corpus": checksum}, seed=0, make=make,
            defaults=lambda path: default_of(("retrieval", *path)),
        )  # fmt: skip

    def passage_texts(self) -> Iterable[str] | None:
        """Title and text of all passages: the index's, or ``data.corpus`` beside a server, else ``None``."""
        corpus = self.config.data.corpus
        if not self.config.retrieval.url:
            return Passages.open(self._indexes[0]).texts()
        return (f"{passage.title} {passage.text}" for passage in read_corpus(corpus)) if corpus else None

    def benchmarks(self, names: Sequence[str] = ()) -> list[str]:
        """The benchmarks of ``data.eval``, or ``names`` of them, in the config's order.

        Raises:
            ConfigError: there is no such benchmark; suggests the nearest.
        """
        known = list(self.config.data.eval)
        for name in names:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"data.eval has {', '.join(known)}"
                raise ConfigError(f"no benchmark {name!r} in data.eval; {hint}")
        return [name for name in known if name in names or not names]

    def evaluated_on(self, benchmarks: Sequence[str] | None = None) -> dict[str, str]:
        """Checksums of what is evaluated on."""
        files = self.config.data.eval
        chosen = {f"eval.{name}": runs.checksum(files[name]) for name in (files if benchmarks is None else benchmarks)}
        return {"retrieval": self.retrieval_checksum(), **chosen}

    def retrieval_checksum(self) -> str:
        """Of the index; of a server's, where it tells, else what names it."""
        retrieval = self.config.retrieval
        if retrieval.url:
            return self._server.checksum or retrieval.cache_key or retrieval.url
        return self._verified.checksum


def at_most(questions: list[Question], most: int | None, seed: int) -> list[Question]:
    """A random subset of ``most`` questions, the same for a seed; all of them if there are not more."""
    return questions if most is None else subset(questions, min(most, len(questions)), seed)
