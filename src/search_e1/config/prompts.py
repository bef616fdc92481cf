"""Prompt templates of a policy: instruction, privileged prompt, and correction."""

import datetime
import json
import re
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from search_e1.errors import ConfigError

ProtocolName = Literal["tags", "tools"]

CORRECTION = (
    "\nMy previous action is invalid. If I want to search, I should put the query between <search> and </search>. "
    "If I want to give the final answer, I should put the answer between <answer> and </answer>. Let me try again.\n"
)
_FILE = "search_e1.json"
_OF_TOOLS = {
    "instruction": (
        "Answer the given question. If you lack some knowledge, call the search tool with a query, once a turn; you can "
        "search as many times as you want. When no further knowledge is needed, give the final answer between <answer> and "
        "</answer>, without detailed illustrations. For example, <answer> Beijing </answer>. Question: {question}\n"
    ),
    "correction": (
        "Not a valid call. To search, call the tool `search` once, with a JSON object of one key, `query`. "
        "To finish, give the final answer between <answer> and </answer>."
    ),
}
"""Defaults that differ under ``protocol = "tools"``."""


class Prompts(BaseModel):
    """Prompt templates of a policy, saved with it so that it is always prompted the same way.

    The wording of ``instruction`` is Search-R1's. Search-E1 does not publish the wording of its privileged prompt.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    protocol: ProtocolName = "tags"
    """How a policy searches: with Search-R1's `<search>` and `<information>` tags, or with tool calls in the format of its chat
    template. `tools` has its own defaults for `instruction` and `correction`."""
    tools: tuple[str, ...] = ("search",)
    """Tools of the policy: `search`; `open`, which shows a whole passage; or your own, `module:attribute`."""
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
    """The observation after a malformed action."""
    date: datetime.date | None = None
    """Date for chat templates that state the current date, e.g. `2025-11-28`. Default: the day on which the run began; its
    policies keep that date."""

    @field_validator("date", mode="before")
    @classmethod
    def _is_date(cls, value: Any) -> Any:
        if isinstance(value, str) and re.fullmatch(r"\d{4}-\d\d-\d\d", value):
            return datetime.date.fromisoformat(value)
        if not isinstance(value, datetime.date | None) or isinstance(value, datetime.datetime):
            raise ValueError("no date; write YYYY-MM-DD")  # pydantic would read a number, also as text, as seconds
        return value

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, given: Any) -> Any:
        return {**_OF_TOOLS, **given} if isinstance(given, dict) and given.get("protocol") == "tools" else given

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
        """The prompts saved with a policy, or the defaults if none are.

        Raises:
            ConfigError: the file exists but cannot be read.
        """
        path = directory / _FILE
        if not path.exists():
            return cls()
        try:
            return cls.model_validate(json.loads(path.read_text(encoding="utf-8-sig"))["prompts"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ConfigError(f"{path}: not a prompts file ({str(error).splitlines()[0]})") from None
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror}); fix or remove it") from None

    @staticmethod
    def saved_in(directory: Path) -> bool:
        """Whether ``directory`` holds the prompts of a policy."""
        return (directory / _FILE).exists()

    def save(self, directory: Path) -> None:
        dumped = self.model_dump(mode="json", exclude_none=True)
        (directory / _FILE).write_text(json.dumps({"prompts": dumped}, indent=2) + "\n")


def _require(template: str, field: str) -> str:
    if field not in template:
        raise ValueError(f"the template lacks {field}")
    return template
