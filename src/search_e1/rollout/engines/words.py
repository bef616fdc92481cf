"""A tokenizer for text that has no tokens of ours: what an endpoint says and is told. Its ids cannot be trained on."""

import json
import re
from collections.abc import Sequence
from threading import Lock
from types import SimpleNamespace
from typing import Any

from search_e1.runs.http import read_json
from search_e1.text.tool_calls import CALL, Pieces

END = "<|end|>"
"""After a message that the endpoint ended itself."""
_PIECE = re.compile(r"\s*\w+|\s*[^\w\s]|\s+")


class Words:
    """Ids are places in a list of words that grows as they come, apart for what was said and what was told.

    So limits count words and punctuation marks, and a context can be read back as the messages it was made of.
    """

    ids_of_process = True
    """Another process cannot read them: ``rollout`` resumes no trajectory by them."""
    chat_template = "endpoint"  # the endpoint has one, and applies it
    all_special_tokens = (END,)
    all_special_ids = (0,)
    added_tokens_decoder = {0: SimpleNamespace(content=END, special=True)}
    eos_token = END
    eos_token_id = pad_token_id = 0
    tool_pieces = Pieces(closing="", result="0result0", thinking=False)
    """Of the tools protocol: a result is a message of its own, with nothing around it."""

    def __init__(self) -> None:
        self._words: list[tuple[bool, str]] = [(True, END)]
        self._ids: dict[tuple[bool, str], int] = {}
        self._lock = Lock()  # a retriever's thread tells while a server's says

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Of what is told."""
        return [self._id(False, piece) for piece in _PIECE.findall(text)]

    def __call__(self, text: str, **_: Any) -> dict[str, list]:
        offsets = [match.span() for match in _PIECE.finditer(text)]
        return {"input_ids": self.encode(text), "offset_mapping": offsets}

    def apply_chat_template(self, messages: Sequence[dict[str, Any]], **_: Any) -> list[int]:
        return self.encode(messages[0]["content"])

    def said(self, text: str, tokens: int | None, most: int) -> tuple[int, ...]:
        """Ids of what the endpoint said: as many as it counted, from one to ``most``; together they are all of it."""
        pieces = _PIECE.findall(text)
        count = min(max(1, len(pieces) if tokens is None else tokens), most)
        kept = [*pieces[: count - 1], "".join(pieces[count - 1 :])]
        return tuple(self._id(True, piece) for piece in kept + [""] * (count - len(kept)))

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return "".join(self._words[i][1] for i in ids)

    def messages(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        """The conversation that a context is: what was told, as a user's or a tool's messages, and what was said."""
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
    """What was said, as an endpoint takes it back: calls as such, without thinking, which no endpoint wants to see again.

    ``count``: calls before. Those without an id of the server's get one, of nine letters and digits: some take no other.
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
