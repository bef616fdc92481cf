"""GRPO: each step samples groups from the current policy and learns from their rewards."""

import logging
import random
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from search_e1.config import Config, GrpoConfig, ReferenceConfig, default_of
from search_e1.errors import ConfigError, DataError
from search_e1.rollout.loop import rollout
from search_e1.rollout.progress import StepRollouts
from search_e1.rollout.starts import Start, starts
from search_e1.rollout.unfinished import unfinished_in
from search_e1.runs import derived_seed, ranks
from search_e1.runs.context import StageContext
from search_e1.runs.stage_id import StageId
from search_e1.stages.inputs import Inputs
from search_e1.stages.kept import Groups, keeping
from search_e1.stages.replay import replay_samples, taught_samples
from search_e1.stages.stage import Stage, sections
from search_e1.stages.token_advantages import apply_correction, apply_evidence
from search_e1.stages.training_engine import check_training_engine, open_training_engine
from search_e1.training.fit import fit_passes
from search_e1.training.guard import Collapse, Guard
from search_e1.training.loop import Schedule, train
from search_e1.training.objectives import open_objective
from search_e1.training.objectives.base import Objective
from search_e1.training.objectives.gated import Gated
from search_e1.training.objectives.grpo import advantages, length_penalties
from search_e1.training.objectives.hindsight import Hindsight
from search_e1.training.objectives.sft import Sft
from search_e1.training.policy import Policy, with_adapter
from search_e1.training.record import ends, mean
from search_e1.training.trained import TrainedPolicy
from search_e1.types import Group, Question, Sample, Trajectory

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Grpo(Stage):
    """Trains ``policy`` for one round.

    Writes ``policy/``, ``steps.jsonl`` and, with ``grpo.keep_groups``, ``groups.jsonl``. Figures: steps, seconds, mean reward
    over the first and the last quarter of the steps, the share of groups with mixed rewards (only these have advantages),
    searches and sampled tokens per trajectory over the last quarter, and how often a pass was halved for lack of memory.
    ``stopped_early``, if the guard ended the stage: a ``Collapse``; the policy is then the best one before it.
    """

    policy: str | Path
    round: int

    @property
    def id(self) -> StageId:
        return StageId("grpo", self.round)

    def settings(self, config: Config) -> Mapping[str, Any]:
        unused = {} if config.grpo.shows_references else {"reference": default_of(("reference",))}
        return {**sections(config, "grpo", "rollout", "reference"), **unused}

    def inputs(self, run: Inputs) -> Mapping[str, str]:
        return run.sampled_on(self.policy)

    def check(self, run: Inputs) -> None:
        """
        Raises:
            ConfigError: an unknown objective, sizes that do not fit together, or an engine whose weights cannot be updated.
            DataError: two questions share an id.
        """
        check(run.config.grpo, run.train_questions)
        make_objectives(run.config)
        if run.config.grpo.steps:
            check_training_engine(run.config, self.policy, "GRPO")

    def work(self, run: Inputs, context: StageContext) -> Mapping[str, Any]:
        """
        Raises:
            RetrievalError: from the retriever.
        """
        config = run.config.grpo
        policy = run.load_to_train(self.policy, config.training, adapters=config.lora is not None)
        steps: list[dict[str, float]] = []
        collapse: Collapse | None = None
        if config.steps:
            model = with_adapter(policy.model, config.lora) if config.lora else policy.model
            objectives = make_objectives(run.config)
            needs_start = any(objective.needs_start for objective in objectives.values())
            sharding = run.config.parallel.sharding
            trained = TrainedPolicy(model, config.training, frozen_start=needs_start, sharding=sharding, dtype=policy.dtype)
            schedule = Schedule(config.steps, config.learning_rate, config.mini_batches, config.epochs)
            with ExitStack() as stack:
                kept = stack.enter_context(keeping(config.keep_groups, context))
                source = GroupSource(run, policy, trained, context, self.policy, kept, stack)
                guard = Guard(config.guard, config.questions_per_step)
                steps = train(trained, source, objectives, config.training, schedule, context, headline="reward", guard=guard)
                collapse = guard.collapsed(steps)
                if kept and collapse:
                    kept.add(collapse.kept, [])  # drops the groups sampled since
            policy.model = trained.finish()
        if ranks.is_first():
            policy.save(context.out / "policy")
            if collapse:
                logger.warning("%s", describe_collapse(str(self.id), collapse, config))
        return {**summarize(steps), **({"stopped_early": collapse.model_dump()} if collapse else {})}


def check(config: GrpoConfig, questions: Sequence[Question]) -> None:
    """Check that the questions suffice for a step and can be shared by the ranks.

    Raises:
        ConfigError: too few questions, or fewer questions per step than ranks.
        DataError: two questions share an id.
    """
    if len({question.id for question in questions}) < len(questions):
        raise DataError("two training questions have the same id; give each its own")
    if config.steps and len(questions) < config.questions_per_step:
        raise ConfigError(
            f"grpo.questions_per_step = {config.questions_per_step}, but there are {len(questions)} training questions; "
            "lower it"
        )
    if config.questions_per_step < ranks.count():
        raise ConfigError(
            f"grpo.questions_per_step = {config.questions_per_step} cannot be shared by {ranks.count()} processes; raise it, "
            "or start fewer"
        )


def make_objectives(config: Config) -> dict[str, Objective]:
    """The objectives of a GRPO step: the policy gradient, then the optional additions."""
    grpo = config.grpo
    objectives: dict[str, Objective] = {"grpo": open_objective(grpo.objective, "grpo.objective", config)}
    if grpo.hindsight.weight:
        objectives["hindsight"] = Hindsight(grpo.hindsight.weight, grpo.training.logits_mib)
    if grpo.gated.weight:
        objectives["gated"] = Gated(grpo.gated, grpo.temperature, grpo.training.logits_mib)
    if grpo.replay.examples_per_step and grpo.replay.weight:
        objectives["replay"] = Sft(grpo.replay.weight, grpo.training.logits_mib)
    return objectives


def question_order(questions: Sequence[Question], config: GrpoConfig, seed: int) -> list[Question]:
    """The questions of all steps: repeated passes over ``questions``, reshuffled each pass."""
    shuffler, count = random.Random(seed), config.steps * config.questions_per_step
    order: list[Question] = []
    while len(order) < count:
        order += shuffler.sample(list(questions), len(questions))
    return order[:count]


class GroupSource:
    """Samples this rank's share of a step's groups from the current policy."""

    def __init__(
        self,
        run: Inputs,
        policy: Policy,
        trained: TrainedPolicy,
        context: StageContext,
        path: str | Path,
        kept: Groups | None,
        stack: ExitStack,
    ) -> None:
        """``path``: the policy that an engine other than ``torch`` loads first; ``stack`` closes the engine."""
        self.figures: Mapping[str, float] = {}
        self._run, self._policy, self._trained, self._context, self._kept = run, policy, trained, context, kept
        self._config = run.config.grpo
        self._order = question_order(run.train_questions, self._config, context.seed)
        self._engine = stack.enter_context(open_training_engine(run.config, path, trained, policy.tokenizer))
        self._rollout_progress = StepRollouts(context.progress, self._config.steps)

    def next(self, step: int) -> Mapping[str, Sequence[Sample]]:
        config = self._config
        begin = step * config.questions_per_step
        places = range(begin, begin + config.questions_per_step)[ranks.rank() :: ranks.count()]
        groups = self._sample(step, [(place - begin, self._order[place]) for place in places])
        rewards = [self._rewards(group) for group in groups]
        ranks.meet(self._context.checkpointer.stop.leave)  # a rank that has sampled its groups stops while others still sample
        self.figures = _figures(groups, rewards, config)
        all_groups: list[Group] = []
        if config.replay.examples_per_step or config.keep_groups:
            all_groups = _interleaved(ranks.all_gather_object(groups))
            if self._kept and ranks.is_first():
                self._kept.add(step, all_groups)
        return self._samples(groups, rewards, all_groups)

    def _sample(self, step: int, questions: Sequence[tuple[int, Question]]) -> list[Group]:
        policy, size = self._policy, self._config.group_size
        begun: list[Start] = []
        for place, question in questions:
            (plain,) = starts(policy.tokenizer, policy.prompts, [question])
            begun += [replace(plain, sample=place * size + i) for i in range(size)]
        with self._engine.updated() as engine:
            trajectories = rollout(
                engine, self._run.retriever, begun, self._run.config.rollout,
                temperature=self._config.temperature, seed=derived_seed(self._context.seed, step), prompts=policy.prompts,
                unfinished=unfinished_in(self._context.checkpointer), on_trajectory=self._rollout_progress.of(step, len(begun)),
            )  # fmt: skip
        return [
            Group(question=question, trajectories=tuple(trajectories[i * size : (i + 1) * size]))
            for i, (_, question) in enumerate(questions)
        ]

    def _rewards(self, group: Group) -> list[float]:
        """The rewards that advantages are computed from: each trajectory's own, plus a length penalty if configured."""
        own = [trajectory.reward for trajectory in group.trajectories]
        if not self._config.length_penalty:
            return own
        penalties = length_penalties(group.trajectories, self._config.length_penalty)
        return [reward + penalty for reward, penalty in zip(own, penalties, strict=True)]

    def _samples(
        self, groups: Sequence[Group], rewards: Sequence[Sequence[float]], all_groups: Sequence[Group]
    ) -> dict[str, list[Sample]]:
        run, config, policy = self._run, self._config, self._policy
        context, shown = self._engine.context_length, run.config.reference

        def teach(shown: ReferenceConfig, classes: Sequence[str] = ()) -> list[Sample | None]:
            return taught_samples(policy, groups, context, shown, classes)

        samples: dict[str, list[Sample]] = {"grpo": []}
        for group, own in zip(groups, rewards, strict=True):
            gains = advantages(own, scaled=config.scale_advantages)
            for trajectory, gain in zip(group.trajectories, gains, strict=True):
                samples["grpo"].append(sample_of(trajectory, gain, reweighed=self._engine.reweighed))
        if config.hindsight.weight:
            samples["hindsight"] = [sample for sample in teach(shown, ("search",)) if sample]
        if config.gated.weight:
            samples["gated"] = [sample for sample in teach(shown) if sample]
        if config.replay.examples_per_step and config.replay.weight:
            replayed = replay_samples(policy, all_groups, config.replay, context, shown)
            samples["replay"] = replayed[ranks.rank() :: ranks.count()]
        if (config.evidence.strength or config.correction.strength) and not self._trained.fitted:
            fit_passes(self._trained, {**samples, "taught": [sample for sample in teach(shown) if sample]})
        if config.evidence.strength:
            samples["grpo"] = apply_evidence(self._trained, samples["grpo"], teach, shown, config.evidence)
        if config.correction.strength:
            samples["grpo"] = apply_correction(self._trained, samples["grpo"], teach, shown, config.correction)
        return samples


def sample_of(trajectory: Trajectory, advantage: float, *, reweighed: bool = False) -> Sample:
    """The GRPO sample of a trajectory; ``reweighed``: with the sampling log-probabilities, for importance weights."""
    response, logprobs = trajectory.response_ids, None
    if reweighed:
        rows = [(*(turn.sampling_logprobs or ()), *[0.0] * len(turn.observation_ids)) for turn in trajectory.turns]
        logprobs = tuple(value for row in rows for value in row)
    return Sample(
        question_id=trajectory.question_id,
        prompt_ids=trajectory.prompt_ids,
        response_ids=response,
        action_mask=trajectory.action_mask,
        advantages=(advantage,) * len(response),
        sampling_logprobs=logprobs,
    )


def _interleaved(parts: Sequence[Sequence[Group]]) -> list[Group]:
    """The step's groups in question order; rank r of n holds groups r, r + n, r + 2n, ..."""
    longest = max(map(len, parts))
    return [part[i] for i in range(longest) for part in parts if i < len(part)]


def _figures(groups: Sequence[Group], rewards: Sequence[Sequence[float]], config: GrpoConfig) -> dict[str, float]:
    """Means over the step's trajectories on all ranks."""
    trajectories = [t for group in groups for t in group.trajectories]
    sums = {
        "trajectories": float(len(trajectories)),
        "groups": float(len(groups)),
        "reward": sum(t.reward for t in trajectories),
        "searches": float(sum(t.searches for t in trajectories)),
        "sampled_tokens": float(sum(t.sampled_tokens for t in trajectories)),
        "answered": float(sum(t.answer is not None for t in trajectories)),
        "mixed": float(sum(max(own) - min(own) > 0 for own in rewards)),
        "shaped_reward": sum(map(sum, rewards)),
    }
    parts = ranks.all_gather_object(sums)
    totals = {name: sum(part[name] for part in parts) for name in sums}
    count, number = totals.pop("trajectories"), totals.pop("groups")
    figures = {name: value / (number if name == "mixed" else count) for name, value in totals.items()}
    if not config.length_penalty:
        del figures["shaped_reward"]
    return figures


def describe_collapse(stage: str, collapse: Collapse, config: GrpoConfig) -> str:
    """One line: step, figures, which policy is kept, and the remedy."""
    what = {"reward": "the mean reward", "answered": "the share of answered trajectories"}[collapse.figure]
    before = f"step {collapse.kept - 1}" if collapse.kept > 1 else "the beginning of the stage"
    return (
        f"{stage}: training collapsed and was stopped after step {collapse.step} of {config.steps}: {what} fell from "
        f"{collapse.best:.3f} (until step {collapse.best_step}) to {collapse.now:.3f}; the policy of {before} is kept as the "
        f"stage's result; lower grpo.learning_rate (now {config.learning_rate:g}) or set grpo.kl_coefficient, and raise "
        "grpo.questions_per_step if steps are noisy"
    )


def summarize(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The stage's figures; see ``Grpo``."""
    if not steps:
        return {"steps": 0}
    return {
        "steps": len(steps),
        "seconds": round(sum(step["seconds"] for step in steps), 3),
        **ends(steps, "reward", 0.25),
        "mixed": mean(steps, "mixed"),
        "searches_last": ends(steps, "searches", 0.25)["searches_last"],
        "sampled_tokens_last": ends(steps, "sampled_tokens", 0.25)["sampled_tokens_last"],
        "halved": sum(step.get("halved", 0) for step in steps),
    }
