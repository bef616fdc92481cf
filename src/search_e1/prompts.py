"""Everything the policy is told: instruction, privileged prompt, observations, corrections.

Prompts are ids. They are made here and nowhere else, so that GRPO, pools, distillation and evaluation see the same ones.
"""

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, field_validator

from search_e1.errors import ConfigError
from search_e1.types import Passage

SEARCH_CLOSE, ANSWER_CLOSE = "</search>", "</answer>"
STOP_STRINGS = (SEARCH_CLOSE, ANSWER_CLOSE)
INFORMATION_OPEN, INFORMATION_CLOSE = "\n\n<information>\n", "</information>\n\n"
CORRECTION = (
    "\nMy previous action is invalid. If I want to search, I should put the query between <search> and </search>. "
    "If I want to give the final answer, I should put the answer between <answer> and </answer>. Let me try again.\n"
)
_TAG = re.compile(r"<(/?\s*(?:think|search|information|answer)\s*)>", re.IGNORECASE)
_PASSAGE_START = re.compile(r"^(?=Doc \d+\(Title: )", re.MULTILINE)
_FILE = "search_e1.json"


class Prompts(BaseModel):
    """The templates a policy works under. They are saved with the policy, so that whoever loads it asks it the same way.

    The wording of ``instruction`` is Search-R1's. Search-E1 does not publish the wording of its privileged prompt.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    instruction: str = (
        "Answer the given question. You must conduct reasoning inside <think> and </think> first every time you get new "
        "information. After reasoning, if you find you lack some knowledge, you can call a search engine by <search> query "
        "</search> and it will return the top searched results between <information> and </information>. You can search as "
        "many times as your want. If you find no further external knowledge needed, you can directly provide the answer "
        "inside <answer> and </answer>, without detailed illustrations. For example, <answer> Beijing </answer>. "
        "Question: {question}\n"
    )
    """The user message; ``{question}`` is replaced."""
    privileged: str = (
        "{instruction}\nHere is how an expert solved this very question, with few searches:\n\n{reference}\n\n"
        "Solve the question yourself in the same format, reaching the answer as directly as the expert did.\n"
    )
    """The teacher's user message; ``{instruction}`` (with its question) and ``{reference}`` are replaced."""
    correction: str = CORRECTION
    """What a malformed action is answered with."""

    @field_validator("instruction")
    @classmethod
    def _has_question(cls, value: str) -> str:
        return _require(value, "{question}")

    @field_validator("privileged")
    @classmethod
    def _has_reference(cls, value: str) -> str:
        return _require(_require(value, "{instruction}"), "{reference}")

    @classmethod
    def of_policy(cls, directory: Path) -> Self:
        """The prompts saved beside a policy, or the defaults if it has none.

        Raises:
            ConfigError: the file is there but cannot be read.
        """
        path = directory / _FILE
        if not path.exists():
            return cls()
        try:
            return cls.model_validate(json.loads(path.read_text())["prompts"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}: not a prompts file ({str(error).splitlines()[0]})") from error

    def save(self, directory: Path) -> None:
        (directory / _FILE).write_text(json.dumps({"prompts": self.model_dump()}, indent=2) + "\n")


def _require(template: str, field: str) -> str:
    if field not in template:
        raise ValueError(f"the template lacks {field}")
    return template


def plain_prompt(tokenizer, prompts: Prompts, question: str) -> tuple[int, ...]:
    """Ids of the standard prompt: the student's, and everyone's but the teacher's."""
    return _encode_message(tokenizer, _instruction(tokenizer, prompts, question))


def privileged_prompt(tokenizer, prompts: Prompts, question: str, reference: str) -> tuple[int, ...]:
    """Ids of the teacher's prompt. ``reference`` is what ``privileged.show`` makes of the trajectory to show; if that is
    nothing, the prompt is the plain one."""
    if not reference:
        return plain_prompt(tokenizer, prompts, question)
    # `str.replace`, not `str.format`: references and questions are full of braces.
    message = prompts.privileged.replace("{instruction}", _instruction(tokenizer, prompts, question))
    return _encode_message(tokenizer, message.replace("{reference}", _break_special_tokens(tokenizer, reference)))


def _instruction(tokenizer, prompts: Prompts, question: str) -> str:
    return prompts.instruction.replace("{question}", neutralize(tokenizer, question))


def _encode_message(tokenizer, message: str) -> tuple[int, ...]:
    if tokenizer.chat_template:
        return tuple(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": message}], add_generation_prompt=True, tokenize=True, return_dict=False
            )
        )
    return tuple(tokenizer.encode(message))


def neutralize(tokenizer, text: str) -> str:
    """``text`` with protocol tags and the tokenizer's special tokens made harmless: ``<search>`` becomes ``(search)``."""
    return _break_special_tokens(tokenizer, _TAG.sub(r"(\1)", text))


def _break_special_tokens(tokenizer, text: str) -> str:
    for token in _special_tokens(tokenizer):
        if token in text:
            text = text.replace(token, f"({token.strip('<|>[]')})")
    return text


@lru_cache(maxsize=16)
def _special_tokens(tokenizer) -> tuple[str, ...]:
    """All that encoding turns into a special id: the named ones, and those that chat templates use without a name."""
    unnamed = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return tuple(sorted({*tokenizer.all_special_tokens, *unnamed}, key=len, reverse=True))


def observation(tokenizer, passages: Sequence[Passage], max_tokens: int) -> tuple[str, tuple[int, ...]]:
    """Text and ids of what a search is answered with, at most ``max_tokens`` ids.

    Too long a text is cut at the end of the passages; the closing tag is always whole.

    Raises:
        ConfigError: ``max_tokens`` has no room for the tags alone.
    """
    body = "".join(
        f"Doc {i}(Title: {neutralize(tokenizer, p.title)}) {neutralize(tokenizer, ' '.join(p.text.split()))}\n"
        for i, p in enumerate(passages, 1)
    )
    room = len(body)
    while True:
        text = INFORMATION_OPEN + body[:room] + ("" if body[:room].endswith("\n") else "\n") + INFORMATION_CLOSE
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        excess = len(encoded["input_ids"]) - max_tokens
        if excess <= 0:
            return text, tuple(encoded["input_ids"])
        if room == 0:
            raise ConfigError(f"rollout.max_observation_tokens = {max_tokens} has no room for the tags alone; raise it")
        # Give back as many characters of the body as its last `excess` tokens cover, and look again.
        ends = [end for _, end in encoded["offset_mapping"] if end - len(INFORMATION_OPEN) <= room]
        room = max(0, min(room - 1, ends[-excess - 1] - len(INFORMATION_OPEN) if len(ends) > excess else 0))


def passages_of(observation: str) -> list[str] | None:
    """The passages in the text of an observation, from ``Doc`` to the new line; ``None`` if it holds no information.

    The inverse is ``with_passages``.
    """
    if not (observation.startswith(INFORMATION_OPEN) and observation.endswith(INFORMATION_CLOSE)):
        return None
    body = observation[len(INFORMATION_OPEN) : -len(INFORMATION_CLOSE)]
    return [piece for piece in _PASSAGE_START.split(body) if piece.strip()]


def with_passages(passages: Sequence[str]) -> str:
    """The text of an observation that holds ``passages``, each with its new line."""
    return INFORMATION_OPEN + ("".join(passages) or "\n") + INFORMATION_CLOSE


def split_passage(passage: str) -> tuple[str, str]:
    """``"Doc 1(Title: Bel) A city."`` -> ``("Bel", "A city.")``; no title: a passage cut short within it."""
    head, closing, text = passage.partition(") ")
    return (head.partition("(Title: ")[2], text.strip()) if closing else ("", passage.strip())
