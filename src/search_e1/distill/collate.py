"""From a pair to what the model reads: the same response ids after the plain prompt and after the privileged one.

The position p of a row predicts its id p + 1. A row knows, for every id that enters the loss, the predicting position in
the student's ids and in the teacher's; the two lists belong together one by one, however long the prompts are.
"""

import itertools
from collections.abc import Sequence
from typing import Any, Literal, TypedDict

import torch

from search_e1.config import Prompts
from search_e1.errors import DataError
from search_e1.text.prompts import privileged_prompt
from search_e1.text.tokens import TokenClass, token_classes
from search_e1.types import Pair, Trajectory

Tokens = Literal["sampled", "acting"]


class Row(TypedDict):
    """A pair, or a reference to imitate, in ids. ``input_ids`` is the longest row, the teacher's where there is one: rows are
    batched by its length."""

    name: str
    number: int
    """Its place among the rows of a distillation, from 0."""
    input_ids: list[int]
    student_ids: list[int]
    teacher_positions: list[int]
    """Of the ids that enter the loss: where the teacher's row predicts them. None where there is no teacher."""
    student_positions: list[int]
    classes: list[TokenClass]
    """As long as the positions."""
    weight: float
    """Of all its positions, beside their classes'."""


def encode(
    tokenizer: Any,
    prompts: Prompts,
    pair: Pair,
    *,
    number: int = 0,
    context_length: int | None = None,
    tokens: Tokens = "sampled",
) -> Row:
    """The row of a pair. ``tokens="acting"`` leaves thoughts out of the loss, never anything else but observations.

    Raises:
        DataError: the teacher's row, or the student's, is longer than ``context_length``; see ``fits``.
    """
    student_prompt = pair.student.prompt_ids
    teacher_prompt = prompt_of_teacher(tokenizer, prompts, pair)
    response = pair.student.response_ids
    longest = max(len(student_prompt), len(teacher_prompt)) + len(response)
    if context_length is not None and longest > context_length:
        raise DataError(
            f"the pair of question {pair.question.id!r} takes {longest} tokens with the reference in the prompt, and the "
            f"policy's context holds {context_length}; leave the pair out, or use a policy with a longer context"
        )
    offsets, classes = _loss_tokens(tokenizer, prompts, pair.student, tokens)
    return Row(
        name=pair.question.id,
        number=number,
        input_ids=[*teacher_prompt, *response],
        student_ids=[*student_prompt, *response],
        teacher_positions=[len(teacher_prompt) + offset - 1 for offset in offsets],
        student_positions=[len(student_prompt) + offset - 1 for offset in offsets],
        classes=classes,
        weight=1.0,
    )


def encode_reference(
    tokenizer: Any, prompts: Prompts, pair: Pair, *, number: int = 0, tokens: Tokens = "sampled"
) -> Row:
    """The row in which the pair's reference stands under the plain prompt, to be imitated. It has no teacher."""
    prompt, response = pair.student.prompt_ids, pair.reference.response_ids
    offsets, classes = _loss_tokens(tokenizer, prompts, pair.reference, tokens)
    ids = [*prompt, *response]
    return Row(
        name=pair.question.id,
        number=number,
        input_ids=ids,
        student_ids=ids,
        teacher_positions=[],
        student_positions=[len(prompt) + offset - 1 for offset in offsets],
        classes=classes,
        weight=1.0,
    )


def _loss_tokens(
    tokenizer: Any, prompts: Prompts, trajectory: Trajectory, tokens: Tokens
) -> tuple[list[int], list[TokenClass]]:
    """Offsets into the response of the sampled ids that enter the loss, and their classes."""
    sampled = [offset for offset, mask in enumerate(trajectory.action_mask) if mask]
    classes = [kind for turn in trajectory.turns for kind in token_classes(tokenizer, turn, prompts)]
    chosen = [
        (offset, kind)
        for offset, kind in zip(sampled, classes, strict=True)
        if tokens == "sampled" or kind is not TokenClass.THOUGHT
    ]
    return [offset for offset, _ in chosen], [kind for _, kind in chosen]


def prompt_of_teacher(tokenizer: Any, prompts: Prompts, pair: Pair) -> tuple[int, ...]:
    """What the teacher reads before the response, here and when its lead is measured."""
    return privileged_prompt(tokenizer, prompts, pair.question.text, pair.shown)


def fits(tokenizer: Any, prompts: Prompts, pair: Pair, context_length: int) -> bool:
    """Whether ``encode`` takes the pair."""
    prompt = prompt_of_teacher(tokenizer, prompts, pair)
    return max(len(prompt), len(pair.student.prompt_ids)) + len(pair.student.response_ids) <= context_length


def collate(rows: Sequence[Row], pad_id: int) -> dict[str, torch.Tensor]:
    """A batch of B rows, padded on the right.

    Returns:
        For both roles (``student_``, ``teacher_``): ``input_ids`` and ``attention_mask`` [B, width], int64, and ``index``
        [N], int64: the predicting positions of all rows, into the flattened [B * width]; entry n of both predicts the
        same id. And ``pairs`` [B], int64: which rows they are. Rows without a teacher give the student's part alone.
    """
    batch = {"pairs": _numbers(rows)}
    for role, ids_of, positions_of in _roles(rows):
        width = max(map(len, ids_of))
        batch[f"{role}_input_ids"] = torch.tensor([ids + [pad_id] * (width - len(ids)) for ids in ids_of])
        batch[f"{role}_attention_mask"] = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in ids_of])
        batch[f"{role}_index"] = _flat(positions_of, [width] * len(rows))
    return batch


def pack(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """A batch of rows end to end, without padding.

    Returns:
        As ``collate``, with the total length T for width and B = 1; instead of ``attention_mask`` there is
        ``position_ids`` [1, T], int64, which begins again at 0 with each row: that is how transformers' attention tells
        where one sequence ends (``passes.packs`` says whether a model heeds it).
    """
    batch = {"pairs": _numbers(rows)}
    for role, ids_of, positions_of in _roles(rows):
        batch[f"{role}_input_ids"] = torch.tensor([[id for ids in ids_of for id in ids]])
        batch[f"{role}_position_ids"] = torch.tensor([[position for ids in ids_of for position in range(len(ids))]])
        batch[f"{role}_index"] = _flat(positions_of, [len(ids) for ids in ids_of])
    return batch


def _numbers(rows: Sequence[Row]) -> torch.Tensor:
    return torch.tensor([row["number"] for row in rows])


def _roles(rows: Sequence[Row]) -> tuple[tuple[str, list[list[int]], list[list[int]]], ...]:
    student = ("student", [r["student_ids"] for r in rows], [r["student_positions"] for r in rows])
    teacher = ("teacher", [r["input_ids"] for r in rows], [r["teacher_positions"] for r in rows])
    return (student, teacher) if any(teacher[2]) else (student,)


def _flat(positions_of: Sequence[Sequence[int]], widths: Sequence[int]) -> torch.Tensor:
    """Positions of rows that lie end to end, each as wide as its entry of ``widths``."""
    starts = itertools.accumulate(widths, initial=0)
    flat = [start + position for start, positions in zip(starts, positions_of, strict=False) for position in positions]
    return torch.tensor(flat, dtype=torch.long)


def pad_id(tokenizer: Any) -> int:
    """Any id does: attention is masked, and no position of the padding enters the loss."""
    return next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)


def context_length(model: Any) -> int:
    return model.config.get_text_config().max_position_embeddings
