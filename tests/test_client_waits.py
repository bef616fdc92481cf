"""How the retriever's client waits, tries again, splits its requests and remembers answers."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from tenacity import wait_none

from search_e1.errors import RetrievalError
from search_e1.retrieval import client as module
from search_e1.retrieval.client import HttpRetriever
from serving import Reply, good, misbehaving
from test_client import SECONDS, client, slow


def waits(monkeypatch: pytest.MonkeyPatch, reply: Reply, **settings: Any) -> tuple[list[float], str]:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    with misbehaving(reply) as server, HttpRetriever(server.url, **settings) as retriever:
        monkeypatch.setattr(retriever._server.retrying, "sleep", sleep)
        with pytest.raises(RetrievalError) as caught:
            retriever.search(["a"], 1)
    return slept, str(caught.value)


def test_it_waits_longer_each_time_with_jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    slept, message = waits(monkeypatch, lambda *_: (503, b""), attempts=4)
    assert "after 4 attempts" in message
    assert [low <= wait <= low + 0.2 for low, wait in zip((0.2, 0.4, 0.8), slept, strict=True)] == [True] * 3
    assert len({wait - low for low, wait in zip((0.2, 0.4, 0.8), slept, strict=True)}) == 3


def test_it_waits_as_long_as_the_server_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    asked = ["7", date, "1.5", "soon", "-5", "nan", format_datetime(datetime(2001, 1, 1, tzinfo=UTC), usegmt=True)]
    slept, _ = waits(monkeypatch, lambda r, n: (429, b"", {"Retry-After": asked[n % 7]}), attempts=8, time_limit=10_000)
    assert slept[0] == 7
    assert 25 < slept[1] <= 30
    assert slept[2] == 1.5
    assert all(wait < 10.3 for wait in slept[3:])


def test_it_gives_up_rather_than_wait_past_its_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    slept, message = waits(monkeypatch, lambda *_: (429, b"", {"Retry-After": "50"}), attempts=9, time_limit=20)
    assert slept == []
    assert (
        "no passages after 1 attempt: status 429 Too Many Requests; it asks to wait 50 s, longer than the limit of 20 s"
        in message
    )


def test_no_try_goes_past_the_time_limit() -> None:
    with (
        misbehaving(slow) as server,
        client(server.url, timeout=60, attempts=9, time_limit=SECONDS) as retriever,
        pytest.raises(RetrievalError, match=r"no passages after 1 attempt: no answer within 0\.\d+ s"),
    ):
        retriever.search(["a"], 1)


def test_without_attempts_it_waits_as_long_as_its_time_allows_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Down for a minute: 8 tries are refused, the 9th is answered."""
    down = [(503, b"")] * 8

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    slept: list[float] = []
    with misbehaving(lambda r, n: down.pop() if down else good(r)) as server, HttpRetriever(server.url) as retriever:
        monkeypatch.setattr(retriever._server.retrying, "sleep", sleep)
        assert retriever.search(["a"], 1)[0][0].id == "a-0"
        assert len(server.requests) == 9
    assert sum(slept) > 30
    assert [record.message.split(": ", 1)[-1] for record in caplog.records] == [
        "status 503 Service Unavailable; retrying for up to 180 s",
        f"{server.url}/retrieve answers again",
    ]


def test_a_probe_does_not_wait_for_a_server_that_is_down() -> None:
    with HttpRetriever("http://127.0.0.1:1", time_limit=60) as retriever:
        retriever._server.retrying.wait = wait_none()
        with pytest.raises(RetrievalError, match="no passages after 4 attempts: ConnectError"):
            retriever.probe()


def test_many_queries_go_in_several_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    queries = [f"query {i}" for i in range(600)]
    with misbehaving(good) as server, client(server.url) as retriever:
        found = retriever.search([*queries, *queries], 1)
        assert [passages[0].id for passages in found] == [f"{query}-0" for query in queries] * 2
        assert sorted(len(request["queries"]) for request in server.requests) == [88, 256, 256]
    monkeypatch.setattr(module, "_REQUEST_CHARS", 10)
    with misbehaving(good) as server, client(server.url) as retriever:
        retriever.search(["aaaa", "bbbb", "c" * 99, "dddd", "eeee", "f"], 1)
        sent = sorted(request["queries"] for request in server.requests)
        assert sent == [["aaaa", "bbbb"], ["c" * 99], ["dddd", "eeee", "f"]]


def test_one_failed_request_of_several_fails_the_search_and_is_asked_again() -> None:
    def broken_once(request: dict[str, Any], number: int) -> tuple[Any, ...]:
        return (404, b"") if number < 2 and "query 300" in request["queries"] else good(request)

    queries = [f"query {i}" for i in range(400)]
    with misbehaving(broken_once) as server, client(server.url) as retriever:
        with pytest.raises(RetrievalError, match="status 404"):
            retriever.search(queries, 1)
        assert all(len(passages) == 1 for passages in retriever.search(queries, 1))
        assert [len(request["queries"]) for request in server.requests[2:]] == [144]


def test_what_was_answered_is_remembered_for_each_topk() -> None:
    with misbehaving(good) as server, client(server.url) as retriever:
        first = retriever.search(["a", "b"], 2)
        first[0].clear()  # the caller's own list
        assert [len(passages) for passages in retriever.search(["b", "a", "c"], 2)] == [2, 2, 2]
        retriever.search(["a"], 1)
        assert [request["queries"] for request in server.requests] == [["a", "b"], ["c"], ["a"]]


def test_a_failure_is_not_remembered() -> None:
    with misbehaving(lambda r, n: (404, b"") if n == 0 else good(r)) as server, client(server.url) as retriever:
        with pytest.raises(RetrievalError):
            retriever.search(["a"], 1)
        assert len(retriever.search(["a"], 1)[0]) == 1


def test_threads_that_ask_the_same_ask_once() -> None:
    entered, release = threading.Event(), threading.Event()

    def held(request: dict[str, Any], number: int) -> tuple[int, bytes]:
        entered.set()
        assert release.wait(10)
        return good(request)

    with misbehaving(held) as server, client(server.url) as retriever, ThreadPoolExecutor(8) as pool:
        first = pool.submit(retriever.search, ["a"], 1)
        assert entered.wait(10)
        rest = [pool.submit(retriever.search, ["a", f"b{i % 2}"], 1) for i in range(6)]
        while len(server.requests) < 3:
            time.sleep(0.001)
        release.set()
        assert first.result()[0][0].id == "a-0"
        assert [[p[0].id for p in r.result()] for r in rest] == [["a-0", f"b{i % 2}-0"] for i in range(6)]
        assert sorted(request["queries"] for request in server.requests) == [["a"], ["b0"], ["b1"]]


def test_threads_that_wait_for_a_failure_all_fail() -> None:
    entered, release = threading.Event(), threading.Event()

    def held(request: dict[str, Any], number: int) -> tuple[int, bytes]:
        entered.set()
        assert release.wait(10)
        return 404, b""

    with misbehaving(held) as server, client(server.url) as retriever, ThreadPoolExecutor(8) as pool:
        searches = [pool.submit(retriever.search, ["a"], 1) for _ in range(4)]
        assert entered.wait(10)
        release.set()
        for search in searches:
            with pytest.raises(RetrievalError, match="status 404"):
                search.result()
    assert 1 <= len(server.requests) <= 4
