"""The agent's server: OpenAI's chat completions with the whole search loop inside, passages, search, and the web page.

Needs the extra ``serve``.
"""

import asyncio
import logging
import random
import socket
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from cachetools import LRUCache
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
from pydantic_core import to_json
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from search_e1.agent.agent import Agent
from search_e1.agent.answer import Answer, passage_json
from search_e1.agent.chat_api import ChatRequest, Completion, parse, schema
from search_e1.agent.metrics import Counted, Metrics
from search_e1.agent.queue import Event, GoneError, QuestionQueue, QueueFullError, Slots, while_there
from search_e1.agent.reasoning import Reasoning
from search_e1.agent.scheduler import QuestionError
from search_e1.agent.settings import ServeSettings
from search_e1.errors import SearchE1Error
from search_e1.runs.safe import plain
from search_e1.serving import listening
from search_e1.serving.access import Access, is_loopback
from search_e1.serving.bodies import Memory, read_body
from search_e1.serving.refusals import Refused
from search_e1.types import Passage

logger = logging.getLogger(__name__)
PAGE = Path(__file__).parent / "page"
PAGE_HEADERS = {
    # No inline code, nothing external, and text never becomes markup.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_RECENT = 10_000
"""Passages of recent answers kept for retrievers that cannot look up a passage by id."""
_SEARCHES = 4
"""Maximum concurrent searches of clients."""
_MOST_FOUND = 100
"""Maximum passages per search."""


def serve(
    agent: Agent,
    bound: socket.socket,
    settings: ServeSettings | None = None,
    *,
    key: str | None = None,
    origins: Sequence[str] = (),
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serve ``agent`` until SIGINT or SIGTERM; see ``listening.serve`` and ``make_app``."""
    settings = settings or ServeSettings()
    local = is_loopback(bound.getsockname()[0])
    listening.serve(make_app(agent, settings, key=key, origins=origins, local=local), bound, settings, ready)


def make_app(
    agent: Agent, settings: ServeSettings, *, key: str | None = None, origins: Sequence[str] = (), local: bool = True
) -> Counted:
    """The ASGI application that serves ``agent``.

    ``key``: clients must send it. ``origins``: other web pages that may send requests. ``local``: the server listens only on
    the loopback interface; without a key, it then answers only to this machine's own names.
    """
    app = FastAPI(title="search-e1 agent", docs_url=None, redoc_url=None)
    service = Service(agent, settings)
    metrics = Metrics(service.queue.slots)
    service.metrics = metrics
    _add_routes(app, service)
    pages = _add_page(app)
    app.add_exception_handler(HTTPException, _error_response)
    app.add_exception_handler(RequestValidationError, _error_response)
    app.add_exception_handler(Refused, _error_response)
    app.add_exception_handler(Exception, _broken)
    guarded: Any = Access(app, key, frozenset(origins), local and key is None, frozenset({"/healthz", *pages}))
    if origins:
        guarded = CORSMiddleware(guarded, origins, allow_methods=["GET", "POST"], allow_headers=["*"])
    return Counted(guarded, metrics)


class Service:
    """The implementation of the routes."""

    metrics: Metrics

    def __init__(self, agent: Agent, settings: ServeSettings) -> None:
        self.agent, self.settings = agent, settings
        self.begun = int(time.time())
        self.queue = QuestionQueue(agent, settings.max_waiting, settings.timeout)
        self._searches = Slots(_SEARCHES, settings.max_waiting)
        self._memory = Memory(settings.memory_bytes)
        self._looks_up = hasattr(agent.retriever, "passage")
        self._recent: LRUCache[str, Passage] = LRUCache(_RECENT)

    async def chat(self, request: Request) -> Response:
        """Answer a request, as a whole or as a stream."""
        begun = time.perf_counter()
        taken: list[int] = []
        try:
            asked = parse(await read_body(request, self.settings, self._memory, taken), self.agent.name)
            question = asked.question(self.settings.max_question_chars)
        finally:
            self._memory.release(sum(taken))
        completion = Completion(self.agent.name, _base(request), len(asked.messages) - 1)
        reasoning = asked.search_e1 is None or asked.search_e1.reasoning
        ask = partial(self._ask, question, asked, begun)
        if asked.stream:
            usage = bool(asked.stream_options and asked.stream_options.include_usage)
            return Stream(self, completion, ask, reasoning=reasoning, usage=usage, begun=begun)
        answer = await while_there(request.receive, self._failing(ask()))
        said = "".join(self._before_answer(answer)) if reasoning else None
        return Response(to_json(completion.whole(answer, said)), media_type="application/json")

    async def _ask(
        self, question: str, asked: ChatRequest, begun: float, tell: Callable[[Event], None] | None = None
    ) -> Answer:
        temperature = asked.temperature or 0.0
        # As in OpenAI's API, samples differ without a seed.
        seed = asked.seed if asked.seed is not None else random.getrandbits(32) if temperature else 0
        answer = await self.queue.ask(question, tell, temperature=temperature, seed=seed, max_tokens=asked.most)
        self.metrics.answered(answer, time.perf_counter() - begun)
        self.remember([source.passage for source in answer.sources])
        return answer

    async def _failing(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        """
        Raises:
            Refused: on any error.
        """
        try:
            return await work
        except asyncio.CancelledError:
            self.metrics.failures.labels("gone").inc()
            raise
        except Exception as error:
            raise self.refusal(error) from error

    def refusal(self, error: Exception) -> Refused:
        """The refusal sent to a client for a failed question."""
        refused, why = _refusal(error, self.settings.timeout)
        self.metrics.failures.labels(why).inc()
        return refused

    def _before_answer(self, answer: Answer) -> list[str]:
        reasoning = Reasoning(self.agent.protocol)
        return [reasoning.turn(turn, self.agent.said(turn)) for turn in answer.trajectory.turns]

    def remember(self, passages: Sequence[Passage]) -> None:
        """Keep passages that the retriever cannot look up."""
        if not self._looks_up:
            self._recent.update({passage.id: passage for passage in passages})

    async def passage(self, id: str) -> dict[str, Any]:
        found = await run_in_threadpool(self.agent.passage, id) if self._looks_up else self._recent.get(id)
        if not found:
            raise Refused(404, f"no passage {id[:100]!r}", param="id", code="passage_not_found")
        return passage_json(found)

    async def search(self, query: str, topk: int | None) -> dict[str, Any]:
        try:
            async with self._searches.slot():
                found = await run_in_threadpool(self.agent.search, query, topk)
        except (QueueFullError, SearchE1Error) as error:
            raise _refusal(error, self.settings.timeout)[0] from error
        self.remember(found)
        return {"query": query, "passages": [passage_json(passage) for passage in found]}


class Stream(Response):
    """Server-sent events of one question. A failure before the first event is a plain response with an error status."""

    def __init__(
        self, service: Service, completion: Completion, ask: Callable[..., Coroutine[Any, Any, Answer]], *, reasoning: bool,
        usage: bool, begun: float,
    ) -> None:  # fmt: skip
        self._service, self._completion, self._ask, self._usage = service, completion, ask, usage
        self._reasoning = Reasoning(service.agent.protocol) if reasoning else None
        self._begun = begun
        self._open = False
        self.status_code, self.background = 200, None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_there(receive, self._run(send))
        except Refused as refusal:
            if not self._open:
                await refusal.response(scope, receive, send)
                return
            await self._send(send, refusal.body)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except GoneError:
            return

    async def _run(self, send: Send) -> None:
        events: asyncio.Queue[Event | None] = asyncio.Queue()
        asked = asyncio.ensure_future(self._service._failing(self._ask(events.put_nowait)))
        asked.add_done_callback(lambda _: events.put_nowait(None))
        try:
            while (event := await events.get()) is not None:
                for chunk in self._chunks(event):
                    await self._send(send, chunk)
            answer = await asked
        finally:
            asked.cancel()
            await asyncio.wait([asked])
        for chunk in self._completion.last(answer):
            await self._send(send, chunk)
        if self._usage:
            await self._send(send, self._completion.used(answer))
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    def _chunks(self, event: Event) -> list[dict[str, Any]]:
        if isinstance(event, str):
            said = self._reasoning.feed(event) if self._reasoning else ""
            return [self._completion.reasoning(said)] if said else []
        turn, passages = event
        self._service.remember(passages)
        said = self._reasoning.turn(turn) if self._reasoning else ""
        chunks = [self._completion.reasoning(said)] if said else []
        told = self._completion.turn(event)
        return [*chunks, told] if told else chunks

    async def _send(self, send: Send, event: dict[str, Any]) -> None:
        if not self._open:
            self._open = True
            self._service.metrics.first_seconds.observe(time.perf_counter() - self._begun)
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
            headers += [(b"x-accel-buffering", b"no")]  # keeps proxies from buffering the stream
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await self._send(send, self._completion.first())
        await send({"type": "http.response.body", "body": b"data: " + to_json(event) + b"\n\n", "more_body": True})


def _add_routes(app: FastAPI, service: Service) -> None:
    agent, settings = service.agent, service.settings
    listed = {"id": agent.name, "object": "model", "created": service.begun, "owned_by": "search-e1"}
    whole = schema(agent.name, settings.max_question_chars)

    @app.post("/v1/chat/completions", openapi_extra=whole, responses={**_RESPONSES, **_STREAM})
    async def chat(request: Request) -> Response:
        """Answer the last message of the user, running the whole search loop."""
        try:
            return await service.chat(request)
        except (ClientDisconnect, GoneError):
            return Response(status_code=499)  # the client has disconnected

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The agent, as a list of models."""
        return {"object": "list", "data": [listed]}

    @app.get("/v1/models/{id:path}", responses=_NOT_FOUND)
    async def model(id: str) -> dict[str, Any]:
        """The agent, as a model."""
        if id != agent.name:
            raise Refused(404, f"no model {id[:100]!r} here, only {agent.name!r}", param="model", code="model_not_found")
        return listed

    @app.get("/passages/{id:path}", responses=_NOT_FOUND)
    async def passage(id: str) -> JSONResponse:
        """A passage, by its id."""
        return JSONResponse(await service.passage(id))

    @app.get("/search", responses=_RESPONSES)
    async def search(
        q: Annotated[str, Query(pattern=r"\S", max_length=settings.max_question_chars)],
        topk: Annotated[int | None, Query(ge=1, le=_MOST_FOUND)] = None,
    ) -> JSONResponse:
        """The passages found for a query."""
        return JSONResponse(await service.search(q, topk))

    @app.get("/healthz")
    async def health() -> dict[str, Any]:
        """Whether the server is up, and how busy it is."""
        slots = service.queue.slots
        return {"status": "ok", "model": agent.name, "under_way": slots.taken, "waiting": slots.waiting}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def export_metrics() -> Response:
        """Metrics in Prometheus's text format."""
        return service.metrics.response


def _add_page(app: FastAPI) -> list[str]:
    """Serve the page and its files; returns their paths."""
    files = {"/": PAGE / "index.html"} | {f"/page/{file.name}": file for file in sorted(PAGE.glob("*")) if file.is_file()}
    found = {path: file for path, file in files.items() if file.is_file()}
    for path, file in found.items():
        app.get(path, include_in_schema=False)(partial(_file, file))
    return list(found)


async def _file(file: Path) -> FileResponse:
    return FileResponse(file, headers=PAGE_HEADERS)


def _base(request: Request) -> str:
    try:
        return str(request.base_url).rstrip("/")
    except ValueError as error:
        raise Refused(400, "an invalid Host header") from error


_STATUSES = {
    400: "Not a request that the agent can answer.",
    401: "No key, or a wrong one.",
    404: "No such model.",
    408: "The request did not arrive in time.",
    413: "The body is too large.",
    500: "The retriever or the policy failed.",
    503: "Too many questions are waiting; retry after `Retry-After` seconds.",
    504: "The question took too long.",
}
_RESPONSES: dict[int | str, dict[str, Any]] = {code: {"description": text} for code, text in _STATUSES.items()}
_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"description": "The answer, whole, or with `stream` in events.", "content": {"text/event-stream": {}}}
}
_NOT_FOUND: dict[int | str, dict[str, Any]] = {404: {"description": "There is none."}}


def _refusal(error: Exception, timeout: float) -> tuple[Refused, str]:
    """The refusal sent to a client, and the metric label that it counts under."""
    match error:
        case Refused():
            return error, "refused"
        case QuestionError():
            message = plain(str(error))
            return Refused(400, message, param="messages", code="context_length_exceeded"), "too_long"
        case QueueFullError():
            message = "too many questions are waiting; ask again later"
            return Refused(503, message, type="overloaded_error", code="full", headers={"Retry-After": "2"}), "full"
        case TimeoutError():
            message = f"no answer within {timeout:g} s"
            return Refused(504, message, type="timeout_error", code="timeout"), "timeout"
        case SearchE1Error():
            message = " ".join(plain(str(error)).split())
            logger.error("a question failed: %s", message)
            return Refused(500, message, type="server_error", code="failed"), "failed"
    logger.error("a question failed: %s: %s", type(error).__name__, error, exc_info=error)
    return Refused(500, "internal server error; see the server log", type="server_error", code="internal"), "internal"


async def _error_response(request: Request, error: Exception) -> Response:
    """The error of a request, in the API's form."""
    match error:
        case Refused():
            return error.response
        case RequestValidationError():
            problem = error.errors()[0]
            where = str(problem["loc"][-1])
            return Refused(400, f"{where}: {problem['msg']}", param=where).response
        case HTTPException(status_code=404):
            return Refused(404, f"nothing at {request.method} {request.url.path[:200]}", code="unknown_url").response
        case HTTPException(status_code=405):
            message = f"{request.method} is not allowed for {request.url.path[:200]}"
            return Refused(405, message, code="wrong_method", headers=error.headers).response
        case HTTPException():
            kind = "invalid_request_error" if error.status_code < 500 else "overloaded_error"
            return Refused(error.status_code, error.detail, type=kind, headers=error.headers).response
    raise error


async def _broken(request: Request, error: Exception) -> Response:
    return Refused(500, "internal server error; see the server log", type="server_error", code="internal").response
