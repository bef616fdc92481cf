"""Verification of teachers before distillation: each answers its question once and must follow its reference.

A policy never trained on references may keep searching past the reference's end and still be correct, since its prompt holds
the answer. A student without the reference then learns to search more than it needs, and gets worse.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from search_e1.errors import NoLeadError
from search_e1.rollout.engines.torch import TorchEngine
from search_e1.rollout.loop import rollout
from search_e1.rollout.sharing import Part, write_parts
from search_e1.rollout.starts import Start
from search_e1.rollout.unfinished import unfinished_in
from search_e1.runs.context import StageContext
from search_e1.selfdistill.lead import with_room
from search_e1.stages.inputs import Inputs
from search_e1.training.policy import Policy
from search_e1.training.trained import TrainedPolicy
from search_e1.types import Pair

FILE = "teachers.jsonl"


def verified(
    run: Inputs, trained: TrainedPolicy, policy: Policy, pairs: Sequence[Pair], context: StageContext
) -> tuple[list[Pair], Mapping[str, Any]]:
    """The pairs whose greedy teacher is correct with no more searches than its reference. All ranks must call it.

    Writes one line per question to ``teachers.jsonl``. ``trained`` must still hold the initial weights.

    Returns:
        Those pairs, in order, and figures: teachers sampled, correct, searching more than the reference, and verified.

    Raises:
        Stopped: a signal asked to stop.
        RetrievalError: from the retriever.
        NoLeadError: no pair is left.
    """
    limits, path = run.config.rollout, context.out / FILE
    distinct = list({pair.question.id: pair for pair in pairs}.values())
    roomier = with_room(limits, distinct)
    with trained.sampled() as model:
        engine = TorchEngine(model, policy.tokenizer, batch_size=limits.batch_size)

        def make(chunk: Sequence[Pair], _: Mapping[str, float]) -> tuple[Iterator[str], Mapping[str, float]]:
            trajectories = rollout(
                engine, run.retriever, [Start(pair.question, pair.teacher_prompt_ids) for pair in chunk], roomier,
                temperature=0.0, seed=context.seed, prompts=policy.prompts, unfinished=unfinished_in(context.checkpointer),
            )  # fmt: skip
            rows = (
                {"id": pair.question.id, "right": t.correct, "searches": t.searches, "reference": pair.reference.searches}
                for pair, t in zip(chunk, trajectories, strict=True)
            )
            return (json.dumps(row) for row in rows), {}

        chunks = [distinct[at : at + limits.batch_size] for at in range(0, len(distinct), limits.batch_size)]
        write_parts(context.checkpointer, [Part(path, chunks, make)])
    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    follow = {row["id"] for row in rows if row["right"] and row["searches"] <= row["reference"]}
    figures = {
        "teachers": len(rows),
        "teachers_right": sum(row["right"] for row in rows),
        "teachers_beyond": sum(row["searches"] > row["reference"] for row in rows),
        "teachers_verified": len(follow),
    }
    if rows and not follow:
        raise NoLeadError(
            f"none of {len(rows)} teachers follows its reference: {figures['teachers_right']} answer right, and "
            f"{figures['teachers_beyond']} search beyond it; edit prompts.privileged, or train the policy so that it follows a "
            "reference (grpo.replay)"
        )
    return [pair for pair in pairs if pair.question.id in follow], figures
