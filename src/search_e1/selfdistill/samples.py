"""Converts pairs to samples for distillation and for fine-tuning on references."""

from collections.abc import Mapping, Sequence
from typing import Any

from search_e1.config import Mask, Prompts
from search_e1.selfdistill.knowable import knowable_tokens
from search_e1.text.tokens import TokenClass, token_classes
from search_e1.types import Pair, Sample, Trajectory


def classes_of(tokenizer: Any, prompts: Prompts, trajectory: Trajectory) -> list[TokenClass]:
    """The class of each sampled token of a trajectory."""
    return [kind for turn in trajectory.turns for kind in token_classes(tokenizer, turn, prompts)]


def weights_of(trajectory: Trajectory, classes: Sequence[TokenClass], weights: Mapping[str, float]) -> tuple[float, ...]:
    """The weight of each response token by its class; 0 for inserted tokens."""
    own = iter(classes)
    return tuple(weights[next(own)] if mask else 0.0 for mask in trajectory.action_mask)


def sample_of(
    pair: Pair, classes: Sequence[TokenClass], weights: Mapping[str, float] | None = None, mask: Mask = "none"
) -> Sample:
    """The student's response with the plain prompt, and the teacher's privileged prompt.

    ``mask``: which tokens get no weight where the student could not know the teacher's next step; see ``knowable_tokens``.
    """
    token_weights = weights_of(pair.student, classes, weights) if weights else None
    if mask != "none":
        kept = iter(knowable_tokens(pair, classes, mask))
        token_weights = tuple(
            weight * next(kept) if sampled else 0.0
            for weight, sampled in zip(token_weights or pair.student.action_mask, pair.student.action_mask, strict=True)
        )
    return Sample(
        question_id=pair.question.id,
        prompt_ids=pair.student.prompt_ids,
        response_ids=pair.student.response_ids,
        action_mask=pair.student.action_mask,
        weights=token_weights,
        teacher_prompt_ids=pair.teacher_prompt_ids,
    )


def reference_sample_of(pair: Pair, classes: Sequence[TokenClass], weights: Mapping[str, float]) -> Sample:
    """The reference with the plain prompt, for fine-tuning."""
    return Sample(
        question_id=pair.question.id,
        prompt_ids=pair.student.prompt_ids,
        response_ids=pair.reference.response_ids,
        action_mask=pair.reference.action_mask,
        weights=weights_of(pair.reference, classes, weights),
    )
