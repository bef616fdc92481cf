"""The ``tools`` protocol: tool calls in the format of the policy's own chat template.

The text that the template writes between a call and the next assistant turn is extracted once, by rendering conversations with
and without a tool message. After that, ids are only appended to a trajectory, and sampled text is never rendered again:
templates cannot drop the thinking of earlier turns, and the policy is trained on exactly the tokens it read.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from pydantic_core import from_json

from search_e1.config import Prompts
from search_e1.errors import ModelError
from search_e1.text.prompts import (
    NO_TEMPLATE,
    enclosed,
    listed,
    neutralize,
    passages_of,
    special_tokens,
    with_passages,
)  # fmt: skip
from search_e1.text.protocol import MALFORMED, Action, Protocol, Span
from search_e1.text.tools import SEARCH, Tool, tools_of
from search_e1.types import ActionKind, Passage

CALL = re.compile(r"<tool_call>((?:(?!</?tool_call>).)*)</tool_call>", re.DOTALL)  # from tag to tag: the work stays linear
_CALL_TAG = re.compile(r"</?tool_call>")
_ANSWER = re.compile(r"<answer>((?:(?!<answer>|</answer>).)*)</answer>", re.DOTALL)
_TAG = re.compile(r"</?(?:think|tool_call|answer)>")
_THINK = re.compile(r"<(/?)think>")
_OWN = re.compile(r"</?(?:think|tool_call|tool_response|answer)>")
_MARKUP = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")

# Placeholders of a query, of passages and of an answer, for extracting the template's pieces.
_QUERY_MARK, _RESULT_MARK, _TEXT_MARK = "0query0", "0result0", "0text0"


class ToolCalls(Protocol):
    """``<tool_call>{"name": "search", "arguments": {"query": ...}}</tool_call>``, the format of Qwen2.5, Qwen3 and others."""

    def __init__(self, tokenizer: Any, prompts: Prompts) -> None:
        """
        Raises:
            ModelError: the tokenizer has no chat template, or its template does not support tools or writes another format.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise ModelError(NO_TEMPLATE)
        self._tokenizer, self._correction = tokenizer, prompts.correction
        self._tools = tools_of(prompts)
        names = "|".join(tool.parameter for tool in self._tools)
        self._argument = re.compile(rf'"(?:{names})"\s*:\s*"((?:[^"\\]|\\.)*)"', re.DOTALL)
        pieces = getattr(tokenizer, "tool_pieces", None) or _pieces(tokenizer)
        self._thinking = pieces.thinking
        self._end = pieces.closing.strip()
        after = pieces.closing[pieces.closing.find(self._end) + len(self._end) :]
        head, _, tail = pieces.result.partition(_RESULT_MARK)
        self._opening = after + head
        self._closing = tail.removeprefix("\n")  # `enclosed` adds it
        self._markup = sorted(set(_MARKUP.findall(self._end + head + tail)), key=len, reverse=True)
        # Not the unknown token: it stands for a character of the message.
        ends = {self._end, *special_tokens(tokenizer)} - {"", getattr(tokenizer, "unk_token", None)}
        self._ends = tuple(sorted(end for end in ends if not _OWN.fullmatch(end)))
        self.stop = (self._end,) if self._end else ()

    def parse(self, text: str) -> Action:
        """The only call outside thinking; without a call, the final answer.

        The final answer is the content of the last complete ``<answer>``, or else the whole message if the policy ended it
        itself. Malformed: several calls, or a call that is not closed, is invalid JSON, names an unknown tool or lacks the
        argument.
        """
        said, ended = self._visible_text(text)
        if _CALL_TAG.search(said):
            return _call(said, self._tools)
        answers = _ANSWER.findall(said)
        if answers:
            return Action(ActionKind.ANSWER, answers[-1].strip())
        message = said.strip()
        return Action(ActionKind.ANSWER, message) if ended and message else MALFORMED

    def write(self, thought: str, action: Action) -> str:
        if action.kind is ActionKind.ANSWER:
            said = f"<answer> {action.argument} </answer>"
        else:
            [tool] = (tool for tool in self._tools if tool.name == (action.tool or SEARCH.name))
            call = {"name": tool.name, "arguments": {tool.parameter: action.argument}}
            said = f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"
        begin = "" if self._thinking else "<think>\n"
        return f"{begin}{thought}\n</think>\n\n{said}{self._end}"

    def observe(self, action: str, answer: Sequence[Passage] | str, max_tokens: int) -> tuple[str, tuple[int, ...]]:
        return enclosed(self._tokenizer, self._open(action), listed(answer, self._clean), self._closing, max_tokens)

    def correct(self, action: str) -> tuple[str, tuple[int, ...]]:
        text = self._open(action) + self._correction.rstrip("\n") + "\n" + self._closing
        return text, tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def spans(self, text: str) -> Iterator[Span]:
        said, ended = self._visible_text(text)
        length = len(said.rstrip())
        calls, answers = list(CALL.finditer(said)), list(_ANSWER.finditer(said))
        if ended and said.strip() and not answers and not _CALL_TAG.search(said):
            yield Span(len(said) - len(said.lstrip()), length, "answer")
        for match in answers:
            yield Span(*match.span(1), "answer")
        for match in calls:
            yield Span(*match.span(1), "tag")  # names, braces and quotes choose the action, like tags
            for argument in self._argument.finditer(said, *match.span(1)):
                yield Span(*argument.span(1), "search")
        for match in _TAG.finditer(text):
            yield Span(*match.span(), "tag")
        if self._end and (at := text.find(self._end)) >= 0:
            yield Span(at, at + len(self._end), "tag")

    def begins(self, text: str) -> int | None:
        said, ended = self._visible_text(text)
        match = CALL.search(said) or next(reversed(list(_ANSWER.finditer(said))), None)
        if match:
            return match.start()
        return len(said) - len(said.lstrip()) if ended and said.strip() else None

    def passages(self, observation: str) -> list[str] | None:
        return passages_of(observation.removeprefix(self._end), self._opening, self._closing)

    def with_passages(self, observation: str, passages: Sequence[str]) -> str:
        end = self._end if self._end and observation.startswith(self._end) else ""
        return with_passages(passages, end + self._opening, self._closing)

    def _open(self, action: str) -> str:
        """Text before a tool result, including the end of the assistant's turn unless the policy sampled it."""
        return self._opening if self._end in action else self._end + self._opening

    def _clean(self, text: str) -> str:
        return neutralize(self._tokenizer, text, "tools", self._markup)

    def _visible_text(self, text: str) -> tuple[str, bool]:
        """The text up to its end token, with thinking replaced by blanks of the same length, and whether it ended."""
        found = [at for end in self._ends if (at := text.find(end)) >= 0]
        return _without_thinking(text[: min(found, default=len(text))], self._thinking), bool(found)


def _call(said: str, tools: Sequence[Tool]) -> Action:
    """The call in ``said``; malformed if there is not exactly one valid call."""
    calls = CALL.findall(said)
    if len(calls) != 1 or len(_CALL_TAG.findall(said)) != 2:
        return MALFORMED
    try:
        call = from_json(calls[0])  # rejects deep nesting
        [tool] = (tool for tool in tools if tool.name == call["name"])
        argument = call["arguments"][tool.parameter].strip()
        argument.encode()  # raises on lone surrogates, which servers and files do not accept
    except (ValueError, LookupError, TypeError, AttributeError):
        return MALFORMED
    return Action.calling(tool.name, argument) if argument else MALFORMED


def _without_thinking(text: str, thinking: bool) -> str:
    """``text`` with thinking replaced by blanks. It starts inside thinking if ``thinking``, or if its first tag is
    ``</think>``; unclosed thinking extends to the end."""
    first = _THINK.search(text)
    since = 0 if thinking or (first and first[1]) else None
    pieces: list[str] = []
    end = 0  # text before this offset is in the pieces

    def blank(begin: int, to: int) -> int:
        pieces.extend((text[end:begin], " " * (to - begin)))
        return to

    for tag in _THINK.finditer(text):
        if not tag[1]:
            since = tag.start() if since is None else since
        elif since is not None:
            end, since = blank(since, tag.end()), None
    if since is not None:
        end = blank(since, len(text))
    return "".join(pieces) + text[end:]


@dataclass(frozen=True, slots=True)
class Pieces:
    """The text that a chat template writes around sampled text."""

    closing: str
    """After an assistant's message: its end token and the text that follows."""
    result: str
    """From there to the next assistant turn, with ``_RESULT_MARK`` in place of the tool's result."""
    thinking: bool
    """Whether an assistant's turn starts inside ``<think>``."""


def _pieces(tokenizer: Any) -> Pieces:
    user = {"role": "user", "content": "0question0"}
    call = {"type": "function", "id": "search000", "function": {"name": "search", "arguments": {"query": _QUERY_MARK}}}
    calling = {"role": "assistant", "content": "", "tool_calls": [call]}
    result = {"role": "tool", "name": "search", "tool_call_id": "search000", "content": _RESULT_MARK}

    def render(*messages: dict[str, Any], go_on: bool = False) -> str:
        return tokenizer.apply_chat_template(
            [user, *messages], tools=[SEARCH.schema], add_generation_prompt=go_on, tokenize=False
        )

    try:
        without_tools, with_tools = tokenizer.apply_chat_template([user], tokenize=False), render()
        start = render(go_on=True)[len(with_tools) :]
        called, answered = render(calling), render(calling, result, go_on=True)
        message = render({"role": "assistant", "content": _TEXT_MARK})
    except (TemplateError, TypeError, KeyError, ValueError) as error:
        raise ModelError(_refusal(f"fails on a tool's result ({str(error).splitlines()[0]})")) from error
    if with_tools == without_tools or _RESULT_MARK not in answered:
        raise ModelError(_refusal("does not support tools"))
    calls = called[called.rfind("<tool_call>") :]
    if _call(calls[: calls.find("</tool_call>") + len("</tool_call>")], [SEARCH]).argument != _QUERY_MARK:
        raise ModelError(_refusal("does not write calls as <tool_call>{JSON}</tool_call>"))
    closing = message.rpartition(_TEXT_MARK)[2]
    after_query, to_next = called.rpartition(_QUERY_MARK)[2], answered.rpartition(_QUERY_MARK)[2]
    if not (after_query.endswith(closing) and to_next.startswith(after_query)):
        raise ModelError(_refusal("ends turns with and without a call differently"))
    thinking = start.rfind("<think>") > start.rfind("</think>")
    return Pieces(closing, to_next[len(after_query) :], thinking)


def _refusal(what: str) -> str:
    return f'prompts.protocol = "tools": the policy\'s chat template {what}; use another model, or protocol = "tags"'
