"""The agent's server for tests: a scripted agent, or a tiny policy, behind an address of its own."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conftest import PASSAGES, TINY_PROMPTS, TinyRetriever, make_tiny_policy
from scripted import ScriptedEngine
from search_e1.agent.agent import Agent
from search_e1.agent.bundle import Bundle
from search_e1.config import RolloutConfig
from search_e1.errors import RetrievalError
from search_e1.retrieval.bm25 import Bm25Index
from search_e1.types import Passage
from serving import serving_app

LIMITS = RolloutConfig(max_searches=3, topk=2, max_action_tokens=80, max_observation_tokens=300, max_tokens=1000, batch_size=4)
SCRIPT = {
    "Who is mayor?": [
        "<think> It is a city. </think><search> mayor of Bel </search>",
        "<think> So. </think><answer> Cor Dun </answer>",
    ],
    "Guess?": ["<answer> Gil Hor </answer>"],
    "Wait?": ["<search> wait </search>", "<answer> Cor Dun </answer>"],
    "Then wait?": ["<search> Bel </search>", "<search> wait </search>", "<answer> Cor Dun </answer>"],
    "Then break?": ["<search> Bel </search>", "<search> break </search>"],
    "Break?": ["<search> break </search>", "<answer> Cor Dun </answer>"],
}


class Gated(TinyRetriever):
    """Waits at a query `wait` until it is opened, and fails at `break`."""

    def __init__(self, passages: Sequence[Passage] = PASSAGES) -> None:
        super().__init__(passages)
        self.asked, self.opened = threading.Event(), threading.Event()

    def search(self, queries: Sequence[str], topk: int) -> list[list[Passage]]:
        if "break" in queries:
            raise RetrievalError("http://x: no passages after\n4 attempts")
        if "wait" in queries:
            self.asked.set()
            self.opened.wait(30)
        return super().search(queries, topk)


def scripted(retriever: TinyRetriever | None = None, limits: RolloutConfig = LIMITS) -> Agent:
    engine = ScriptedEngine(make_tiny_policy().tokenizer, SCRIPT)
    return Agent(engine, retriever or Gated(), limits, prompts=TINY_PROMPTS, name="tiny")


@contextmanager
def serving_agent(agent: Agent, *, key: str | None = None, origins: Sequence[str] = (), **limits: Any) -> Iterator[str]:
    """The URL of a server of ``agent``, which is closed with it."""
    from search_e1.agent import server

    settings = server.ServeSettings(**limits)
    with agent, serving_app(server.make_app(agent, settings, key=key, origins=origins), settings) as url:
        yield url


def make_bundle(directory: Path, passages: Sequence[Passage] = PASSAGES, **fields: Any) -> Path:
    """A bundle of the tiny policy and a BM25 index over ``passages``."""
    make_tiny_policy().save(directory)
    index = Bm25Index.build(passages, directory / "index")
    weights = {file.name: file.stat().st_size for file in directory.glob("*.safetensors")}
    told: dict[str, Any] = dict(
        name="tiny", dtype="float32", limits=LIMITS, policy="0" * 64, weights=weights, index=("index",),
        checksum=index.checksum, made_by="0", trained={},
    )  # fmt: skip
    Bundle(**told | fields).write(directory)
    return directory
