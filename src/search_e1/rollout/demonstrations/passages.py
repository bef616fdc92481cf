"""Plans from annotated supporting passages.

Each supporting passage is retrieved by a query that is known at that point: a title named in the question or in an earlier
passage, or the question itself.
"""

import random
from collections.abc import Iterable, Mapping, Sequence

from search_e1.errors import DataError
from search_e1.rollout.demonstrations.hops import Hop, Plan, find_name, place_of
from search_e1.types import Passage, Question

_KEYS = ("gold_passage_ids", "answer_passage_ids")


def names_passages(question: Question) -> bool:
    """Whether the metadata of ``question`` names supporting passages."""
    return any(question.metadata.get(key) for key in _KEYS)


def named_passages(questions: Iterable[Question]) -> set[str]:
    """Ids of the supporting passages that ``questions`` name."""
    return {id for question in questions for key in _KEYS for id in question.metadata.get(key) or ()}


def plans(questions: Sequence[Question], passages: Mapping[str, Passage], *, seed: int = 0) -> list[Plan]:
    """The plans of the questions that name supporting passages; see ``plan``."""
    rng = random.Random(seed)
    return [planned for question in questions if (planned := plan(question, passages, rng))]


def plan(question: Question, passages: Mapping[str, Passage], rng: random.Random) -> Plan | None:
    """The plan of ``question`` by its ``metadata``; ``None`` if that names no supporting passage.

    Several ``gold_passage_ids`` are all required if the question has several hops, and alternatives if it has one.
    ``answer_passage_ids`` are always alternatives.

    Raises:
        DataError: a named passage is not in ``passages``.
    """
    gold, answering = (_named(question, key, passages) for key in _KEYS)
    if not gold and not answering:
        return None
    if gold and (question.hops or 1) > 1:
        hops = _chain(question.text, gold)
    else:
        alternatives = list({p.id: p for p in (*gold, *answering)}.values())
        names = [name for p in alternatives if (name := find_name(p.title, question.text))]
        hops = [_hop(tuple(alternatives), max(names, key=len, default=""), question.text)]
    return Plan.of(question, hops, rng)


def _named(question: Question, key: str, passages: Mapping[str, Passage]) -> list[Passage]:
    ids = list(dict.fromkeys(question.metadata.get(key) or ()))
    for id in ids:
        if id not in passages:
            raise DataError(
                f"question {question.id!r}: metadata.{key} names passage {id!r}, which data.corpus lacks; give the corpus "
                "that the questions belong to"
            )
    return [passages[id] for id in ids]


def _chain(question: str, gold: Sequence[Passage]) -> list[Hop]:
    """The hops in the order in which their titles become known."""
    known, rest, hops = [question], list(gold), []
    while rest:
        number = min(range(len(rest)), key=lambda i: _first_mention(rest[i].title, known))
        passage = rest.pop(number)
        name = next((n for text in known if (n := find_name(passage.title, text))), "")
        hops.append(_hop((passage,), name, question))
        known.append(passage.text)
    return hops


def _first_mention(title: str, texts: Sequence[str]) -> tuple[int, int]:
    for number, text in enumerate(texts):
        if (at := place_of(title, text)) is not None:
            return number, at
    return len(texts), 0


def _hop(passages: tuple[Passage, ...], name: str, question: str) -> Hop:
    return Hop(passages, name, (name, question, f"{name} {question}") if name else (question,))
