"""The agent as an MCP server: the tools `ask` and `search`, over stdio or streamable HTTP. The only file that knows the SDK.

Needs the extra ``mcp``.
"""

import asyncio
import logging
import socket
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.transport_security import TransportSecuritySettings
from mcp.types import CallToolResult, TextContent, ToolAnnotations
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

from search_e1.agent.agent import Agent
from search_e1.agent.answer import Answer
from search_e1.agent.queue import QuestionQueue, QueueFullError
from search_e1.agent.settings import ServeSettings
from search_e1.errors import SearchE1Error
from search_e1.runs.safe import plain
from search_e1.serving import listening
from search_e1.serving.access import Access, is_loopback
from search_e1.types import Passage

logger = logging.getLogger(__name__)
_MOST_FOUND = 20
_READS = ToolAnnotations(read_only_hint=True, destructive_hint=False, idempotent_hint=True, open_world_hint=False)


class FoundPassage(BaseModel):
    """A passage."""

    id: str
    title: str
    text: str
    origin: dict[str, str | int] = Field(description="Where it comes from: file, page, heading, url, as far as is known.")


class CitedPassage(FoundPassage):
    """A passage that the agent read."""

    holds: bool = Field(description="The passage contains the answer verbatim.")


class AskedAnswer(BaseModel):
    """The agent's answer."""

    answer: str | None = Field(description="Its answer; null if there is none.")
    found: bool = Field(description="Whether the documents hold it. If not, it is a guess.")
    searches: list[str] = Field(description="What it searched for.")
    sources: list[CitedPassage] = Field(description="Passages that were read, those that hold the answer first.")


class FoundPassages(BaseModel):
    """The result of a search."""

    passages: list[FoundPassage]


def make_server(agent: Agent, settings: ServeSettings) -> MCPServer[Any]:
    """The MCP server of ``agent``."""
    server: MCPServer[Any] = MCPServer(
        agent.name,
        instructions="Answers questions from a collection of documents, with the passages that hold the answers.",
        log_level="WARNING",
    )
    queue = QuestionQueue(agent, settings.max_waiting, settings.timeout)
    most = settings.max_question_chars

    @server.tool(annotations=_READS)
    async def ask(
        question: Annotated[str, Field(pattern=r"\S", max_length=most, description="One question, understandable by itself.")],
    ) -> Annotated[CallToolResult, AskedAnswer]:
        """Answer a question from the documents: the agent searches them as often as it needs to, and names its sources."""
        answer = await _reported(queue.ask(question), settings.timeout)
        return _result(_readable(answer), _structured(answer))

    @server.tool(annotations=_READS)
    async def search(
        query: Annotated[str, Field(pattern=r"\S", max_length=most, description="Words to look for.")],
        topk: Annotated[int, Field(ge=1, le=_MOST_FOUND, description="Maximum number of passages.")] = agent.limits.topk,
    ) -> Annotated[CallToolResult, FoundPassages]:
        """Find passages of the documents, without an answer."""
        found = await _reported(run_in_threadpool(agent.search, query, topk), settings.timeout)
        passages = [_found(passage) for passage in found]
        text = "\n\n".join(f"[{i}] {_cited(passage)}\n{passage.text}" for i, passage in enumerate(found, 1))
        return _result(text or "nothing found", FoundPassages(passages=passages))

    return server


def run_stdio(agent: Agent, settings: ServeSettings) -> None:
    """Serve over standard input and output until the input ends. The SDK keeps everything but its messages off stdout."""
    asyncio.run(make_server(agent, settings).run_stdio_async())


def run_http(
    agent: Agent,
    bound: socket.socket,
    settings: ServeSettings,
    *,
    key: str | None = None,
    origins: Sequence[str] = (),
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serve over streamable HTTP at ``/mcp`` until SIGINT or SIGTERM; see ``listening.serve``."""
    local = is_loopback(bound.getsockname()[0])
    listening.serve(make_app(agent, settings, key=key, origins=origins, local=local), bound, settings, ready)


def make_app(
    agent: Agent, settings: ServeSettings, *, key: str | None = None, origins: Sequence[str] = (), local: bool = True
) -> Access:
    """The ASGI application of ``run_http``."""
    # ``Access`` checks hosts and origins.
    unchecked = TransportSecuritySettings(enable_dns_rebinding_protection=False)
    app = make_server(agent, settings).streamable_http_app(
        transport_security=unchecked, max_request_body_size=settings.max_body_bytes
    )
    return Access(app, key, frozenset(origins), local and key is None)


async def _reported(work: Any, timeout: float) -> Any:
    """The result of ``work``.

    Raises:
        ToolError: it failed; the message is one line.
    """
    try:
        return await work
    except QueueFullError as error:
        raise ToolError("too many questions are waiting; ask again later") from error
    except TimeoutError as error:
        raise ToolError(f"no answer within {timeout:g} s") from error
    except SearchE1Error as error:
        message = " ".join(plain(str(error)).split())
        logger.error("a call failed: %s", message)
        raise ToolError(message) from error


def _result(text: str, structured: BaseModel) -> CallToolResult:
    return CallToolResult(content=[TextContent(type="text", text=text)], structured_content=structured.model_dump(mode="json"))


def _structured(answer: Answer) -> AskedAnswer:
    told = answer.as_json()
    sources = [CitedPassage(**_found(source.passage).model_dump(), holds=source.holds) for source in answer.sources]
    return AskedAnswer(answer=answer.text, found=answer.found, searches=told["searches"], sources=sources)


def _found(passage: Passage) -> FoundPassage:
    return FoundPassage(id=passage.id, title=passage.title, text=passage.text, origin=passage.metadata)


def _readable(answer: Answer) -> str:
    held = [source.passage for source in answer.sources if source.holds]
    guess = f" (a guess, in none of the passages read: {answer.text})" if answer.text and not answer.found else ""
    lines = [f"{answer}{guess}", *(f"[{i}] {_cited(passage)}\n{passage.text}" for i, passage in enumerate(held, 1))]
    return "\n\n".join(lines)


def _cited(passage: Passage) -> str:
    origin = ", ".join(f"{name} {value}" for name, value in passage.metadata.items())
    return " ".join(f"{passage.title} ({', '.join(filter(None, (origin, f'id {passage.id}')))})".split())
