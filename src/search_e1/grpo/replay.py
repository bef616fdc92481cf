"""Examples of following a reference, made of the groups that a GRPO step has sampled anyway.

GRPO trains the plain prompt alone, and a small policy forgets within some tens of steps what to do with a reference in its
prompt. Such examples keep that alive without a teacher, without gold answers and without further sampling.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from search_e1.config import WHOLE, Prompts, ReferenceConfig, ReplayConfig
from search_e1.text.prompts import privileged_prompt
from search_e1.text.reference import room, show
from search_e1.types import ActionKind, Group, Turn


@dataclass(frozen=True, slots=True)
class Example:
    """What the policy should do when it sees a reference."""

    prompt_ids: tuple[int, ...]
    """The privileged prompt."""
    response_ids: tuple[int, ...]
    loss_mask: tuple[int, ...]
    """As long as ``response_ids``: 1 where the reference's sampled ids stand."""

    def silent(self) -> "Example":
        """The same, of which nothing is learnt."""
        return replace(self, loss_mask=(0,) * len(self.loss_mask))


def examples(
    tokenizer: Any,
    prompts: Prompts,
    groups: Iterable[Group],
    config: ReplayConfig,
    context_length: int,
    shown: ReferenceConfig = WHOLE,
) -> list[Example]:
    """At most ``config.examples_per_step`` examples, at most one a group, of the first groups that have a reference.

    An example that does not fit into ``context_length``, shortened as ``shown`` says, is left out. None are made where
    ``shown`` shows nothing that could be followed.
    """
    made: list[Example] = []
    if not config.weight or shown.shows == "none":
        return made
    for group in groups:
        if len(made) == config.examples_per_step:
            break
        if group.reference is None:
            continue
        number = len(made)
        # Spreads the detours evenly: with a share of 0.5 every second example has one.
        wants_detour = int((number + 1) * config.detours) > int(number * config.detours)
        detour = _detour(group) if wants_detour else ()
        off_track = tuple(i for turn in detour for i in turn.action_ids + turn.observation_ids)
        response = off_track + group.reference.response_ids
        left = room(shown, context_length, len(response))
        text = show(tokenizer, prompts, group.question.text, group.reference, shown, left)
        if text is None:
            continue
        made.append(
            Example(
                prompt_ids=privileged_prompt(tokenizer, prompts, group.question.text, text.text),
                response_ids=response,
                loss_mask=(0,) * len(off_track) + group.reference.action_mask,
            )
        )
    return made


def _detour(group: Group) -> tuple[Turn, ...]:
    """The first search of the first sibling that begins with one that the reference did without."""
    assert group.reference is not None
    needed = {turn.argument for turn in group.reference.turns if turn.kind is ActionKind.SEARCH}
    for sibling in group.trajectories:
        first = sibling.turns[0]
        if first.served and first.argument not in needed:
            return (first,)
    return ()


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded examples: prompts on the left, responses on the right. Long tensors of shape [examples, width]."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    loss_mask: torch.Tensor
    """[examples, response width]"""


def collate(batch: Sequence[Example], pad_id: int, device: torch.device) -> Batch:
    def padded(rows: Iterable[Sequence[int]], value: int, side: str) -> torch.Tensor:
        tensors = [torch.tensor(row, dtype=torch.long, device=device) for row in rows]
        return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)

    prompts, responses = [e.prompt_ids for e in batch], [e.response_ids for e in batch]
    return Batch(
        input_ids=torch.cat([padded(prompts, pad_id, "left"), padded(responses, pad_id, "right")], 1),
        attention_mask=torch.cat(
            [padded([[1] * len(p) for p in prompts], 0, "left"), padded([[1] * len(r) for r in responses], 0, "right")],
            1,
        ),
        loss_mask=padded([e.loss_mask for e in batch], 0, "right"),
    )
