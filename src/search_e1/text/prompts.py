"""All text that a policy reads: instruction, privileged prompt, observations, corrections.

Prompts are token ids. They are built only here, so that GRPO, pools, distillation and evaluation use the same ones.
"""

import re
from collections.abc import Callable, Sequence
from datetime import date
from functools import lru_cache

from search_e1.config import Prompts
from search_e1.config.prompts import ProtocolName
from search_e1.errors import ConfigError, ModelError, SearchE1Error
from search_e1.runs.tokenizing import tokenizing
from search_e1.text.tools import SEARCH, tools_of
from search_e1.types import Passage

INFORMATION_OPEN, INFORMATION_CLOSE = "\n\n<information>\n", "</information>\n\n"
TEMPLATE_TOKENS: dict[ProtocolName, int] = {"tags": 64, "tools": 1024}
"""Upper bound of the tokens that a chat template adds to a message, tool descriptions included."""
_TAGS: dict[ProtocolName, tuple[str, ...]] = {
    "tags": ("think", "search", "information", "answer"),
    "tools": ("think", "search", "information", "answer", "tools", "tool_call", "tool_response"),
}
_LOOKS_LIKE_A_TAG = re.compile(r"[<\[]\S+[>\]]")
_CONTROL = re.compile(
    r"<(\|[\w ./:-]{1,48}\|)>|<(\uff5c[^\uff5c<>\n]{1,48}\uff5c)>|<(<?/?SYS>?)>|\[(/?INST)\]|<(/?s)>|<((?:start|end)_of_turn)>"
)
"""Control tokens of any chat template: an endpoint's tokenizer is unknown here, and some templates use plain text."""
_MAX_CHARS_PER_TOKEN = 64  # in observations; text beyond is not even tokenized
_PASSAGE_START = re.compile(r"^(?=Doc \d+\(Title: )", re.MULTILINE)


def plain_prompt(tokenizer, prompts: Prompts, question: str) -> tuple[int, ...]:
    """Ids of the plain prompt, which everything but the teacher uses.

    Raises:
        ModelError: the protocol is ``tools``, and the tokenizer has no chat template.
    """
    return _encode_message(tokenizer, prompts, _instruction(tokenizer, prompts, question))


def privileged_prompt(tokenizer, prompts: Prompts, question: str, reference: str) -> tuple[int, ...]:
    """Ids of the teacher's prompt; the plain prompt if ``reference`` (see ``reference.render_reference``) is empty."""
    if not reference:
        return plain_prompt(tokenizer, prompts, question)
    # `str.replace`, not `str.format`: references and questions are full of braces.
    message = prompts.privileged.replace("{instruction}", _instruction(tokenizer, prompts, question))
    reference = _as_read(tokenizer, lambda text: _break(special_tokens(tokenizer), text), reference)
    return _encode_message(tokenizer, prompts, message.replace("{reference}", reference))


def _instruction(tokenizer, prompts: Prompts, question: str) -> str:
    tools = tools_of(prompts)
    tool_lines = "".join(  # under `tools`, the chat template describes them
        f"You can also use <{tool.name}> {tool.parameter} </{tool.name}>. {tool.description} {tool.parameter_description}\n"
        for tool in tools
        if prompts.protocol == "tags" and tool is not SEARCH and f"<{tool.name}>" not in prompts.instruction
    )
    question = neutralize(tokenizer, question, prompts.protocol, tools=[tool.name for tool in tools])
    return tool_lines + prompts.instruction.replace("{question}", question)


def _encode_message(tokenizer, prompts: Prompts, message: str) -> tuple[int, ...]:
    if tokenizer.chat_template:
        return tuple(_apply_template(tokenizer, prompts, message, tokenize=True, return_dict=False))
    if prompts.protocol == "tools":
        raise ModelError(NO_TEMPLATE)
    with tokenizing(tokenizer):
        return tuple(tokenizer.encode(message))


def _apply_template(tokenizer, prompts: Prompts, message: str, **options):
    tools = [tool.schema for tool in tools_of(prompts)] if prompts.protocol == "tools" else None
    messages = [{"role": "user", "content": message}]
    try:
        if prompts.date and tells_date(tokenizer):  # otherwise the prompt would change every day
            options["chat_template"] = _clock(prompts.date) + tokenizer.get_chat_template(tools=tools)
        with tokenizing(tokenizer):
            return tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, **options)
    except SearchE1Error:
        raise
    except Exception as error:  # a template is a program: sandbox violations, division by zero, recursion
        problem = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"the policy's chat template fails ({problem}); use another model, or fix it") from error


@lru_cache(maxsize=16)
def _clock(day: date) -> str:
    """A Jinja macro ``strftime_now`` that always returns ``day``; transformers accepts no function from outside."""
    codes = [f"%{flag}{letter}" for flag in ("-", "") for letter in "aAbBcdDeFGhHIjmMpSTuUVwWxXyYzZ"]
    filled = "".join(f" | replace({code!r}, {day.strftime(code)!r})" for code in codes)
    return f"{{%- macro strftime_now(format) -%}}{{{{- format{filled} -}}}}{{%- endmacro -%}}"


def tells_date(tokenizer) -> bool:
    """Whether the chat template contains the current date."""
    return "strftime_now" in str(tokenizer.chat_template or "")


def check_template(tokenizer, prompts: Prompts) -> None:
    """
    Raises:
        ModelError: the chat template fails or drops the question, or its output cannot be tokenized.
    """
    question = "In which year did the Zambezi flood Kazungula?"
    with tokenizing(tokenizer):
        tokenizer.encode(prompts.instruction.replace("{question}", question))
    if not tokenizer.chat_template:
        return
    text = _apply_template(tokenizer, prompts, prompts.instruction.replace("{question}", question), tokenize=False)
    if question not in text:
        raise ModelError(
            "the policy's chat template drops the question (its output lacks the user's message); fix "
            "chat_template.jinja in its directory, or use another model"
        )


NO_TEMPLATE = 'prompts.protocol = "tools": the policy\'s tokenizer has no chat template; use a chat model, or protocol = "tags"'


def neutralize(
    tokenizer, text: str, protocol: ProtocolName = "tags", markup: Sequence[str] = (), tools: Sequence[str] = ()
) -> str:
    """``text`` with all markup defused: ``<search>`` becomes ``(search)``.

    Covers protocol tags, tags of ``tools``, control tokens of chat templates, the tokenizer's special tokens, ``markup``, and
    added tokens that look like tags: chat models have ``<tool_call>`` among them, not marked as special. Lone surrogates, which
    no tokenizer accepts, become ``?``.
    """
    if not text.isascii():
        text = text.encode("utf-8", "replace").decode()
    tag = _tag_pattern((*_TAGS[protocol], *tools))

    def harmless(text: str) -> str:
        text = _CONTROL.sub(lambda match: f"({match[match.lastindex or 0].strip('|<>')})", text)
        return _break((*_tag_tokens(tokenizer), *markup), tag.sub(r"(\1)", text))

    return _as_read(tokenizer, harmless, text)


@lru_cache(maxsize=16)
def _tag_pattern(names: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(rf"<(/?\s*(?:{'|'.join(names)})\s*)>", re.IGNORECASE)


def _as_read(tokenizer, harmless: Callable[[str], str], text: str) -> str:
    """``harmless(text)``, also after the tokenizer's normalization.

    Normalization can create tags: it removes a zero-width space, or turns a full-width bracket into a plain one. In that case,
    the normalized text is made harmless and returned.
    """
    text = harmless(text)
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    if normalizer is None:
        return text
    # SentencePiece tokenizers replace spaces with this mark.
    read = normalizer.normalize_str(text).replace("\N{LOWER ONE EIGHTH BLOCK}", " ")
    return text if (mended := harmless(read)) == read else mended


def _break(tokens: Sequence[str], text: str) -> str:
    for token in tokens:
        if token in text:
            bare = token.strip("<|>[]")
            text = text.replace(token, f"({bare})" if bare != token else f"{token[0]} {token[1:]}" if token[1:] else " ")
    return text


@lru_cache(maxsize=16)
def special_tokens(tokenizer) -> tuple[str, ...]:
    """All special tokens, longest first: the named ones, and unnamed ones that chat templates use."""
    unnamed = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return tuple(sorted({*tokenizer.all_special_tokens, *unnamed}, key=len, reverse=True))


@lru_cache(maxsize=16)
def _tag_tokens(tokenizer) -> tuple[str, ...]:
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    tags = filter(_LOOKS_LIKE_A_TAG.fullmatch, added)
    return tuple(sorted({*special_tokens(tokenizer), *tags}, key=len, reverse=True))


def listed(answer: Sequence[Passage] | str, clean: Callable[[str], str]) -> str:
    """The body of an observation: passages, one per line, or a tool's text; ``clean`` neutralizes foreign text."""
    if isinstance(answer, str):
        return clean(answer)

    def line(text: str) -> str:
        return " ".join(clean(" ".join(text.split())).split())

    return "".join(f"Doc {i}(Title: {line(p.title)}) {line(p.text)}\n" for i, p in enumerate(answer, 1))


def observation(
    tokenizer, answer: Sequence[Passage] | str, max_tokens: int, tools: Sequence[str] = ()
) -> tuple[str, tuple[int, ...]]:
    """Text and ids of an observation under ``tags``; see ``enclosed``. ``tools``: names of all tools."""
    body = listed(answer, lambda text: neutralize(tokenizer, text, tools=tools))
    return enclosed(tokenizer, INFORMATION_OPEN, body, INFORMATION_CLOSE, max_tokens)


def enclosed(tokenizer, opening: str, body: str, closing: str, max_tokens: int) -> tuple[str, tuple[int, ...]]:
    """Text and ids of ``body`` between ``opening`` and ``closing``, at most ``max_tokens`` ids.

    A text that is too long is cut at the end of the body; the closing is always whole and starts a line.

    Raises:
        ConfigError: opening and closing alone exceed ``max_tokens``.
    """
    room = min(len(body), _MAX_CHARS_PER_TOKEN * max_tokens)
    while True:
        own_line = body[:room].endswith("\n")
        text = opening + body[:room] + ("" if own_line else "\n") + closing
        with tokenizing(tokenizer):
            encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        excess = len(encoded["input_ids"]) - max_tokens
        if excess <= 0:
            return text, tuple(encoded["input_ids"])
        if room == 0:
            raise ConfigError(f"rollout.max_observation_tokens = {max_tokens} has no room for the tags alone; raise it")
        # Drop the characters of the body's last `excess` tokens and retry. The cut is usually within a line, which then needs a
        # newline: that costs one more token.
        ends = [end for _, end in encoded["offset_mapping"] if end - len(opening) <= room]
        room = max(0, min(room - 1, ends[-excess - 1] - len(opening) if len(ends) > excess else 0))
        if own_line and room and body[room - 1] != "\n" and len(ends) > excess + 1:
            room = max(0, min(room - 1, ends[-excess - 2] - len(opening)))


def passages_of(observation: str, opening: str = INFORMATION_OPEN, closing: str = INFORMATION_CLOSE) -> list[str] | None:
    """The passages in the text of an observation, each from ``Doc`` to its newline; ``None`` if there is no such block.

    The inverse of ``with_passages``.
    """
    if not (observation.startswith(opening) and observation.endswith(closing)):
        return None
    body = observation[len(opening) : len(observation) - len(closing)]
    return [piece for piece in _PASSAGE_START.split(body) if piece.strip()]


def with_passages(passages: Sequence[str], opening: str = INFORMATION_OPEN, closing: str = INFORMATION_CLOSE) -> str:
    """The text of an observation with ``passages``, each ending with a newline."""
    return opening + ("".join(passages) or "\n") + closing


def seen_passages(observation: str) -> list[str]:
    """The passages in the text of an observation of any protocol, for display."""
    return [line for line in observation.split("\n") if _PASSAGE_START.match(line)]


def split_passage(passage: str) -> tuple[str, str]:
    """``"Doc 1(Title: Bel) A city."`` -> ``("Bel", "A city.")``; the title is empty if the passage was cut within it."""
    head, closing, text = passage.partition(") ")
    return (head.partition("(Title: ")[2], text.strip()) if closing else ("", passage.strip())
