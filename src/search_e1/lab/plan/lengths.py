"""How long things are: assumed from the limits, or measured in an earlier run."""

import itertools
from pathlib import Path
from statistics import fmean

from pydantic import Field

from search_e1.config import Config
from search_e1.errors import RunError
from search_e1.rollout import pool
from search_e1.types import Group, Record

_PROMPT = 220  # tokens of Search-R1's instruction, a question and a chat template
_INSTRUCTION = 120  # tokens that the privileged prompt adds around the reference
_ACTION = 100  # a thought and a query, or a thought and an answer
_LONGEST = 3.0  # times the mean: the longest action among those sampled side by side
_SEARCHES = 2  # for a question, in Search-R1's and its successors' reports between 1 and 3
_PASSAGE = 150  # tokens of a wiki-18 passage, 100 words
_YIELD = 0.5  # questions of a pool that have a pair
_MOST = 1_000  # groups that are looked at


class Lengths(Record):
    """Means over trajectories, in tokens."""

    prompt: float = Field(gt=0)
    turns: float = Field(ge=1)
    """Actions of a trajectory."""
    action: float = Field(gt=0)
    longest_action: float = Field(gt=0)
    """The longest action among those that are sampled side by side: their stage ends with it."""
    observation: float = Field(ge=0)
    """After each action but the last."""
    reference: float = Field(ge=0)
    """What the privileged prompt adds to the plain one."""
    pair_yield: float = Field(gt=0)
    """Pairs for each question of a pool."""
    source: str
    """Where the figures are from."""

    @property
    def sampled(self) -> float:
        return self.turns * self.action

    @property
    def response(self) -> float:
        return self.sampled + (self.turns - 1) * self.observation

    @property
    def total(self) -> float:
        return self.prompt + self.response


def assumed(config: Config) -> Lengths:
    """What trajectories under the limits of ``config`` may be like; no more than the limits."""
    limits = config.rollout
    action = float(min(_ACTION, limits.max_action_tokens))
    observation = float(min(_PASSAGE * limits.topk, limits.max_observation_tokens))
    turns = 1.0 + min(_SEARCHES, limits.max_searches)
    prompt = min(_PROMPT, limits.max_tokens / 2)
    response = min(turns * action + (turns - 1) * observation, limits.max_tokens - prompt)
    return Lengths(
        prompt=prompt,
        turns=turns,
        action=action,
        longest_action=min(_LONGEST * action, limits.max_action_tokens),
        observation=observation,
        reference=response + _INSTRUCTION,
        pair_yield=_YIELD * config.pairs.students,
        source=f"assumed: {turns - 1:g} searches, {action:g} tokens an action, {observation:g} an observation",
    )


def measured(run: Path, config: Config) -> Lengths:
    """Those of the last pool in the run directory ``run``.

    Raises:
        RunError: there is no such run, or no pool in it.
        DataError: the pool is damaged.
    """
    if not run.is_dir():
        raise RunError(f"--like {run}: no such directory; give a run directory of `search-e1 train`")
    pools = sorted(run.glob(f"pool-*/{pool.FILE}"), key=lambda path: int(path.parent.name.split("-")[1]))
    if not pools:
        raise RunError(f"--like {run}: no pool in it; give a run that has sampled one, or leave --like out")
    found = pools[-1]
    groups = list(itertools.islice(pool.read(found), _MOST))
    trajectories = [t for group in groups for t in group.trajectories if t.turns]
    if not trajectories:
        raise RunError(f"--like {run}: {found} is empty; give a run that has sampled a pool")
    actions = [len(turn.action_ids) for t in trajectories for turn in t.turns]
    observed = [len(turn.observation_ids) for t in trajectories for turn in t.turns[:-1]]
    references = [len(t.response_ids) for t in trajectories if t.correct]
    side_by_side = max(1, config.rollout.batch_size)
    longest = [max(actions[at : at + side_by_side]) for at in range(0, len(actions), side_by_side)]
    return Lengths(
        prompt=fmean(len(t.prompt_ids) for t in trajectories),
        turns=fmean(len(t.turns) for t in trajectories),
        action=fmean(actions),
        longest_action=fmean(longest),
        observation=fmean(observed) if observed else 0.0,
        reference=(fmean(references) if references else 0.0) + _INSTRUCTION,
        pair_yield=max(0.01, fmean(_pairs(group, config.pairs.students) for group in groups)),
        source=f"measured: {len(trajectories):,} trajectories of {found.parent}",
    )


def _pairs(group: Group, students: int) -> int:
    """About as many as ``distill.pairs`` finds: a reference, and siblings that are wrong."""
    return min(students, sum(not t.correct for t in group.trajectories)) if group.reference else 0
