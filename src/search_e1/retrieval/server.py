"""Retrieval server: Search-R1's ``/retrieve`` with limits, batching, a cache and metrics.

Needs the extra ``serve``. There is no authentication: keep it on the loopback interface or on a private network.
"""

import logging
import math
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from itertools import chain
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from pydantic import BaseModel, Field, ValidationError
from pydantic_core import to_json
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from search_e1.errors import RetrievalError
from search_e1.retrieval.base import Hit, Index
from search_e1.retrieval.batching import Batcher, IndexFailedError, QueueFullError
from search_e1.retrieval.client import CHECKSUM_HEADER, MOST_QUERIES_HEADER
from search_e1.retrieval.settings import Settings
from search_e1.serving import listening
from search_e1.serving.bodies import Memory, read_body

logger = logging.getLogger(__name__)
_LARGE = 2**18
"""Bytes of a response above which it counts against the memory limit."""


class Query(BaseModel):
    """Body of a request to ``/retrieve``. Unknown fields are ignored, as by Search-R1's server."""

    queries: list[str] | None = None
    query: str | None = None
    """A single query, as SkyRL's environment sends it; equivalent to ``queries`` of one."""
    topk: int | None = Field(default=None, ge=1)
    """Passages per query; default: the server's setting."""
    return_scores: bool = False
    """``[{"document": ..., "score": ...}]`` for each query, else ``[document]``."""


Hits = tuple[tuple[bytes, bytes], ...]
"""Cached result of one query: JSON of document and score, best first."""


class Metrics:
    """Metrics of one server, in their own registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        counter, gauge = partial(Counter, registry=self.registry), partial(Gauge, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry)
        self.requests = counter("search_e1_requests", "Requests answered, by status.", ["status"])
        self.queries = counter("search_e1_queries", "Queries by source: index, cache, joined.", ["source"])
        self.request_seconds = histogram("search_e1_request_seconds", "From the complete request to its response.")
        self.index_seconds = histogram("search_e1_index_seconds", "Duration of an index call.")
        sizes = [2**i for i in range(10)]
        self.batch_queries = histogram("search_e1_batch_queries", "Queries of an index call.", buckets=sizes)
        self.waiting = gauge("search_e1_waiting_queries", "Queries waiting for the index.")
        self.held = gauge("search_e1_held_bytes", "Memory of requests and large responses in flight.")
        self.cached = gauge("search_e1_cached_queries", "Queries with cached results.")
        self.passages = gauge("search_e1_index_passages", "Passages of the index.", ["checksum"])


def make_app(index: Index, settings: Settings | None = None) -> FastAPI:
    """The ASGI application that serves ``index``."""
    settings = settings or Settings()
    metrics = Metrics()
    metrics.passages.labels(index.checksum).set(len(index))

    def answer(queries: list[str], topk: int) -> list[Hits]:
        metrics.batch_queries.observe(len(queries))
        with metrics.index_seconds.time():
            return _search(index, queries, topk)

    batcher = Batcher(answer, settings, _size, lambda source, queries: metrics.queries.labels(source).inc(queries))
    memory = Memory(settings.memory_bytes)
    metrics.held.set_function(lambda: memory.held)
    metrics.waiting.set_function(lambda: batcher.waiting)
    metrics.cached.set_function(lambda: len(batcher.cache))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with batcher:
            yield

    # No interactive pages, which load scripts from other sites; the schema is at /openapi.json.
    app = FastAPI(title="search-e1 retriever", docs_url=None, redoc_url=None, lifespan=lifespan)
    headers = {CHECKSUM_HEADER: index.checksum, MOST_QUERIES_HEADER: str(settings.max_queries)}

    @app.post("/retrieve", openapi_extra=_schema(settings), responses=_RESPONSES)
    async def retrieve(request: Request) -> Response:
        """Top passages of each query."""
        started = time.perf_counter()
        try:
            response = await _retrieve(request, batcher, settings, memory)
        except ClientDisconnect:
            response = Response(status_code=400)  # the client is gone
        except HTTPException as refusal:
            response = JSONResponse({"detail": refusal.detail}, refusal.status_code, refusal.headers)
        except IndexFailedError as failure:
            logger.error("the index failed", exc_info=failure.__cause__)
            response = JSONResponse({"detail": f"the index failed: {_one_line(str(failure))}"}, 500)
        response.headers.update(headers)
        metrics.requests.labels(response.status_code).inc()
        metrics.request_seconds.observe(time.perf_counter() - started)
        return response

    @app.get("/healthz")
    async def health() -> dict[str, Any]:
        """The index and the limits."""
        limits = {name: value for name, value in settings.model_dump().items() if name.startswith("max_")}
        return {"status": "ok", "passages": len(index), "checksum": index.checksum, "topk": settings.topk, **limits}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def export_metrics() -> Response:
        """Metrics in Prometheus's text format."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def _schema(settings: Settings) -> dict[str, Any]:
    """OpenAPI schema of the request, limits included; pydantic cannot express "either ``queries`` or ``query``"."""
    query = {"type": "string", "maxLength": settings.max_query_chars}
    properties = {
        "queries": {"type": "array", "items": query, "maxItems": settings.max_queries},
        "query": query | {"description": "One query, as SkyRL's environment sends it."},
        "topk": {"type": ["integer", "null"], "minimum": 1, "maximum": settings.max_topk},
        "return_scores": {"type": "boolean", "default": False},
    }
    body = {"type": "object", "properties": properties, "oneOf": [{"required": ["queries"]}, {"required": ["query"]}]}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": body}}}}


_STATUSES = {
    400: "Not JSON.",
    408: "The request did not arrive in time.",
    413: "The body is too large.",
    422: "A field of the wrong type, or over a limit.",
    500: "The index failed.",
    503: "Too many queries or too much data in flight; retry after `Retry-After` seconds.",
}
_RESPONSES: dict[int | str, dict[str, Any]] = {code: {"description": text} for code, text in _STATUSES.items()}


async def _retrieve(request: Request, batcher: Batcher[Hits], settings: Settings, memory: Memory) -> Response:
    taken: list[int] = []
    try:
        body = _parse(await read_body(request, settings, memory, taken, "send fewer queries at once"))
        answers = await batcher.search(*_queries(body, settings))
    except QueueFullError as error:
        raise HTTPException(503, "too many queries are waiting; retry later", {"Retry-After": "1"}) from error
    finally:
        memory.release(sum(taken))
    content = b'{"result":[' + b",".join(_encode(hits, body.return_scores) for hits in answers) + b"]}"
    if len(content) <= _LARGE:
        return Response(content, media_type="application/json")
    memory.take(len(content))

    async def release() -> None:
        memory.release(len(content))

    # Streamed, so that the background task runs only after the client has read the response or is gone.
    length = {"Content-Length": str(len(content))}
    return StreamingResponse(_once(content), 200, length, "application/json", BackgroundTask(release))


async def _once(content: bytes) -> AsyncIterator[bytes]:
    yield content


def _size(hits: Hits) -> int:
    return sum(len(document) + len(score) + 32 for document, score in hits)


def _encode(hits: Hits, scores: bool) -> bytes:
    scored = (b'{"document":' + document + b',"score":' + score + b"}" for document, score in hits)
    return b"[" + b",".join(scored if scores else (document for document, _ in hits)) + b"]"


def _parse(body: bytes) -> Query:
    try:
        return Query.model_validate_json(body)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, problem["loc"]))
        message = _one_line(f"{where}: {problem['msg']}" if where else problem["msg"])
        raise HTTPException(400 if problem["type"] == "json_invalid" else 422, message) from error


def _queries(body: Query, settings: Settings) -> tuple[list[str], int]:
    """Queries and topk of a request, within the limits."""
    if (body.queries is None) == (body.query is None):
        raise HTTPException(422, 'give "queries", a list of strings')
    queries = [body.query or ""] if body.queries is None else body.queries
    topk = body.topk or settings.topk
    if topk > settings.max_topk:
        raise HTTPException(422, f"topk: {topk} exceeds the limit of {settings.max_topk}")
    if len(queries) > settings.max_queries:
        raise HTTPException(
            422, f"queries: {len(queries)} exceed the limit of {settings.max_queries}; split them into several requests"
        )
    for i, query in enumerate(queries):
        if len(query) > settings.max_query_chars:
            raise HTTPException(422, f"queries.{i}: {len(query)} characters exceed the limit of {settings.max_query_chars}")
    return queries, topk


def _search(index: Index, queries: list[str], topk: int) -> list[Hits]:
    """Search the index and encode the results as JSON.

    Raises:
        RetrievalError: the index returned an invalid result; also from the index.
    """
    results = index.search(queries, topk)
    if len(results) != len(queries):
        raise RetrievalError(f"{len(results)} results for {len(queries)} queries")
    for hit in chain.from_iterable(results):
        if not math.isfinite(hit.score):
            raise RetrievalError(f"a score of {hit.score}")
    return [tuple((to_json(_document(hit)), to_json(float(hit.score))) for hit in hits) for hits in results]


def _document(hit: Hit) -> dict[str, Any]:
    return {"id": hit.id, "contents": hit.contents} | ({"metadata": hit.metadata} if hit.metadata else {})


def _one_line(text: str) -> str:
    return " ".join(text.split())


def serve(
    index: Index, bound: socket.socket, settings: Settings | None = None, ready: Callable[[str], None] | None = None
) -> None:
    """Serve ``index``; see ``listening.serve``."""
    settings = settings or Settings()
    listening.serve(make_app(index, settings), bound, settings, ready)
