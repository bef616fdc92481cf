"""Train search agents by GRPO interleaved with offline self-distillation (Search-E1, arXiv:2605.22511).

The names below are the public API. They are loaded on first use, so that ``import search_e1`` is fast and needs neither torch
nor optional extras.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from search_e1.agent.agent import Agent
    from search_e1.config import Config, PolicyConfig, RolloutConfig
    from search_e1.config import load as load_config
    from search_e1.data.questions import load_questions
    from search_e1.evaluation.api import EvaluationResult, compare, evaluate, report
    from search_e1.evolve import Summary, train
    from search_e1.retrieval.base import Retriever
    from search_e1.retrieval.bm25 import Bm25Index
    from search_e1.retrieval.cache import CachedRetriever
    from search_e1.retrieval.client import HttpRetriever
    from search_e1.retrieval.dense import DenseIndex
    from search_e1.rollout.engines.base import Engine
    from search_e1.rollout.engines.torch import TorchEngine
    from search_e1.training.policy import Policy
    from search_e1.training.policy import load as load_policy
    from search_e1.types import Group, Pair, Passage, Question, Trajectory, Turn

_HOMES = {
    "Agent": "agent.agent",
    "Bm25Index": "retrieval.bm25",
    "CachedRetriever": "retrieval.cache",
    "Config": "config",
    "DenseIndex": "retrieval.dense",
    "Engine": "rollout.engines.base",
    "EvaluationResult": "evaluation.api",
    "Group": "types",
    "HttpRetriever": "retrieval.client",
    "Pair": "types",
    "Passage": "types",
    "Policy": "training.policy",
    "PolicyConfig": "config",
    "Question": "types",
    "Retriever": "retrieval.base",
    "RolloutConfig": "config",
    "Summary": "evolve",
    "TorchEngine": "rollout.engines.torch",
    "Trajectory": "types",
    "Turn": "types",
    "compare": "evaluation.api",
    "evaluate": "evaluation.api",
    "load_config": "config:load",
    "load_policy": "training.policy:load",
    "load_questions": "data.questions",
    "report": "evaluation.api",
    "train": "evolve",
}

__all__ = [
    "Agent",
    "Bm25Index",
    "CachedRetriever",
    "Config",
    "DenseIndex",
    "Engine",
    "EvaluationResult",
    "Group",
    "HttpRetriever",
    "Pair",
    "Passage",
    "Policy",
    "PolicyConfig",
    "Question",
    "Retriever",
    "RolloutConfig",
    "Summary",
    "TorchEngine",
    "Trajectory",
    "Turn",
    "compare",
    "evaluate",
    "load_config",
    "load_policy",
    "load_questions",
    "report",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("search-e1")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    return getattr(import_module(f"{__name__}.{module}"), attribute or name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
