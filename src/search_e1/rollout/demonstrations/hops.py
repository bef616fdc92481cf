"""Generates demonstrations: a search for each passage that a question needs, and thoughts that quote the passages."""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from search_e1.data.answers import exact_match
from search_e1.rollout.demonstrations.forms import Lesson
from search_e1.rollout.demonstrations.writer import Writer, detours
from search_e1.runs.progress import Progress, silent
from search_e1.text.prompts import neutralize
from search_e1.types import Passage, Question, Turn

YES_NO = frozenset({"yes", "no"})
_QUOTE_WORDS = 3  # quoted before the target; where a longer quote should begin would be a guess
_OPENING_WORDS = 4  # quoted from a passage that contains neither the answer nor the next title
_FINAL_PARENTHESIS = re.compile(r"\s*\([^()]*\)$")
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Hop:
    """A required search: any of ``passages`` satisfies it; ``queries`` are tried in order."""

    passages: tuple[Passage, ...]
    name: str
    """The entity to search for, as written in the question or an earlier passage; empty if the question is the query."""
    queries: tuple[str, ...]

    @property
    def ids(self) -> frozenset[str]:
        return frozenset(passage.id for passage in self.passages)


@dataclass(frozen=True, slots=True)
class Plan:
    """The searches that answer a question."""

    question: Question
    hops: tuple[Hop, ...]
    detours: tuple[str, ...]

    @classmethod
    def of(cls, question: Question, hops: Sequence[Hop], rng: random.Random) -> "Plan":
        return cls(question, tuple(hops), detours(question.text, rng))


def find_name(name: str, text: str) -> str:
    """``name`` as it is written in ``text``, ignoring case and a final parenthesis; empty if it does not occur."""
    bare, at = _bare(name), place_of(name, text)
    return "" if at is None else text[at : at + len(bare)]


def place_of(name: str, text: str) -> int | None:
    """Offset at which ``find_name`` finds ``name``; ``None`` if it does not occur."""
    bare = _bare(name)
    lower = text.lower()
    if len(lower) != len(text):  # offsets would shift; capitals whose lower case is longer are rare
        lower = "".join(c if len(c.lower()) != 1 else c.lower() for c in text)
    return next(_places(bare.lower(), lower), None) if len(bare) > 1 else None


def _bare(name: str) -> str:
    return _FINAL_PARENTHESIS.sub("", name).strip()


def _places(words: str, text: str) -> Iterator[int]:
    """Offsets at which ``words`` occur in ``text`` as whole words. Compiling a regex for each name would be slow."""
    at = text.find(words)
    while at >= 0:
        around = text[at - 1 : at] + text[at + len(words) : at + len(words) + 1]
        if not any(c.isalnum() or c == "_" for c in around):
            yield at
        at = text.find(words, at + 1)


def lessons(plans: Sequence[Plan], writer: Writer, progress: Progress = silent) -> list[Lesson]:
    """The lessons of ``plans``, except those whose answer is not retrieved or that exceed the limits.

    Raises:
        RetrievalError: from the retriever.
    """
    hops = [hop for plan in plans for hop in plan.hops]
    writer.retrieve((hop.queries[0] for hop in hops), progress)
    missed = [hop for hop in hops if not writer.retrieves(hop.queries[0], hop.ids)]
    writer.retrieve((query for hop in missed for query in hop.queries[1:]), progress)
    return writer.map(lambda plan: _Narrator(plan, writer).lesson(), plans)


class _Narrator:
    """Writes the lesson of one plan."""

    def __init__(self, plan: Plan, writer: Writer) -> None:
        self.plan, self.question, self.writer = plan, plan.question, writer

    def lesson(self) -> Lesson | None:
        turns = self._turns()
        if turns is None:
            return None
        clean = self.writer.trajectory(self.question, turns)
        if not clean.correct or not self.writer.fits(clean):
            return None
        needed = frozenset(id for hop in self.plan.hops for id in hop.ids)
        return Lesson(self.question, clean, self.writer, self.plan.detours, needed)

    def _turns(self) -> list[Turn] | None:
        """A search per hop that no earlier search satisfies, each after a thought on the passages so far; then the answer."""
        hops, answers = self.plan.hops, self.question.answers
        if self.question.unanswerable:
            [query] = hops[0].queries
            search = self.writer.search(_goal(hops[0], query, self.question), query)
            return [search, self.writer.answer(f"No passage says it. So the answer is {answers[0]}.", answers[0])]
        turns: list[Turn] = []
        thought = answer = read = ""  # `read`: every observation so far
        for number, hop in enumerate(hops):
            last = number + 1 == len(hops)
            if not self._shown(hop, read):
                turn = self._first_hit(hop, thought, answers if len(hops) == 1 else ())
                if turn is None:
                    return None
                turns.append(turn)
                read += turn.observation_text
                thought = ""
            passage = self._shown(hop, read, answers if last else ())
            assert passage is not None
            if last:
                answer = self._answer(read)
                if not answer:
                    return None
            thought += f"{passage.title}: {self._fact(passage, answer if last else hops[number + 1].name, read)}. "
        return [*turns, self.writer.answer(f"{thought}So the answer is {answer}.", answer)]

    def _answer(self, read: str) -> str:
        """An answer as written in the passages; the answer of a comparison may occur only in the question."""
        hops, answers = self.plan.hops, self.question.answers
        places = [p.text for hop in reversed(hops) for p in hop.passages] + [p.title for p in hops[-1].passages]
        for text in places:
            for answer in answers:
                # Without its final parenthesis, it may be a different answer.
                if (name := find_name(answer, text)) and name in read and exact_match(name, answers):
                    return name
        return next((a for a in answers if a.lower() in YES_NO or find_name(a, self.question.text)), "")

    def _first_hit(self, hop: Hop, thought: str, answers: Sequence[str]) -> Turn | None:
        """The turn of the hop's first query that retrieves its passage (and shows one of ``answers``, if given)."""
        for query in hop.queries:
            if not self.writer.retrieves(query, hop.ids):
                continue
            turn = self.writer.search(thought + _goal(hop, query, self.question), query)
            shown = self._shown(hop, turn.observation_text)
            if shown and (not answers or any(find_name(a, turn.observation_text) for a in answers)):
                return turn
        return None

    def _shown(self, hop: Hop, read: str, answers: Sequence[str] = ()) -> Passage | None:
        """The passage of ``hop`` whose title and opening occur in ``read``, preferably one that contains an answer."""
        tokenizer = self.writer.tokenizer
        openings = {p.id: neutralize(tokenizer, f"(Title: {p.title}) {_opening(p.text)}") for p in hop.passages}
        shown = [p for p in hop.passages if openings[p.id] in read]
        return max(shown, key=lambda p: any(find_name(a, p.text) for a in answers), default=None)

    def _fact(self, passage: Passage, target: str, read: str) -> str:
        """A fact from ``passage``: a quote that ends with ``target``, an annotated fact, or its opening."""
        question = self.question
        if target and not find_name(target, question.text):
            quotes = _quotes(passage.text, target, question.text)
            if quote := next((q for q in quotes if neutralize(self.writer.tokenizer, q) in read), ""):
                return quote
        for subject, relation, value in question.metadata.get("evidences") or ():
            if find_name(passage.title, subject) and find_name(value, read):
                return f"{relation} {value}"
        return _opening(passage.text)


def _goal(hop: Hop, query: str, question: Question) -> str:
    return f"I need to find {hop.name}." if query != question.text else "I will search for the question."


def _quotes(text: str, target: str, question: str) -> list[str]:
    """Every occurrence of ``target`` with the words before it; most words in common with the question first."""
    text = " ".join(text.split())
    asked = set(_WORD.findall(question.lower()))
    quotes = []
    for at in _places(target, text):
        before = re.split(r"(?<=[.!?]) ", text[:at])[-1].split()
        quotes.append(" ".join([*before[-_QUOTE_WORDS:], target]))
    return sorted(quotes, key=lambda q: -len(asked & set(_WORD.findall(q.lower()))))


def _opening(text: str) -> str:
    return " ".join(text.split()[:_OPENING_WORDS])
