"""The retriever of a run: its server or a user's own, its checksum, its query cache."""

from pathlib import Path
from typing import Any

import pytest

from search_e1.config import Config, RetrievalConfig
from search_e1.errors import ConfigError, RetrievalError
from search_e1.retrieval.cache import CachedRetriever
from search_e1.retrieval.client import HttpRetriever
from search_e1.stages.inputs import Inputs
from search_e1.types import Passage
from serving import good, misbehaving


def inputs(root: Path, url: str | None, **retrieval: Any) -> Inputs:
    raw = {
        "run": root,
        "policy": {"model": "small"},
        "data": {"corpus": root / "corpus.jsonl", "train": ["train.jsonl"], "eval": {"dev": "dev.jsonl"}},
        "retrieval": {"url": url, "attempts": 1} | retrieval,
    }
    return Inputs(Config.model_validate(raw), root)


def telling(request: dict[str, Any], number: int) -> tuple[Any, ...]:
    return *good(request), {"Search-E1-Index": "c" * 64}


def test_a_server_that_tells_its_checksum_is_cached_in_the_run(tmp_path: Path) -> None:
    with misbehaving(telling) as server:
        first = inputs(tmp_path, server.url)
        assert isinstance(first.retriever, CachedRetriever)
        assert (first.retriever.path, first.retriever.key) == (tmp_path / "retrieval-cache", "c" * 64)
        assert first.retrieval_checksum() == "c" * 64
        found = first.retriever.search(["a"], 2)
        assert inputs(tmp_path, server.url).retriever.search(["a"], 2) == found
        # Each run probes with its own topk; the second run's query came from the cache.
        assert [request["topk"] for request in server.requests] == [3, 2, 3]
        assert isinstance(inputs(tmp_path, server.url, cache=False).retriever, HttpRetriever)


def test_a_server_that_tells_nothing_is_cached_under_a_name_only(tmp_path: Path) -> None:
    with misbehaving(good) as server:
        plain = inputs(tmp_path, server.url)
        assert isinstance(plain.retriever, HttpRetriever)
        assert plain.retrieval_checksum() == server.url
        named = inputs(tmp_path, server.url, cache=tmp_path / "mine", cache_key="wiki-18 e5")
        assert isinstance(named.retriever, CachedRetriever)
        assert (named.retriever.path, named.retriever.key) == (tmp_path / "mine", "wiki-18 e5")
        assert named.retrieval_checksum() == "wiki-18 e5"
        with pytest.raises(ConfigError, match=r"retrieval\.cache: .* does not report its index's checksum; identify it"):
            assert inputs(tmp_path, server.url, cache=tmp_path / "mine").retriever


def test_a_server_that_is_not_there_is_found_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(RetrievalError, match=r"http://127.0.0.1:1/retrieve: no passages after 1 attempt: ConnectError"):
        assert inputs(tmp_path, "http://127.0.0.1:1").retriever


def test_a_name_without_a_server_is_refused() -> None:
    with pytest.raises(ValueError, match="cache_key is only for a url"):
        RetrievalConfig(index=Path("index"), cache_key="x")


def test_a_retriever_of_ones_own_serves_a_run_and_is_cached_by_its_checksum(tmp_path: Path) -> None:
    first = inputs(tmp_path, None, kind="test_connecting:Own", attempts=None)
    assert isinstance(first.retriever, CachedRetriever)
    assert first.retrieval_checksum() == first.retriever.key == "own-1"
    assert first.retriever.search(["Oslo"], 1) == [[Passage(id="Oslo", title="", text="x")]]
    (tmp_path / "corpus.jsonl").write_text('{"id": "Oslo", "text": "x"}\n')
    assert list(first.passage_texts() or ()) == [" x"]


class Own:
    checksum = "own-1"

    def __init__(self, section: RetrievalConfig) -> None:
        assert section.kind == "test_connecting:Own"

    def search(self, queries: list[str], topk: int) -> list[list[Passage]]:
        return [[Passage(id=query, title="", text="x")] for query in queries]
