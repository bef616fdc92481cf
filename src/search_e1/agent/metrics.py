"""Metrics of the agent's server, in Prometheus's text format."""

from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from search_e1.agent.answer import Answer
from search_e1.agent.chat_api import usage
from search_e1.agent.queue import Slots

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Metrics of one server, in their own registry."""

    def __init__(self, questions: Slots) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        counter, gauge = partial(Counter, registry=self.registry), partial(Gauge, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry, buckets=_SECONDS)
        self.requests = counter(
            "search_e1_agent_requests", "Requests, by response status; gone: the client left before one.", ["status"]
        )
        self.answers = counter("search_e1_agent_answers", "Answers, by kind of support.", ["support"])
        self.found = counter("search_e1_agent_found", "Answers, by whether the documents gave them.", ["found"])
        self.tokens = counter("search_e1_agent_tokens", "Tokens read (prompts, passages) and sampled.", ["kind"])
        self.searches = counter("search_e1_agent_searches", "Searches that were answered.")
        self.failures = counter("search_e1_agent_failures", "Questions without an answer, by cause.", ["why"])
        self.first_seconds = histogram("search_e1_agent_first_token_seconds", "To the first text of a stream.")
        self.answer_seconds = histogram("search_e1_agent_answer_seconds", "From the question to its answer.")
        gauge("search_e1_agent_questions_under_way", "Questions being answered.").set_function(lambda: questions.taken)
        gauge("search_e1_agent_questions_waiting", "Questions waiting for a place.").set_function(lambda: questions.waiting)

    def answered(self, answer: Answer, seconds: float) -> None:
        self.answer_seconds.observe(seconds)
        self.answers.labels(answer.support).inc()
        self.found.labels("yes" if answer.found else "no").inc()
        self.searches.inc(answer.trajectory.searches)
        used = usage(answer)
        self.tokens.labels("read").inc(used["prompt_tokens"])
        self.tokens.labels("sampled").inc(used["completion_tokens"])

    @property
    def response(self) -> Response:
        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)


class Counted:
    """ASGI middleware that counts responses."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = "gone"

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, counted)
        finally:
            self._metrics.requests.labels(status).inc()
