"""Extra samples from a GRPO step's own groups: references to follow (replay), and siblings with a teacher's prompt."""

from collections.abc import Iterable, Sequence

from search_e1.config import ReferenceConfig, ReplayConfig
from search_e1.selfdistill.samples import classes_of
from search_e1.text.reference import prompt_budget, render_reference
from search_e1.training.policy import Policy
from search_e1.types import ActionKind, Group, Sample, Turn


def replay_samples(
    policy: Policy, groups: Iterable[Group], config: ReplayConfig, context_length: int, shown: ReferenceConfig
) -> list[Sample]:
    """At most ``config.examples_per_step`` samples, one per group, from the first groups that have a reference.

    GRPO trains only under the plain prompt, and a small policy forgets within tens of steps how to use a reference in its
    prompt. These samples, the reference's ids after its privileged prompt, prevent that. A sample that does not fit into
    ``context_length``, even shortened as ``shown`` allows, is left out.
    """
    samples: list[Sample] = []
    if shown.shows == "none":  # nothing to follow
        return samples
    for group in groups:
        if len(samples) == config.examples_per_step:
            break
        if group.reference is None:
            continue
        number = len(samples)
        # Spreads detours evenly: with a share of 0.5 every second sample has one.
        wants_detour = int((number + 1) * config.detours) > int(number * config.detours)
        detour = _detour(group) if wants_detour else ()
        off_track = tuple(i for turn in detour for i in turn.action_ids + turn.observation_ids)
        response = off_track + group.reference.response_ids
        budget = prompt_budget(shown, context_length, len(response))
        rendered = render_reference(policy.tokenizer, policy.prompts, group.question.text, group.reference, shown, budget)
        if rendered is None:
            continue
        samples.append(
            Sample(
                question_id=group.question.id,
                prompt_ids=rendered.prompt_ids,
                response_ids=response,
                action_mask=(0,) * len(off_track) + group.reference.action_mask,
            )
        )
    return samples


def _detour(group: Group) -> tuple[Turn, ...]:
    """The first turn of the first sibling that starts with a search that the reference does not make; else empty."""
    assert group.reference is not None
    needed = {turn.argument for turn in group.reference.turns if turn.kind is ActionKind.SEARCH}
    for sibling in group.trajectories:
        first = sibling.turns[0]
        if first.served and first.argument not in needed:
            return (first,)
    return ()


def taught_samples(
    policy: Policy,
    groups: Sequence[Group],
    context_length: int,
    shown: ReferenceConfig,
    classes: Sequence[str] = (),
) -> list[Sample | None]:
    """One sample per trajectory, with the prompt that shows its group's reference; ``None`` if it has no teacher.

    A trajectory has no teacher if its group has no reference, if it equals the reference, or if it does not fit into
    ``context_length`` with it. With ``classes`` only tokens of these classes have weight.
    """
    samples: list[Sample | None] = []
    for group in groups:
        reference = group.reference
        for trajectory in group.trajectories:
            if reference is None or trajectory == reference:
                samples.append(None)
                continue
            budget = prompt_budget(shown, context_length, len(trajectory.response_ids))
            rendered = render_reference(policy.tokenizer, policy.prompts, group.question.text, reference, shown, budget)
            if rendered is None:
                samples.append(None)
                continue
            weights = None
            if classes:
                kinds = iter(classes_of(policy.tokenizer, policy.prompts, trajectory))
                weights = tuple(float(next(kinds) in classes) if mask else 0.0 for mask in trajectory.action_mask)
            samples.append(
                Sample(
                    question_id=trajectory.question_id,
                    prompt_ids=trajectory.prompt_ids,
                    response_ids=trajectory.response_ids,
                    action_mask=trajectory.action_mask,
                    weights=weights,
                    teacher_prompt_ids=rendered.prompt_ids,
                )
            )
    return samples
