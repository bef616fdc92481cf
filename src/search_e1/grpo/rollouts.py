"""What TRL asks of a rollout: trajectories as ids and masks, and their rewards. Knows TRL's conventions, not TRL."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from search_e1.config import GrpoConfig, ReferenceConfig, RolloutConfig
from search_e1.grpo import brevity, replay
from search_e1.grpo.kept import Groups
from search_e1.retrieval.base import Retriever
from search_e1.rollout.loop import rollout, starts
from search_e1.runs import derived_seed, ranks
from search_e1.training.policy import Policy
from search_e1.types import Group, Question, Trajectory

if TYPE_CHECKING:
    from search_e1.grpo.trainer import Trainer


class Rollouts:
    """TRL's ``rollout_func``. Its prompts are question ids, each already repeated for the members of its group."""

    def __init__(
        self,
        policy: Policy,
        questions: Sequence[Question],
        retriever: Retriever,
        config: GrpoConfig,
        limits: RolloutConfig,
        shown: ReferenceConfig,
        seed: int,
    ) -> None:
        self.policy = policy
        self.questions = {question.id: question for question in questions}
        self.retriever = retriever
        self.config = config
        self.limits = limits
        self.shown = shown
        self.seed = seed
        self.kept: Groups | None = None
        """Where groups are kept, if they are."""

    def __call__(self, prompts: list[str], trainer: "Trainer") -> dict[str, Any]:
        policy, asked = self.policy, [self.questions[id] for id in dict.fromkeys(prompts)]
        first = trainer.accelerator.process_index * len(prompts)  # place in the step's trajectories, of all processes
        begin = {start.question.id: start for start in starts(policy.tokenizer, policy.prompts, asked)}
        with trainer.generator(self.limits.batch_size) as generator:
            trajectories = rollout(
                generator,
                self.retriever,
                [replace(begin[id], sample=first + i) for i, id in enumerate(prompts)],
                self.limits,
                temperature=self.config.temperature,
                seed=derived_seed(self.seed, trainer.state.global_step),
                prompts=policy.prompts,
            )
        groups = self._groups(trajectories)
        if self.kept:
            self.kept.add(trainer.state.global_step, groups)
        trainer.replay = replay.examples(
            policy.tokenizer, policy.prompts, groups, self.config.replay, generator.context_length, self.shown
        )
        if trainer.guidance.active:
            trainer.guidance.begin(
                policy.tokenizer, policy.prompts, groups, trajectories, generator.context_length, self.shown
            )
        return {
            "prompt_ids": [list(t.prompt_ids) for t in trajectories],
            "completion_ids": [list(t.response_ids) for t in trajectories],
            "env_mask": [list(t.action_mask) for t in trajectories],
            # Of an engine with arithmetic of its own: TRL corrects for what differs from the trainer's.
            "logprobs": _logprobs(trajectories) if trainer.use_vllm else None,
            "trajectory": trajectories,  # an extra field: TRL hands it to the reward function
        }

    def _groups(self, trajectories: Sequence[Trajectory]) -> list[Group]:
        """Of the whole step, in its order, if anyone asks: a rank has whole groups or parts of some."""
        if not (self.config.shows_references or self.config.keep_groups):
            return []
        found: dict[str, list[Trajectory]] = {}
        for trajectory in (t for part in ranks.gathered(list(trajectories)) for t in part):
            found.setdefault(trajectory.question_id, []).append(trajectory)
        return [Group(question=self.questions[id], trajectories=tuple(part)) for id, part in found.items()]


def exact_match(*, trajectory: list[Trajectory], log_metric: Callable[[str, float], None], **_: Any) -> list[float]:
    """TRL's reward function: what the rollout has scored already."""
    log_metric("searches", sum(t.searches for t in trajectory) / len(trajectory))
    log_metric("sampled_tokens", sum(t.sampled_tokens for t in trajectory) / len(trajectory))
    log_metric("answered", sum(t.answer is not None for t in trajectory) / len(trajectory))
    return [t.reward for t in trajectory]


def length_penalty(strength: float) -> Callable[..., list[float]]:
    """TRL's reward function for what length takes; a rank may have parts of groups only."""

    def length_penalty(*, trajectory: list[Trajectory], **_: Any) -> list[float]:
        parts = ranks.gathered(trajectory)
        found = brevity.penalties([t for part in parts for t in part], strength)
        first = sum(map(len, parts[: ranks.rank()]))
        return found[first : first + len(trajectory)]

    return length_penalty


def _logprobs(trajectories: Sequence[Trajectory]) -> list[list[float]]:
    """Those of sampling, a number for each id of each response; 0 for inserted ids, which TRL masks."""
    return [
        [
            logprob
            for turn in trajectory.turns
            for logprob in (*(turn.sampling_logprobs or ()), *[0.0] * len(turn.observation_ids))
        ]
        for trajectory in trajectories
    ]
