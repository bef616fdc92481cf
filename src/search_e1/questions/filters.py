"""Filters of drafts. A filter gives a reason to drop each draft; an empty reason keeps it."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from search_e1.data.answers import normalize_answer
from search_e1.questions.draft import Draft
from search_e1.questions.links import bare_title
from search_e1.retrieval.base import Retriever
from search_e1.rollout.demonstrations.hops import find_name

_WORDS = (4, 45)
"""Minimum and maximum words of a question."""
_ANSWER_WORDS, _ANSWER_CHARS = 10, 100
_REFERS = re.compile(
    r"\b(?:this|the|these|above|given|following|provided|first|second|both|two)\s+"
    r"(?:passages?|texts?|articles?|documents?|paragraphs?|excerpts?|contexts?)\b"
    r"|\bpassage [12]\b|\baccording to (?:it|them)\b|\bmentioned above\b",
    re.IGNORECASE,
)
_LEADING_NUMBER = re.compile(r"^\s*\d+[.)]\s")
_BATCH = 64  # queries per retriever call
_ALIKE = 0.8  # minimum Jaccard similarity of copies


@dataclass(frozen=True, slots=True)
class Filter:
    name: str
    reasons: Callable[[Sequence[Draft]], list[str]]
    """Maps drafts to reasons to drop them; empty: kept."""


def each(name: str, reason: Callable[[Draft], str]) -> Filter:
    return Filter(name, lambda drafts: [reason(draft) for draft in drafts])


def well_formed(draft: Draft) -> str:
    """Requires a self-contained question with a short answer that the question does not contain."""
    text, words = draft.text.strip(), len(draft.text.split())
    if not text.endswith("?") or _LEADING_NUMBER.match(text):
        return "no question mark at its end" if not text.endswith("?") else "a number before it"
    if not _WORDS[0] <= words <= _WORDS[1]:
        return f"{words} words"
    if _REFERS.search(text):
        return "refers to a passage"
    if any(len(a.split()) > _ANSWER_WORDS or len(a) > _ANSWER_CHARS for a in draft.answers):
        return "a long answer"
    if not any(map(normalize_answer, draft.answers)):
        return "no answer"
    question = f" {normalize_answer(text)} "
    given = (f" {normalize_answer(a)} " in question or find_name(a, text) for a in draft.answers)
    return "the answer is in the question" if any(given) else ""


def in_passage(draft: Draft) -> str:
    """Requires an answer to occur in the passage; with two passages, in the second."""
    last = draft.passages[-1]
    return "" if any(find_name(a, last.text) or a.casefold() in last.text.casefold() for a in draft.answers) else "not there"


def needs_both(draft: Draft) -> str:
    """For two hops: requires that the question does not name the second passage, and the first passage lacks the answer."""
    if draft.hops < 2:
        return ""
    if find_name(bare_title(draft.passages[1]), draft.text):
        return "names the second passage"
    return "the first passage has the answer" if any(find_name(a, draft.passages[0].text) for a in draft.answers) else ""


def found_within(retriever: Retriever, depth: int) -> Filter:
    """Requires the retriever to find each passage in its top ``depth``, with the draft's query for it.

    Raises:
        RetrievalError: from the retriever.
    """

    def reasons(drafts: Sequence[Draft]) -> list[str]:
        queries = list(dict.fromkeys(query for draft in drafts for query in draft.queries))
        found: dict[str, set[str]] = {}
        for at in range(0, len(queries), _BATCH):
            batch = queries[at : at + _BATCH]
            hits = retriever.search(batch, depth)
            found |= {query: {hit.id for hit in best} for query, best in zip(batch, hits, strict=True)}
        missed = (
            [p.title or p.id for p, query in zip(d.passages, d.queries, strict=True) if p.id not in found[query]]
            for d in drafts
        )
        return [f"{titles[0]} not found" if titles else "" for titles in missed]

    return Filter(f"found within {depth}", reasons)


class Copies:
    """Drops near-copies of earlier drafts, by the Jaccard similarity of their normalized words.

    Two sets with Jaccard similarity j share a word among the first (1 - j) * size + 1 of each in any fixed order (prefix
    filtering, Chaudhuri et al. 2006), so that few drafts are compared. Long words come first, since they are rare.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[frozenset[str], str]] = []
        self._by_word: dict[str, list[int]] = defaultdict(list)

    def __call__(self, draft: Draft) -> str:
        words = frozenset(normalize_answer(draft.text).split())
        order = sorted(words, key=lambda word: (-len(word), word))
        prefix = order[: int((1 - _ALIKE) * len(order) + 1e-9) + 1]
        for other in dict.fromkeys(number for word in prefix for number in self._by_word[word]):
            there, text = self._seen[other]
            if jaccard(words, there) >= _ALIKE:
                return f"like {text!r}"
        for word in prefix:
            self._by_word[word].append(len(self._seen))
        self._seen.append((words, draft.text))
        return ""


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    return len(a & b) / len(a | b) if a or b else 1.0


def count_usable(drafts: Iterable[Draft]) -> int:
    """The number of well-formed drafts."""
    return sum(not well_formed(draft) for draft in drafts)
