"""Greedy answers of a policy in training, by which a stage judges its own progress."""

from collections.abc import Iterator, Mapping, Sequence

from search_e1.rollout.engines.torch import TorchEngine
from search_e1.rollout.sampler import RolloutSampler
from search_e1.rollout.sharing import Part, write_parts
from search_e1.runs.context import StageContext
from search_e1.stages.inputs import Inputs
from search_e1.training.policy import Policy
from search_e1.training.trained import TrainedPolicy
from search_e1.types import Group, Question, Trajectory


def answer_greedily(
    run: Inputs, trained: TrainedPolicy, policy: Policy, questions: Sequence[Question], name: str, context: StageContext
) -> list[Trajectory]:
    """One greedy trajectory per question, in order; written to ``name`` in ``context.out`` and reused from there. All ranks
    must call it.

    Raises:
        Stopped: a signal asked to stop.
        RetrievalError: from the retriever.
    """
    config, path = run.config.rollout, context.out / name
    with trained.sampled() as model:
        engine = TorchEngine(model, policy.tokenizer, batch_size=config.batch_size)
        sampler = RolloutSampler(engine, run.retriever, policy.prompts, config, context.checkpointer)

        def make(chunk: Sequence[Question], _: Mapping[str, float]) -> tuple[Iterator[str], Mapping[str, float]]:
            groups = sampler.groups(chunk, 1, temperature=0.0, seed=context.seed)
            return (group.model_dump_json() for group in groups), {}

        write_parts(context.checkpointer, [Part(path, list(sampler.chunks(questions, 1)), make)])
    with path.open(encoding="utf-8") as lines:
        return [Group.model_validate_json(line).trajectories[0] for line in lines]
