"""Tools that a policy can call, by name: the description of each, and the handler that answers its calls.

Your own tool is a ``Tool`` named as ``module:attribute`` in ``prompts.tools``; it needs no registration.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from search_e1.config import Prompts
from search_e1.errors import ConfigError
from search_e1.retrieval.base import Retriever
from search_e1.runs.registry import Registry
from search_e1.types import Passage


class Call(NamedTuple):
    """One call of a tool."""

    argument: str
    seen: Sequence[str] = ()
    """Ids of the passages that the trajectory's latest search returned: ``Doc 1`` is the first."""


Handler = Callable[[Sequence[Call]], Sequence[Sequence[Passage] | str]]
"""Answers calls with passages or a text: one answer per call, in order. Raises if it fails."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool with one argument."""

    name: str
    """Lower-case letters and underscores: the tag under ``tags``, the function name under ``tools``."""
    parameter: str
    description: str
    parameter_description: str
    open: Callable[[Retriever, int], Handler]
    """Returns the handler for a retriever and ``rollout.topk``. Raises ConfigError if the retriever does not support it."""

    @property
    def schema(self) -> dict[str, Any]:
        """The function schema for chat templates and endpoints."""
        argument = {self.parameter: {"type": "string", "description": self.parameter_description}}
        parameters = {"type": "object", "properties": argument, "required": [self.parameter]}
        about = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": about}


TOOLS: Registry[Tool] = Registry("tool")
_RESERVED = ("think", "information", "answer", "tools", "tool_call", "tool_response")


@lru_cache(maxsize=16)
def tools_of(prompts: Prompts) -> tuple[Tool, ...]:
    """The tools that ``prompts`` names, in its order.

    Raises:
        ConfigError: a tool does not exist, or two have the same name.
    """
    tools = tuple(TOOLS.get(name, "prompts.tools") for name in prompts.tools)
    for name, tool in zip(prompts.tools, tools, strict=True):
        if not isinstance(tool, Tool) or not re.fullmatch(r"[a-z][a-z_]*", tool.name) or tool.name in _RESERVED:
            raise ConfigError(f"prompts.tools: {name!r} is not a Tool with a unique lower-case name")
    if not tools or len({tool.name for tool in tools}) < len(tools):
        raise ConfigError(f"prompts.tools = {list(prompts.tools)}: name at least one tool, and each once")
    return tools


def _open_search(retriever: Retriever, topk: int) -> Handler:
    return lambda calls: retriever.search([call.argument for call in calls], topk)


def _open_passages(retriever: Retriever, topk: int) -> Handler:
    passage = getattr(retriever, "passage", None)
    if passage is None:
        raise ConfigError(
            'prompts.tools: this retriever cannot open a passage; leave "open" out, or search a BM25 or dense index in this '
            "process"
        )

    def answer(call: Call) -> Sequence[Passage] | str:
        number = re.fullmatch(r"(?:doc )?(\d+)", call.argument.lower())
        shown = number and 0 < int(number[1]) <= len(call.seen)
        found = passage(call.seen[int(number[1]) - 1] if number and shown else call.argument)
        # Otherwise a number that is an id (wiki-18's are numbers) would open a passage that was never shown.
        meant = found and (found.id in call.seen or found.title.casefold() == call.argument.casefold())
        return [found] if meant else "No such passage."

    return lambda calls: [answer(call) for call in calls]


SEARCH = Tool("search", "query", "Searches for passages that help to answer the question.", "What to search for.", _open_search)
_IN_LATEST = "Its number in the latest search (2 for Doc 2), or its title."
TOOLS.register("search")(SEARCH)
TOOLS.register("open")(Tool("open", "passage", "Shows a whole passage.", _IN_LATEST, _open_passages))
