import asyncio
import logging
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

pytest.importorskip("fastapi")

from search_e1.errors import ConfigError
from search_e1.retrieval import server
from search_e1.retrieval.base import Hit
from search_e1.retrieval.batching import Batcher, QueueFullError
from search_e1.retrieval.client import HttpRetriever
from search_e1.serving.listening import bind
from serving import FakeIndex, serving


@pytest.fixture(scope="module")
def index() -> FakeIndex:
    return FakeIndex()


@pytest.fixture(scope="module")
def url(index: FakeIndex):
    limits = dict(max_topk=5, max_queries=4, max_query_chars=20, max_body_bytes=1000, batch_wait=0.0)
    with serving(index, **limits) as url:
        yield url


def post(url: str, **fields: Any) -> httpx.Response:
    return httpx.post(f"{url}/retrieve", json=fields, timeout=10)


def document(query: str, i: int) -> dict[str, str]:
    return {"id": f"{query}-{i}", "contents": f'"t {query}"\ntext {i}'}


def test_the_wire_format_with_scores(url: str, index: FakeIndex) -> None:
    response = post(url, queries=["a", "b"], topk=2, return_scores=True)
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.headers["search-e1-index"] == index.checksum
    assert response.json() == {
        "result": [
            [{"document": document("a", 0), "score": 1.5}, {"document": document("a", 1), "score": 0.5}],
            [{"document": document("b", 0), "score": 1.5}, {"document": document("b", 1), "score": 0.5}],
        ]
    }


@pytest.mark.parametrize("more", [{"return_scores": False}, {}])
def test_the_wire_format_without_scores(url: str, more: dict[str, Any]) -> None:
    assert post(url, queries=["a"], topk=1, **more).json() == {"result": [[document("a", 0)]]}


def test_where_a_passage_comes_from_crosses_the_wire() -> None:
    class Told(FakeIndex):
        def search(self, queries, topk):
            return [[Hit(id="a", title="A", text="a", metadata={"file": "a.pdf", "page": 3}, score=1.0)] for _ in queries]

    with serving(Told()) as url, HttpRetriever(url) as retriever:
        [[found]] = retriever.search(["a"], 1)
    assert found.metadata == {"file": "a.pdf", "page": 3}


@pytest.mark.parametrize("more", [{"topk": None}, {}])
def test_topk_may_be_left_to_the_server(url: str, more: dict[str, Any]) -> None:
    assert post(url, queries=["a"], **more).json() == {"result": [[document("a", i) for i in range(3)]]}


def test_what_search_r1_takes_is_taken(url: str) -> None:
    assert post(url, queries=[]).json() == {"result": []}
    assert post(url, queries=[""]).json() == {"result": [[]]}  # nothing found
    assert post(url, queries=["a", "a"], topk=1).json() == {"result": [[document("a", 0)]] * 2}
    assert post(url, query="a", topk=1).json() == {"result": [[document("a", 0)]]}  # SkyRL's environment
    assert post(url, queries=["a"], topk=1, unknown=1).status_code == 200
    text = '{"queries": ["Bj\\u00f6rk \\ud83d\\ude00"], "topk": 1}'
    typed = httpx.post(f"{url}/retrieve", content=text)  # no content type
    assert typed.json() == {"result": [[document("Björk 😀", 0)]]}


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"", 400, "Invalid JSON: EOF"),
        (b"{", 400, "Invalid JSON: EOF"),
        (b'{"queries": ["\xff"]}', 400, "Invalid JSON"),
        (b'{"queries": ["\\ud800"]}', 400, "Invalid JSON: unexpected end of hex escape"),
        (b"[" * 900, 400, "Invalid JSON: recursion limit exceeded"),
        (b"[]", 422, "Input should be an object"),
        (b"null", 422, "Input should be an object"),
        (b"{}", 422, 'give "queries", a list of strings'),
        (b'{"queries": ["a"], "query": "a"}', 422, 'give "queries", a list of strings'),
        (b'{"queries": "a"}', 422, "queries: Input should be a valid array"),
        (b'{"queries": [1]}', 422, "queries.0: Input should be a valid string"),
        (b'{"queries": [null]}', 422, "queries.0: Input should be a valid string"),
        (b'{"queries": ["a"], "topk": 0}', 422, "topk: Input should be greater than or equal to 1"),
        (b'{"queries": ["a"], "topk": -1}', 422, "topk: Input should be greater than or equal to 1"),
        (b'{"queries": ["a"], "topk": 1.5}', 422, "topk: Input should be a valid integer"),
        (b'{"queries": ["a"], "topk": NaN}', 422, "topk: Input should be a finite number"),
        (b'{"queries": ["a"], "topk": 6}', 422, "topk: 6 exceeds the limit of 5"),
        (b'{"queries": ["a"], "topk": 1' + b"0" * 400 + b"}", 422, "topk: 1"),
        (b'{"queries": ["a"], "return_scores": 7}', 422, "return_scores: Input should be a valid boolean"),
        (b'{"queries": ["a", "b", "c", "d", "e"]}', 422, "queries: 5 exceed the limit of 4; split them into several requests"),
        (b'{"queries": ["a", "' + b"b" * 21 + b'"]}', 422, "queries.1: 21 characters exceed the limit of 20"),
        (b'{"queries": ["' + b"b" * 1000 + b'"]}', 413, "the body exceeds 1000 bytes; send fewer queries"),
        (b" " * 9000, 413, "the body exceeds 1000 bytes"),
    ],
)
def test_wrong_requests_are_refused_in_one_line(url: str, index: FakeIndex, body: bytes, status: int, says: str) -> None:
    calls = len(index.calls)
    response = httpx.post(f"{url}/retrieve", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == status
    assert list(response.json()) == ["detail"]
    assert response.json()["detail"].startswith(says)
    assert "\n" not in response.json()["detail"]
    assert len(index.calls) == calls


def test_other_paths_and_methods(url: str) -> None:
    assert httpx.get(f"{url}/").status_code == 404
    assert httpx.get(f"{url}/retrieve").status_code == 405
    assert httpx.get(f"{url}/openapi.json").json()["paths"]["/retrieve"]["post"]


def test_health_tells_index_and_limits(url: str, index: FakeIndex) -> None:
    assert httpx.get(f"{url}/healthz").json() == {
        "status": "ok",
        "passages": 1000,
        "checksum": index.checksum,
        "topk": 3,
        "max_topk": 5,
        "max_queries": 4,
        "max_query_chars": 20,
        "max_body_bytes": 1000,
    }


def metrics(url: str) -> dict[str, float]:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def test_what_was_answered_is_not_asked_again_and_all_is_counted() -> None:
    index = FakeIndex()
    with serving(index) as url:
        first = post(url, queries=["a", "b"], topk=1, return_scores=True)
        again = post(url, queries=["b", "a", "c"], topk=1, return_scores=True)
        post(url, queries=["a"], topk=2)
        assert post(url, queries=7).status_code == 422
        assert again.json()["result"][:2] == first.json()["result"][::-1]
        assert index.calls == [(["a", "b"], 1), (["c"], 1), (["a"], 2)]
        told = metrics(url)
    assert told['search_e1_requests_total{status="200"}'] == 3
    assert told['search_e1_requests_total{status="422"}'] == 1
    assert told['search_e1_queries_total{source="index"}'] == 4
    assert told['search_e1_queries_total{source="cache"}'] == 2
    assert told["search_e1_batch_queries_sum"] == 4
    assert told["search_e1_index_seconds_count"] == 3
    assert told["search_e1_cached_queries"] == 4
    assert told["search_e1_waiting_queries"] == 0
    assert told[f'search_e1_index_passages{{checksum="{index.checksum}"}}'] == 1000


def test_requests_that_come_together_share_a_call() -> None:
    index = FakeIndex()
    index.open.clear()
    with serving(index, batch=8, batch_wait=0.0) as url, ThreadPoolExecutor(16) as pool:
        first = pool.submit(post, url, queries=["first"], topk=1)
        assert index.entered.acquire(timeout=10)
        # Those wait while the index is busy: ten new queries, one that is under way already, and one asked twice.
        rest = [pool.submit(post, url, queries=[f"q{i}"], topk=1) for i in range(10)]
        twins = [pool.submit(post, url, queries=["first", "q0"], topk=1) for _ in range(2)]
        while metrics(url)["search_e1_waiting_queries"] < 10:
            pass
        while metrics(url).get('search_e1_queries_total{source="joined"}', 0) < 4:
            pass
        index.open.set()
        assert first.result().json() == {"result": [[document("first", 0)]]}
        assert [r.result().json()["result"][0][0]["id"] for r in rest] == [f"q{i}-0" for i in range(10)]
        for twin in twins:
            assert twin.result().json() == {"result": [[document("first", 0)], [document("q0", 0)]]}
    assert [len(queries) for queries, _ in index.calls] == [1, 8, 2]


def test_a_full_queue_is_told_and_nothing_is_lost() -> None:
    index = FakeIndex()
    index.open.clear()
    with serving(index, max_queries=2, queue=2, batch=1) as url, ThreadPoolExecutor(4) as pool:
        busy = pool.submit(post, url, queries=["a"])
        assert index.entered.acquire(timeout=10)
        waiting = pool.submit(post, url, queries=["b", "c"])
        while metrics(url)["search_e1_waiting_queries"] < 2:
            pass
        refused = post(url, queries=["d"])
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert refused.json() == {"detail": "too many queries are waiting; retry later"}
        joined = pool.submit(post, url, queries=["b", "c"])  # needs no room
        index.open.set()
        assert [r.result().status_code for r in (busy, waiting, joined)] == [200, 200, 200]
        assert post(url, queries=["d"]).status_code == 200


def test_a_slow_client_keeps_nobody_waiting_and_is_let_go() -> None:
    with serving(FakeIndex(), body_timeout=0.5) as url:
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as slow:
            slow.sendall(b"POST /retrieve HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            assert post(url, queries=["a"]).status_code == 200
            slow.settimeout(10)
            answer = b""
            while part := slow.recv(4096):  # until the server closes
                answer += part
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert answer.endswith(b'{"detail":"the request did not arrive within 0.5 s"}')


def test_stopping_answers_what_is_under_way() -> None:
    index = FakeIndex()
    index.open.clear()
    opener = threading.Timer(0.3, index.open.set)
    with ThreadPoolExecutor(1) as pool:
        with serving(index) as url:
            under_way = pool.submit(post, url, queries=["a"], topk=1)
            assert index.entered.acquire(timeout=10)
            opener.start()
        assert under_way.result().json() == {"result": [[document("a", 0)]]}
    with pytest.raises(httpx.ConnectError):
        post(url, queries=["a"])


class Lying(FakeIndex):
    def __init__(self, results: Any) -> None:
        super().__init__()
        self.results = results

    def search(self, queries: Any, topk: int) -> Any:
        return self.results


@pytest.mark.parametrize(
    ("index", "says"),
    [
        (FakeIndex(), "the index failed: broken index"),
        (Lying([]), "the index failed: 0 results for 1 queries"),
        (Lying([[Hit(id="1", title="", text="", score=float("nan"))]]), "the index failed: a score of nan"),
    ],
)
def test_a_broken_index_is_an_error_and_not_an_empty_answer(index: FakeIndex, says: str, caplog) -> None:
    with caplog.at_level(logging.ERROR), serving(index) as url:
        response = post(url, queries=["break"])
        assert (response.status_code, response.json()) == (500, {"detail": says})
        assert "the index failed" in caplog.text
        if type(index) is FakeIndex:
            assert post(url, queries=["a"]).status_code == 200


def test_it_goes_with_our_client() -> None:
    index = FakeIndex()
    with serving(index, max_queries=2) as url, HttpRetriever(url) as client:
        client.probe()
        assert client.checksum == index.checksum
        found = client.search(["a", "b", "c", "a", ""], 2)
    expected = index.search(["a", "b", "c", "a", ""], 2)
    assert found == expected
    assert sum(len(queries) for queries, _ in index.calls[1:-1]) == 4


def test_several_threads_of_calls_answer_each_its_own() -> None:
    limits = server.Settings(batch=3, batch_wait=0.0, threads=4, cache=0)

    async def ask() -> list[list[str]]:
        def answer(queries: list[str], topk: int) -> list[str]:
            return [f"{query}/{topk}" for query in queries]

        async with Batcher(answer, limits) as batcher:
            return await asyncio.gather(*(batcher.search([f"{i}", f"{i + 1}"], 1 + i % 2) for i in range(20)))

    assert asyncio.run(ask()) == [[f"{i}/{1 + i % 2}", f"{i + 1}/{1 + i % 2}"] for i in range(20)]


def test_the_cache_is_bounded() -> None:
    limits = server.Settings(batch=8, batch_wait=0.0, queue=3, max_queries=3, cache=2)

    async def ask() -> tuple[list[str], list[str]]:
        asked: list[str] = []

        def answer(queries: list[str], topk: int) -> list[str]:
            asked.extend(queries)
            return queries

        async with Batcher(answer, limits) as batcher:
            for query in ("a", "b", "a", "c", "a", "b"):  # c takes the place of b
                assert await batcher.search([query], 1) == [query]
            with pytest.raises(QueueFullError):
                await batcher.search(["d", "e", "f", "g"], 1)
            return asked, [query for query, _ in batcher.cache]

    assert asyncio.run(ask()) == (["a", "b", "c", "b"], ["a", "b"])


def test_addresses_that_cannot_be_had() -> None:
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        taken.listen()
        with pytest.raises(ConfigError, match=rf"127.0.0.1:{port}: cannot listen there \(Address already in use\)"):
            bind("127.0.0.1", port)
    with pytest.raises(ConfigError, match=r"192.0.2.1:8000: cannot listen there \(Cannot assign requested address\)"):
        bind("192.0.2.1", 8000)
    with pytest.raises(ConfigError, match=r"no.such.host.invalid:8000: cannot listen there"):
        bind("no.such.host.invalid", 8000)


def test_settings_that_cannot_work() -> None:
    with pytest.raises(ConfigError, match="topk = 9 exceeds max_topk = 5"):
        server.Settings(topk=9, max_topk=5)
    with pytest.raises(ConfigError, match="a queue of 10 queries never has room for a request of 1024"):
        server.Settings(queue=10)
