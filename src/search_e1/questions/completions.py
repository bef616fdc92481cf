"""Completions of prompts, by an endpoint or by a policy in this process; each is saved to disk as soon as it arrives."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ValidationError

from search_e1.config import PolicyConfig, Prompts
from search_e1.errors import ModelError
from search_e1.rollout.engines.base import Generation, Request
from search_e1.rollout.engines.endpoint import Endpoint, EndpointEngine
from search_e1.rollout.unfinished import Answers
from search_e1.runs import artifacts, sha256_text
from search_e1.runs.http import Reply
from search_e1.text.prompts import plain_prompt

_PROMPTS = Prompts(instruction="{question}")
Tell = Callable[[str], None]
_ENDPOINT_TOKENS = 1024
_POLICY_TOKENS = 192


@dataclass(slots=True)
class Costs:
    """Costs of this process."""

    requests: int = 0
    reused: int = 0
    """Replies reused from an interrupted call."""
    prompt_tokens: int = 0
    """As reported by the endpoint, if it does."""
    completion_tokens: int = 0


class Completer(Protocol):
    name: str
    costs: Costs

    def complete(self, prompts: Sequence[str], *, temperature: float, purpose: str, tell: Tell) -> list[str]:
        """The completion of each prompt, in order; empty if an endpoint refuses it. ``purpose`` is part of the seeds.

        Raises:
            EndpointError: the endpoint fails.
        """
        ...


@contextmanager
def open_endpoint(endpoint: Endpoint, answers: Answers, max_tokens: int | None, seed: int) -> Iterator["Completions"]:
    """
    Raises:
        ConfigError: the endpoint's URL is invalid, or the environment's API key cannot be sent.
    """
    engine = _Endpoint(endpoint)
    with engine.server:
        yield Completions(
            engine, _PROMPTS, f"endpoint {endpoint.model}", answers, max_tokens or _ENDPOINT_TOKENS, seed, engine.costs
        )


@contextmanager
def open_policy(policy: str, answers: Answers, max_tokens: int | None, seed: int) -> Iterator["Completions"]:
    """
    Raises:
        ModelError: the policy cannot be loaded.
    """
    from search_e1.rollout.engines.torch import TorchEngine
    from search_e1.training import policy as policies

    loaded = policies.load(policy, PolicyConfig(model=policy))
    engine = TorchEngine(loaded.model, loaded.tokenizer, batch_size=16)
    prompts = _PROMPTS.model_copy(update={"date": loaded.prompts.date})
    yield Completions(engine, prompts, f"policy {Path(policy).name}", answers, max_tokens or _POLICY_TOKENS, seed, Costs())


@dataclass
class Completions:
    """A ``Completer`` over an engine."""

    engine: Any
    prompts: Prompts
    name: str
    answers: Answers
    max_tokens: int
    seed: int
    costs: Costs = field(default_factory=Costs)

    def complete(self, prompts: Sequence[str], *, temperature: float, purpose: str, tell: Tell) -> list[str]:
        """See ``Completer``.

        Raises:
            ModelError: a prompt and ``max_tokens`` exceed the context.
        """
        if not prompts:
            return []
        rows = [plain_prompt(self.engine.tokenizer, self.prompts, prompt) for prompt in prompts]
        room = self.engine.context_length - self.max_tokens
        if too_long := next((len(row) for row in rows if len(row) > room), 0):
            raise ModelError(
                f"{self.name}: a prompt of {too_long} tokens and {self.max_tokens} new ones do not fit its context of "
                f"{self.engine.context_length}; shorten the passages, or lower --max-tokens"
            )
        replies: dict[int, str] = {}
        limit = max(map(len, rows)) + self.max_tokens
        with self.engine.session(temperature=temperature, stop=(), max_tokens=limit) as session:
            if keep := getattr(session, "keep", None):
                keep(self.answers)
            cache_keys = {}
            for key, prompt in enumerate(prompts):
                seed = artifacts.derived_seed(self.seed, purpose, prompt)
                cache_keys[key] = sha256_text(json.dumps([self.name, prompt, temperature, self.max_tokens, seed]))
                kept = None if keep else self.answers.get(cache_keys[key])
                if kept is not None:
                    replies[key] = kept.decode()
                    self.costs.reused += 1
                else:
                    session.submit(Request(key, rows[key], self.max_tokens, seed))
            while len(replies) < len(rows):
                for key, generation in session.step():
                    replies[key] = self._text(generation)
                    session.release(key)
                    if not keep:
                        self.answers.put(cache_keys[key], replies[key].encode())
                        self.costs.requests += 1
                        self.costs.prompt_tokens += len(rows[key])
                        self.costs.completion_tokens += len(generation.ids)
                tell(f"{purpose} {len(replies)}/{len(rows)}")
        return [replies[key] for key in range(len(rows))]

    def _text(self, generation: Generation) -> str:
        return "" if generation.stop else str(self.engine.tokenizer.decode(generation.ids, skip_special_tokens=True))


class _Usage(BaseModel):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Response(BaseModel):
    usage: _Usage | None = None


class _Endpoint(EndpointEngine):
    """An endpoint for plain text: no stop sequences, and no protocol tags."""

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__(endpoint, _PROMPTS)
        self.costs = Costs()

    def _payload(self, request: Request, temperature: float, stop: Sequence[str]) -> dict[str, Any]:
        payload = super()._payload(request, temperature, stop)
        del payload["stop"]  # some servers refuse an empty list
        return payload

    def _read(self, content: bytes, payload: dict[str, Any]) -> Generation:
        generation = super()._read(content, payload)
        self.costs.reused += 1
        return generation

    def _understood(self, reply: Reply, payload: dict[str, Any]) -> Generation:
        reused = self.costs.reused
        generation = super()._understood(reply, payload)
        self.costs.reused = reused
        self.costs.requests += 1
        try:
            usage = _Response.model_validate_json(reply.content).usage or _Usage()
        except ValidationError:
            usage = _Usage()
        self.costs.prompt_tokens += usage.prompt_tokens or 0
        self.costs.completion_tokens += usage.completion_tokens or 0
        return generation


def journal(out: Path) -> Path:
    """The file that holds the replies for ``out`` until it is complete."""
    return out.with_name(f".{out.name}.answers.jsonl")
