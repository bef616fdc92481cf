"""Samples made of the groups that GRPO has sampled anyway: references to follow, and siblings with a teacher."""

import pytest

from search_e1.config import ReferenceConfig, ReplayConfig
from search_e1.stages.replay import replay_samples, taught_samples
from search_e1.text.prompts import privileged_prompt
from search_e1.training.policy import Policy
from search_e1.types import Group, Trajectory
from taught import HABITS, QUESTIONS, scripted, teach

WHOLE = ReferenceConfig()


@pytest.fixture(scope="module")
def taught() -> Policy:
    return teach()


def group_of(policy: Policy, *scripts: list[str], question: int = 0) -> Group:
    asked = QUESTIONS[question]
    return Group(question=asked, trajectories=tuple(scripted(policy, asked, list(scripts))))


def test_a_sample_shows_the_reference_and_asks_for_its_own_ids(taught):
    group = group_of(taught, HABITS[3], HABITS[1], HABITS[0], HABITS[2])
    reference = group.trajectories[3]  # correct without a search
    assert group.reference == reference
    (sample,) = replay_samples(taught, [group], ReplayConfig(examples_per_step=3, detours=0), 1024, WHOLE)
    assert sample.prompt_ids == privileged_prompt(taught.tokenizer, taught.prompts, QUESTIONS[0].text, "<answer>Bel</answer>")
    assert sample.response_ids == tuple(taught.tokenizer.encode("<answer>Bel</answer>"))
    assert sample.action_mask == (1,) * len(sample.response_ids)
    assert (sample.teacher_prompt_ids, sample.weights, sample.advantages) == (None, None, None)


def test_a_detour_precedes_the_reference_and_carries_no_loss(taught):
    group = group_of(taught, HABITS[0], HABITS[1])
    (sample,) = replay_samples(taught, [group], ReplayConfig(examples_per_step=1, detours=1), 1024, WHOLE)
    reference, sibling = group.trajectories
    detour = sibling.turns[0].action_ids + sibling.turns[0].observation_ids
    assert sample.response_ids == detour + reference.response_ids
    assert sample.action_mask == (0,) * len(detour) + reference.action_mask
    assert 0 in reference.action_mask


def test_detours_are_spread_evenly(taught):
    groups = [group_of(taught, HABITS[0], HABITS[1])] * 6
    plain = len(groups[0].reference.response_ids)

    def detours(share):
        made = replay_samples(taught, groups, ReplayConfig(examples_per_step=6, detours=share), 1024, WHOLE)
        return [len(sample.response_ids) > plain for sample in made]

    assert detours(0.5) == [False, True] * 3
    assert detours(1 / 3) == [False, False, True] * 2
    assert detours(0) == [False] * 6


def test_samples_are_as_many_as_asked_for_where_there_is_a_reference(taught):
    right, wrong = group_of(taught, HABITS[0]), group_of(taught, HABITS[1])

    def count(groups: list[Group], context_length: int = 1024, shown: ReferenceConfig = WHOLE, **config) -> int:
        return len(replay_samples(taught, groups, ReplayConfig(**config), context_length, shown))

    assert count([wrong, right, wrong, right, right], examples_per_step=2) == 2
    assert count([wrong, right], examples_per_step=2) == 1
    assert count([right], examples_per_step=0) == 0
    assert count([right], examples_per_step=1, context_length=100) == 0
    assert count([right], examples_per_step=1, shown=ReferenceConfig(shows="none")) == 0


def queries(policy: Policy, trajectory: Trajectory) -> list[int]:
    """Places of the ids inside <search>, for a tokenizer that has an id for each tag."""
    found, at = [], 0
    opened, closed = policy.tokenizer.convert_tokens_to_ids(["<search>", "</search>"])
    for turn in trajectory.turns:
        inside = False
        for place, one in enumerate(turn.action_ids, at):
            inside = inside and one != closed
            found += [place] * inside
            inside = inside or one == opened
        at += len(turn.action_ids) + len(turn.observation_ids)
    return found


def test_a_reference_and_groups_without_one_have_no_teacher(taught):
    right = group_of(taught, HABITS[0], HABITS[1], HABITS[0])
    wrong = group_of(taught, HABITS[0], HABITS[0], question=1)
    samples = taught_samples(taught, [right, wrong], 1024, WHOLE)
    assert [sample is None for sample in samples] == [True, False, True, True, True]  # what equals the reference too
    sibling = right.trajectories[1]
    assert samples[1].prompt_ids == sibling.prompt_ids
    assert samples[1].response_ids == sibling.response_ids
    assert samples[1].action_mask == sibling.action_mask
    assert samples[1].weights is None
    assert samples[1].teacher_prompt_ids == privileged_prompt(
        taught.tokenizer, taught.prompts, QUESTIONS[0].text, right.trajectories[0].text
    )
    assert taught_samples(taught, [right], 100, WHOLE) == [None] * 3


def test_of_a_class_only_its_tokens_have_weight(taught):
    group = group_of(taught, HABITS[2], HABITS[3], HABITS[1])

    def weighted(*classes):
        return [s and s.positions for s in taught_samples(taught, [group], 1024, WHOLE, classes=classes)]

    expected = [tuple(queries(taught, trajectory)) for trajectory in group.trajectories[1:]]
    assert weighted("search") == [None, *expected]
    text = [group.trajectories[1].response_ids[i] for i in expected[0]]
    assert taught.tokenizer.decode(text) == "EthArda"
    assert weighted("search", "answer", "tag", "thought")[1:] == [
        tuple(i for i, mask in enumerate(t.action_mask) if mask) for t in group.trajectories[1:]
    ]
    samples = taught_samples(taught, [group], 1024, WHOLE, classes=("search",))
    assert set(samples[1].weights) == {0.0, 1.0}
