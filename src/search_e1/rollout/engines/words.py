"""A stand-in tokenizer for the text exchanged with an endpoint. Its ids are not the policy's and cannot be trained on."""

import json
import re
from collections.abc import Sequence
from threading import Lock
from types import SimpleNamespace
from typing import Any

from search_e1.runs.http import read_json
from search_e1.text.tool_calls import CALL, Pieces

END = "<|end|>"
"""Marks the end of a message that the endpoint ended itself."""
_PIECE = re.compile(r"\s*\w+|\s*[^\w\s]|\s+")


class Words:
    """Ids are indices into a growing list of words, with separate ids for words of the endpoint and words sent to it.

    Limits therefore count words and punctuation marks, and a context can be split back into its messages.
    """

    ids_of_process = True
    """The ids are valid in this process only: ``rollout`` cannot resume a trajectory from them."""
    chat_template = "endpoint"  # the endpoint has one, and applies it
    all_special_tokens = (END,)
    all_special_ids = (0,)
    added_tokens_decoder = {0: SimpleNamespace(content=END, special=True)}
    eos_token = END
    eos_token_id = pad_token_id = 0
    tool_pieces = Pieces(closing="", result="0result0", thinking=False)
    """For the ``tools`` protocol: a tool result is a separate message without surrounding text."""

    def __init__(self) -> None:
        self._words: list[tuple[bool, str]] = [(True, END)]
        self._ids: dict[tuple[bool, str], int] = {}
        self._lock = Lock()  # the retriever's and the server's threads both add words

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of text sent to the endpoint."""
        return [self._id(False, piece) for piece in _PIECE.findall(text)]

    def __call__(self, text: str, **_: Any) -> dict[str, list]:
        offsets = [match.span() for match in _PIECE.finditer(text)]
        return {"input_ids": self.encode(text), "offset_mapping": offsets}

    def apply_chat_template(self, messages: Sequence[dict[str, Any]], **_: Any) -> list[int]:
        return self.encode(messages[0]["content"])

    def said(self, text: str, tokens: int | None, most: int) -> tuple[int, ...]:
        """Ids of the endpoint's text: as many as the ``tokens`` it counted, from 1 to ``most``; they decode to ``text``."""
        pieces = _PIECE.findall(text)
        count = min(max(1, len(pieces) if tokens is None else tokens), most)
        kept = [*pieces[: count - 1], "".join(pieces[count - 1 :])]
        return tuple(self._id(True, piece) for piece in kept + [""] * (count - len(kept)))

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return "".join(self._words[i][1] for i in ids)

    def messages(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        """The conversation in a context: sent text as user or tool messages, the endpoint's text as assistant messages."""
        runs: list[tuple[bool, list[str]]] = []
        for said, word in (self._words[i] for i in ids):
            if not runs or runs[-1][0] != said:
                runs.append((said, []))
            runs[-1][1].append(word)
        messages: list[dict[str, Any]] = []
        count = 0
        for said, words in runs:
            text = "".join(words)
            called = messages[-1].get("tool_calls", ()) if messages else ()
            if said:
                messages.append(_assistant(text, count))
                count += len(messages[-1].get("tool_calls", ()))
            elif called:
                messages += [{"role": "tool", "tool_call_id": call["id"], "content": text.strip()} for call in called]
            else:
                messages.append({"role": "user", "content": text.strip()})
        return messages

    def _id(self, said: bool, piece: str) -> int:
        with self._lock:
            known = self._ids.setdefault((said, piece), len(self._words))
            if known == len(self._words):
                self._words.append((said, piece))
        return known


def _assistant(text: str, count: int) -> dict[str, Any]:
    """The endpoint's text as an assistant message: tool calls as such, thinking removed, as endpoints expect.

    ``count``: number of earlier calls. Calls without a server's id get one of nine letters and digits, as some servers require.
    """
    text = _without_thinking(text.removesuffix(END))
    calls: list[dict[str, Any]] = []
    for match in CALL.finditer(text):
        try:
            call = read_json(match[1])
            function = {"name": str(call["name"]), "arguments": json.dumps(call["arguments"], ensure_ascii=False)}
            id = str(call.get("id") or f"call{count + len(calls):05d}")
        except (ValueError, LookupError, TypeError):
            return {"role": "assistant", "content": text}
        calls.append({"id": id, "type": "function", "function": function})
    if not calls:
        return {"role": "assistant", "content": text}
    return {"role": "assistant", "content": CALL.sub("", text).strip(), "tool_calls": calls}


def _without_thinking(text: str) -> str:
    *before, rest = text.split("</think>")
    kept, hidden = [], False
    for part in before:
        said, opened, _ = part.partition("<think>")
        kept += [said.lstrip() if hidden else said, "" if opened else "</think>"]
        hidden = bool(opened)
    return "".join(kept) + (rest.lstrip() if hidden else rest)
