"""A judge behind an OpenAI-compatible endpoint: its verdict is one word, correct or incorrect, cached on disk."""

import json
import logging
import os
import re
from concurrent.futures import Future
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from search_e1.config.rewards import JudgeConfig
from search_e1.data.answers import exact_match
from search_e1.errors import ConfigError, EndpointError
from search_e1.rollout.engines.remote import api_url, key_headers, not_an_answer, refusal
from search_e1.runs import sha256_text
from search_e1.runs.files import append, summed_entries, summed_line
from search_e1.runs.http import Reply, Server, TransientError
from search_e1.types import Question

logger = logging.getLogger(__name__)
_VERDICTS = {"correct": 1.0, "incorrect": 0.0}
_THOUGHT = re.compile(r"\s*<think>.*?</think>", re.DOTALL)
_FIELD = re.compile(r"\{(question|golds|answer)\}")
_RESPONSE_BYTES = 2**20
_FINAL = ("length", "content_filter")
"""Reasons to finish that asking again does not change."""
_CHECK = "rollout.rewards.judge.url, rollout.rewards.judge.model"


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Usage(BaseModel):
    total_tokens: int | None = None


class _Completion(BaseModel):
    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None


class Judge:
    """Requests one verdict per question and answer. An exact match is correct without a request."""

    def __init__(self, config: JudgeConfig) -> None:
        """
        Raises:
            ConfigError: the URL is invalid, the API key cannot be sent, or the cache's directory does not exist.
        """
        self._config, self._cache = config, Path(config.cache)
        if not self._cache.parent.is_dir():
            raise ConfigError(f"rollout.rewards.judge.cache = {config.cache!r}: no such directory; make it, or name another")
        url = api_url(config.url, "rollout.rewards.judge.url", "/chat/completions")
        self._path = url.path
        self._server = Server(
            url, EndpointError, what="verdict", timeout=config.timeout, time_limit=config.time_limit,
            most_bytes=_RESPONSE_BYTES, concurrency=config.concurrency, attempts=None, headers=key_headers(),
        )  # fmt: skip
        self._verdicts = _read(self._cache)
        self._under_way: dict[str, Future[float]] = {}
        self.requests = self.tokens = self.cached = 0
        self._last_logged = 0

    def begin(self, answer: str, question: Question) -> None:
        """Request the verdict on ``answer``, unless it is known or already requested."""
        if exact_match(answer, question.answers):
            return
        payload, key = self._payload(answer, question)
        if key in self._verdicts:
            self.cached += key not in self._under_way
        elif key not in self._under_way:
            self._under_way[key] = self._server.submit(self._ask(payload, key))

    def ready(self, answer: str, question: Question) -> bool:
        """Whether ``verdict`` would not wait."""
        if exact_match(answer, question.answers):
            return True
        _, key = self._payload(answer, question)
        return key in self._verdicts or (key in self._under_way and self._under_way[key].done())

    def verdict(self, answer: str, question: Question) -> float:
        """1.0 if ``answer`` is correct, else 0.0.

        Raises:
            EndpointError: the judge did not answer, or its answer is not a verdict.
        """
        if exact_match(answer, question.answers):
            return 1.0
        _, key = self._payload(answer, question)
        if key not in self._verdicts:
            self.begin(answer, question)
            self._verdicts[key] = self._under_way[key].result()
        return self._verdicts[key]

    def tell(self, *, seldom: bool) -> None:
        """Log the requests so far if there are new ones; ``seldom``: only if they have doubled."""
        if self.requests > self._last_logged and (not seldom or self.requests >= 2 * self._last_logged):
            self._last_logged = self.requests
            logger.info("judge %s: %s", self._config.model, self)

    def __str__(self) -> str:
        return f"{self.requests:,} requests, {self.tokens:,} tokens, {self.cached:,} verdicts from {self._config.cache}"

    def _payload(self, answer: str, question: Question) -> tuple[dict[str, Any], str]:
        fields = {"question": question.text, "golds": list(question.answers), "answer": answer}
        prompt = _FIELD.sub(lambda found: json.dumps(fields[found[1]], ensure_ascii=False), self._config.prompt)
        payload = {
            "model": self._config.model, "messages": [{"role": "user", "content": prompt}], "temperature": 0.0,
            "max_tokens": self._config.max_tokens,
        }  # fmt: skip
        return payload, sha256_text(json.dumps(payload, sort_keys=True))

    async def _ask(self, payload: dict[str, Any], key: str) -> float:
        verdict = await self._server.ask(self._read, payload, early=not self.requests)
        append(self._cache, summed_line(json.dumps({"key": key, "verdict": verdict})).encode())
        return verdict

    def _read(self, reply: Reply) -> float:
        if not reply.ok:
            raise refusal(reply, self._server.shown, _CHECK)
        try:
            completion = _Completion.model_validate_json(reply.content)
        except ValidationError as error:
            raise not_an_answer(reply, self._path) from error
        self.requests += 1
        self.tokens += (completion.usage and completion.usage.total_tokens) or 0
        choice = completion.choices[0]
        if choice.message.content is None and not choice.message.refusal and choice.finish_reason not in _FINAL:
            raise TransientError("an answer without content")
        said = choice.message.content or choice.message.refusal or ""
        word = _THOUGHT.sub("", said, count=1).strip().rstrip(".").lower()
        if word not in _VERDICTS:
            ended = f" (finish_reason {choice.finish_reason})" if choice.finish_reason not in (None, "stop") else ""
            raise EndpointError(
                f"{self._server.shown}: the judge said {self._server.hide(said[:80])!r}{ended} instead of correct or "
                "incorrect; edit rollout.rewards.judge.prompt, raise its max_tokens, or name another model"
            )
        return _VERDICTS[word]


def _read(path: Path) -> dict[str, float]:
    """The verdicts of a cache file. Truncates it after the last intact line, so that new lines are not joined to a cut one."""
    entries = summed_entries(path)
    sound = "".join(map(summed_line, entries)).encode()
    if path.is_file() and path.stat().st_size > len(sound):
        logger.warning("%s: damaged after %d verdicts; the others are requested again", path, len(entries))
        os.truncate(path, len(sound))
    rows = map(json.loads, entries)
    return {row["key"]: row["verdict"] for row in rows}


@cache
def open_judge(config: JudgeConfig) -> Judge:
    """The judge for ``config``, one per process, so that parts of a run share its verdicts.

    Raises:
        ConfigError: see ``Judge``.
    """
    return Judge(config)
