import logging
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from search_e1.errors import DataError, RetrievalError
from search_e1.retrieval import cache as module
from search_e1.retrieval.base import Hit, Retriever
from search_e1.retrieval.cache import CachedRetriever
from search_e1.types import Passage


class Counting:
    """Finds one passage with a score and one without for every query but ``nothing``; notes what it is asked."""

    def __init__(self, text: str = "Grüße 😀\n\0") -> None:
        self.asked: list[tuple[str, int]] = []
        self.text = text

    def search(self, queries: Sequence[str], topk: int) -> list[list[Passage]]:
        self.asked += [(query, topk) for query in queries]
        if "fail" in queries:
            raise RetrievalError("no passages")
        return [[] if q == "nothing" else self.found(q)[:topk] for q in queries]

    def found(self, query: str) -> list[Passage]:
        scored = Hit(id=f"{query}-0", title="t", text=self.text, score=0.1 + 0.2)
        return [scored, Passage(id=f"{query}-1", title="", text="")]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new" / "cache"


def test_what_was_asked_once_is_not_asked_again_by_anyone(path: Path) -> None:
    first, second = Counting(), Counting()
    with CachedRetriever(first, path, "index") as cached:
        assert isinstance(cached, Retriever)
        found = cached.search(["a", "b", "a", "nothing"], 2)
        assert found == [first.found("a"), first.found("b"), first.found("a"), []]
        assert first.asked == [("a", 2), ("b", 2), ("nothing", 2)]
        found[0].clear()  # the caller's own list
        assert cached.search(["b", "c", "a"], 2) == [first.found("b"), first.found("c"), first.found("a")]
        assert (cached.hits, cached.misses) == (2, 4)
    with CachedRetriever(second, path, "index") as again:
        found = again.search(["nothing", "c", "b"], 2)
        assert found == [[], first.found("c"), first.found("b")]
        assert [type(passage) for passage in found[1]] == [Hit, Passage]
        assert again.search([], 2) == []
        assert second.asked == []


def test_an_answer_belongs_to_its_index_query_and_topk(path: Path) -> None:
    with CachedRetriever(Counting("old"), path, "one") as cached:
        cached.search(["a"], 1)
    new = Counting("new")
    with CachedRetriever(new, path, "two") as other:
        assert other.search(["a"], 1)[0][0].text == "new"
        assert len(other.search(["a"], 2)[0]) == 2
        other.search(["A", "a "], 1)
    assert new.asked == [("a", 1), ("a", 2), ("A", 1), ("a ", 1)]


def test_a_failure_is_raised_and_not_kept(path: Path) -> None:
    retriever = Counting()
    with CachedRetriever(retriever, path, "index") as cached:
        for _ in range(2):
            with pytest.raises(RetrievalError):
                cached.search(["a", "fail"], 1)
        assert retriever.asked == [("a", 1), ("fail", 1)] * 2


def rows(path: Path) -> int:
    with sqlite3.connect(path / "cache.db") as file:
        return file.execute("SELECT count(*) FROM Cache").fetchone()[0]


@pytest.mark.parametrize("damage", ["garbage", "header", "half", "pages"])
def test_a_damaged_file_is_moved_aside_and_begun_anew(path: Path, damage: str, caplog) -> None:
    queries = [f"q{i}" for i in range(200)]
    with CachedRetriever(Counting(), path, "index") as cached:
        cached.search(queries, 2)
    database = path / "cache.db"
    content = database.read_bytes()
    assert len(content) > 40_000
    database.write_bytes(
        {
            "garbage": b"not a database at all\n" * 1000,
            "header": b"X" + content[1:],
            "half": content[: len(content) // 2],
            "pages": content[:8192] + b"\xff" * (len(content) - 8192),
        }[damage]
    )
    damaged = database.read_bytes()
    retriever = Counting()
    with caplog.at_level(logging.WARNING), CachedRetriever(retriever, path, "index") as cached:
        for _ in range(3):
            assert cached.search(queries, 2) == [retriever.found(query) for query in queries]
        assert len(retriever.asked) in (200, 400)  # damage deep inside shows while reading, and then nothing is stored
        assert "its database was moved to cache.db.damaged-1 and replaced" in caplog.text
    if damage != "pages":  # opening writes into a database that looks sound
        assert (path / "cache.db.damaged-1").read_bytes() == damaged
    assert rows(path) == 200


def test_a_changed_answer_is_not_trusted(path: Path, caplog) -> None:
    retriever = Counting()
    with CachedRetriever(retriever, path, "index") as cached:
        cached.search(["a", "b"], 1)
    with sqlite3.connect(path / "cache.db") as file:
        stored = file.execute("SELECT rowid, value FROM Cache").fetchall()
        file.executemany("UPDATE Cache SET value = ? WHERE rowid = ?", [(v.replace(b'"t"', b'"u"'), i) for i, v in stored])
    with caplog.at_level(logging.WARNING), CachedRetriever(retriever, path, "index") as cached:
        assert cached.search(["a", "b"], 1) == [retriever.found("a")[:1], retriever.found("b")[:1]]
        assert caplog.text.count("a damaged result in the query cache") == 1
        cached.search(["a", "b"], 1)
    assert len(retriever.asked) == 4


def test_rows_that_were_swapped_are_not_trusted(path: Path) -> None:
    retriever = Counting()
    with CachedRetriever(retriever, path, "index") as cached:
        cached.search(["a", "b"], 1)
        with sqlite3.connect(path / "cache.db") as file:
            (one, first), (two, second) = file.execute("SELECT rowid, value FROM Cache").fetchall()
            file.executemany("UPDATE Cache SET value = ? WHERE rowid = ?", [(second, one), (first, two)])
        assert cached.search(["a"], 1)[0][0].id == "a-0"


def test_a_file_that_is_locked_or_full_is_done_without(path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setattr(module, "_BUSY_SECONDS", 0.01)
    retriever = Counting()
    with CachedRetriever(retriever, path, "index") as cached, caplog.at_level(logging.WARNING):
        other = sqlite3.connect(path / "cache.db", isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        assert cached.search(["a"], 1)[0][0].id == "a-0"
        assert "cannot be used for now" in caplog.text
        other.execute("ROLLBACK")
        other.close()
        cached.search(["a"], 1)
        cached.search(["a"], 1)
        assert len(retriever.asked) == 2
    with CachedRetriever(retriever, path, "full") as cached, caplog.at_level(logging.WARNING):
        cached._cache._sql("PRAGMA max_page_count = 16")
        queries = [f"q{i}" for i in range(500)]
        assert len(cached.search(queries, 1)) == 500
        assert "(database or disk is full)" in caplog.text
        assert cached.search(["a"], 1)[0][0].id == "a-0"


def test_the_oldest_results_are_evicted_beyond_the_size_limit(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 2**18)
    retriever = Counting("x" * 1000)
    with CachedRetriever(retriever, path, "index") as cached:
        for i in range(500):
            cached.search([f"q{i}"], 1)
        assert cached._cache.volume() < 2**18 + 2**15
        cached.search(["q499"], 1)
        cached.search(["q0"], 1)
    assert retriever.asked[500:] == [("q0", 1)]


def test_a_row_of_somebody_else_is_neither_unpickled_nor_opened(path: Path, tmp_path: Path) -> None:
    retriever = Counting()
    secret = tmp_path / "secret"
    secret.write_bytes(b"x")
    with CachedRetriever(retriever, path, "index") as cached:
        cached.search(["a"], 1)
        for mode in range(5):
            with sqlite3.connect(path / "cache.db") as file:
                file.execute("UPDATE Cache SET mode = ?, filename = '../../secret', value = x'80049502'", (mode,))
            assert cached.search(["a"], 1) == [retriever.found("a")[:1]]
    assert secret.exists()


def test_a_file_that_is_removed_meanwhile_is_no_error(path: Path) -> None:
    retriever = Counting()
    with CachedRetriever(retriever, path, "index") as cached:
        cached.search(["a"], 1)
        shutil.rmtree(path)
        assert [len(passages) for passages in cached.search(["a", "b"], 1)] == [1, 1]


def test_places_where_no_file_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "cache"):
        with pytest.raises(DataError, match="cannot hold a query cache"):
            CachedRetriever(Counting(), place, "index")
    assert (tmp_path / "file").read_text() == "x"


def test_threads_share_one(path: Path) -> None:
    retriever = Counting()
    with CachedRetriever(retriever, path, "index") as cached, ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda i: cached.search([f"q{i % 7}", f"q{i % 5}"], 1), range(100))
        assert [[p[0].id for p in passages] for passages in found] == [[f"q{i % 7}-0", f"q{i % 5}-0"] for i in range(100)]


def test_processes_share_one(path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from pathlib import Path\n"
        "from test_cache import CachedRetriever, Counting\n"
        "cached = CachedRetriever(Counting(), Path(sys.argv[1]), 'index')\n"
        "for i in range(50): assert cached.search([f'q{i}', f'{sys.argv[2]}-{i}'], 1)[0][0].id == f'q{i}-0'\n"
    )
    root = Path(__file__).parent.parent
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(path), str(i)], cwd=root, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    for process in running:
        _, said = process.communicate(timeout=60)
        assert (process.returncode, said) == (0, "")
    assert rows(path) == 150
