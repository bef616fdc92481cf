"""Plans from questions and a retriever alone: a name in the question retrieves a passage with the answer.

Passages that contain the answer replace annotated supporting passages. They may contain it by chance, so answers that are in
nearly every passage (yes, no, a single character) or in the question are not used. An unanswerable question teaches to search,
read, and say so.
"""

import random
import re
from collections.abc import Iterator, Sequence

from search_e1.rollout.demonstrations.hops import YES_NO, Hop, Plan, find_name
from search_e1.rollout.demonstrations.writer import Writer
from search_e1.runs.progress import Progress, silent
from search_e1.types import Passage, Question

_QUOTED = re.compile(r"[\"\u201c]([^\"\u201c\u201d]{2,80})[\"\u201d]")
_CAPITAL = r"[^\W\d_a-z]"
_WORD = rf"(?:{_CAPITAL}\.)+|{_CAPITAL}(?:[.'\u2019&-]?\w)*"
_CAPITALIZED = re.compile(rf"(?:{_WORD})(?:(?: (?:of|the|and|de|von|van|&))* (?:{_WORD})| \d+)*")
_FUNCTION_WORDS = (
    "a an and are at but by can did do does during for from had has have he her his how i if in is it its name of on one or "
    "she that the their these they this to was were what when where which while who whom whose why with"
)
_NO_NAMES = frozenset(_FUNCTION_WORDS.split())
_BRIDGES = 8  # names per passage that are tried as a second query


def plans(questions: Sequence[Question], writer: Writer, *, seed: int = 0, progress: Progress = silent) -> list[Plan]:
    """Plans for the questions whose answer is retrieved by one search, or by a second one that the first leads to.

    Raises:
        RetrievalError: from the retriever.
    """
    rng = random.Random(seed)
    writer.retrieve((question.text for question in questions), progress)
    names = {question.id: _names_asked(question, writer) for question in questions}
    writer.retrieve((name for question in questions for name in names[question.id]), progress)
    hops = {question.id: _one_hop(question, names[question.id], writer) for question in questions}
    rest = [q for q in questions if not (hops[q.id] or q.unanswerable) and _answers(q)]
    bridges = {question.id: list(_bridges(question, names[question.id], writer)) for question in rest}
    writer.retrieve((second for found in bridges.values() for _, _, second in found), progress)
    hops |= {question.id: _two_hops(question, bridges[question.id], writer) for question in rest}
    return [Plan.of(question, found, rng) for question in questions if (found := hops[question.id])]


def names_in(text: str) -> list[str]:
    """Likely names in ``text``: quoted phrases, and runs of capitalized words."""
    found = _QUOTED.findall(text)
    for match in _CAPITALIZED.finditer(text):
        words = match[0].split()
        while words and words[0].casefold() in _NO_NAMES:
            del words[0]
        found.append(" ".join(words).removesuffix("'s").removesuffix("\u2019s"))
    return [name for name in dict.fromkeys(found) if len(name) > 1]


def _names_asked(question: Question, writer: Writer) -> list[str]:
    """Names in the question, longest first; includes titles of passages that the question retrieves, in any case."""
    titles = (find_name(passage.title, question.text) for passage in writer.passages(question.text))
    names = dict.fromkeys(name for name in (*titles, *names_in(question.text)) if name and name.casefold() not in _NO_NAMES)
    return sorted(names, key=len, reverse=True)


def _answers(question: Question) -> list[str]:
    """The answers whose occurrence in a passage is informative."""
    long = (answer for answer in question.answers if len(answer) > 1 and answer.casefold() not in YES_NO)
    return [answer for answer in long if not find_name(answer, question.text)]


def _holding(passages: Sequence[Passage], answers: Sequence[str]) -> tuple[Passage, ...]:
    return tuple(p for p in passages if any(find_name(answer, text) for answer in answers for text in (p.text, p.title)))


def _one_hop(question: Question, names: Sequence[str], writer: Writer) -> list[Hop]:
    answers = _answers(question)
    for name in (*names, ""):
        query = name or question.text
        if question.unanswerable and (found := writer.passages(query)):
            return [Hop(tuple(found), name, (query,))]
        if holding := _holding(writer.passages(query), answers):
            return [Hop(holding, name, (query,))]
    return []


def _bridges(question: Question, names: Sequence[str], writer: Writer) -> Iterator[tuple[str, Passage, str]]:
    """Triples of a name in the question, the passage with that title, and a name in the passage but not in the question."""
    for name in names:
        passage = next((p for p in writer.passages(name) if find_name(p.title, name)), None)
        if passage:
            further = (other for other in names_in(passage.text) if not find_name(other, f"{question.text} {passage.title}"))
            yield from ((name, passage, other) for other in list(further)[:_BRIDGES])


def _two_hops(question: Question, bridges: Sequence[tuple[str, Passage, str]], writer: Writer) -> list[Hop]:
    answers = _answers(question)
    for name, first, second in bridges:
        about = [passage for passage in writer.passages(second) if find_name(passage.title, second)]
        if holding := _holding(about, answers):
            return [Hop((first,), name, (name,)), Hop(holding, second, (second,))]
    return []
