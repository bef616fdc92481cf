"""A stage's work without the runner: the inputs are given, and nothing is an artifact."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from conftest import PASSAGES, TinyRetriever
from search_e1.runs.context import StageContext
from search_e1.stages.distill import Distill
from search_e1.stages.grpo import Grpo
from search_e1.training.policy import Policy
from search_e1.types import Pair
from taught import LIMITS, QUESTIONS
from trained import config_of


def run_grpo(
    policy: Policy,
    out: Path,
    *,
    seed: int = 3,
    questions: Any = QUESTIONS,
    retriever: Any = None,
    context: Any = None,
    **sections: Any,
) -> dict[str, Any]:
    """GRPO of ``policy``, which is changed; its figures."""
    out.mkdir(exist_ok=True)
    config = config_of(out, **{"rollout": LIMITS.model_dump(), **sections})
    run = SimpleNamespace(
        config=config,
        train_questions=questions,
        retriever=retriever or TinyRetriever(PASSAGES),
        load_to_train=lambda *_, **__: policy,
    )
    stage = Grpo("start", 1)
    stage.check(run)
    return dict(stage.work(run, context or StageContext(out, seed=seed)))


def run_distill(
    policy: Policy,
    pairs: list[Pair],
    out: Path,
    *,
    seed: int = 1,
    context: Any = None,
    train_questions: Any = QUESTIONS,
    **distill: Any,
) -> dict[str, Any]:
    """Distillation of ``policy``, which is changed, on ``pairs``; its figures."""
    (out / "pairs").mkdir(parents=True, exist_ok=True)
    (out / "pairs" / "train.jsonl").write_text("".join(pair.model_dump_json() + "\n" for pair in pairs))
    run = SimpleNamespace(
        config=config_of(out, distill=distill, rollout=LIMITS.model_dump()),
        train_questions=train_questions,
        retriever=TinyRetriever(PASSAGES),
        load_to_train=lambda *_, **__: policy,
    )
    stage = Distill("start", out / "pairs", None, 1)
    stage.check(run)
    return dict(stage.work(run, context or StageContext(out, seed=seed)))
