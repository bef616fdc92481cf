"""Pairs on disk: mines a pool's file for pairs, and reads them for lead measurement and training."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from search_e1.config import Config
from search_e1.errors import DataError
from search_e1.rollout import pool
from search_e1.rollout.demonstrations.file import Demonstrations
from search_e1.runs import read_records
from search_e1.selfdistill import pairs as mining
from search_e1.selfdistill.lead import hold_out
from search_e1.text.reference import RenderedReference, prompt_budget, render_reference
from search_e1.training.policy import Reader
from search_e1.types import Group, Pair, Question, Trajectory

TRAIN, HELD_OUT = "train.jsonl", "held_out.jsonl"
_CHECKED = 64
"""Groups or pairs of a file whose ids are decoded to check the tokenizer."""


def mine(pool_file: Path, reader: Reader, config: Config, *, seed: int, out: Path) -> dict[str, Any]:
    """Mine a pool for pairs that fit the context of ``reader``'s policy; write ``out / TRAIN`` and ``out / HELD_OUT``.

    Returns:
        ``PoolHealth``, train_pairs, held_out_pairs.

    Raises:
        DataError: the file is not a pool, or was sampled with another tokenizer; or the demonstrations are invalid.
    """

    def groups() -> Iterator[Group]:
        for number, group in enumerate(pool.read(pool_file)):
            if number < _CHECKED:
                check_tokenizer(reader.tokenizer, group.trajectories, pool_file)
            yield group

    def render(question: Question, reference: Trajectory, student: Trajectory) -> RenderedReference | None:
        response = len(student.response_ids)
        if len(student.prompt_ids) + response > reader.context_length:
            return None
        budget = prompt_budget(config.reference, reader.context_length, response)
        return render_reference(reader.tokenizer, reader.prompts, question.text, reference, config.reference, budget)

    by_gold, path = config.pairs.references_by == "gold", config.data.demonstrations
    gold = Demonstrations(path, reader.tokenizer, reader.prompts) if by_gold and path else None
    pairs, health = mining.select(groups(), config.pairs, render, seed=seed, gold=gold)
    parts = hold_out(pairs, config.lead, seed)
    for name, part in zip((TRAIN, HELD_OUT), parts, strict=True):
        with (out / name).open("w", encoding="utf-8") as file:
            file.writelines(pair.model_dump_json() + "\n" for pair in part)
    return {**health.model_dump(), "train_pairs": len(parts[0]), "held_out_pairs": len(parts[1])}


def read(path: Path, tokenizer: Any = None) -> list[Pair]:
    """The pairs of a file that ``mine`` wrote.

    Raises:
        DataError: the file is missing, a line is not a pair (named), or its ids are not those of ``tokenizer``, if given.
    """
    pairs = list(read_records(path, Pair, "make the pairs with `search-e1 pairs`"))
    if tokenizer is not None:
        check_tokenizer(tokenizer, (pair.student for pair in pairs[:_CHECKED]), path)
    return pairs


def check_tokenizer(tokenizer: Any, trajectories: Iterable[Trajectory], source: object) -> None:
    """Check that ``trajectories``, read from ``source``, were sampled with ``tokenizer``: their ids must decode to their text.

    Raises:
        DataError: the ids decode to another text.
    """
    for trajectory in trajectories:
        for turn in trajectory.turns:
            try:
                text = tokenizer.decode(turn.action_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            except (IndexError, KeyError, OverflowError, TypeError, ValueError):  # tokenizers reject unknown ids differently
                text = None
            if text != turn.action_text:
                raise DataError(
                    f"{source}: sampled with another tokenizer: the ids of question {trajectory.question_id!r} do not decode "
                    "to its text; give the policy that sampled them, or sample a new pool"
                )
