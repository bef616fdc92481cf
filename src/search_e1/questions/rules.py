"""Questions by rules, without a model: facts in text that match a pattern.

A fact has a question template with a placeholder for its subject. One hop fills in the passage's title; two hops fill in a
description from another passage: ``In what year was {} born?`` and ``the director of {}``.
"""

import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from search_e1.questions.draft import Candidate, Draft
from search_e1.questions.filters import Filter, each
from search_e1.questions.links import bare_title
from search_e1.questions.patterns import (
    ABBREVIATION,
    AMOUNT,
    BORN,
    DEATH,
    DEFINITION,
    DESCRIBING,
    KEY_VALUE,
    LIFE,
    NAME,
    NEW_LINE_OF_ITS_OWN,
    NOT_ITS_OWN,
    PARTICIPLE,
    PRONOUN,
    RELATIONS,
    TABLE_RULE,
    YEAR,
    YEAR_OF,
)
from search_e1.types import Passage

NAME_OF_WRITER = "rule"
_CLOZE = "Which {what} is missing in \u201c{sentence}\u201d?"
_CLOZE_WORDS = (8, 30)
_MOST_KEY_WORDS, _MOST_VALUE_WORDS = 4, 8


@dataclass(frozen=True, slots=True)
class Fact:
    """A fact; ``template`` has ``{}`` for its subject, or is a complete question."""

    rule: str
    template: str
    answer: str

    def about(self, subject: str) -> str:
        return self.template.replace("{}", subject)


class RuleWriter:
    """Writes drafts of candidates by rules; determined by ``seed``."""

    name = NAME_OF_WRITER

    def __init__(self, passages: Iterable[Passage], per_passage: int, seed: int) -> None:
        self._per_passage, self._seed = per_passage, seed
        self._by_title: dict[str, list[Passage]] = defaultdict(list)
        for passage in passages:
            self._by_title[passage.title].append(passage)
        self._facts: dict[str, list[Fact]] = {}

    def write(self, candidates: Sequence[Candidate]) -> list[list[Draft]]:
        return [self._one(candidate) for candidate in candidates]

    def filters(self) -> list[Filter]:
        return [each("one answer in the corpus", self._ambiguous)]

    def check(self) -> None:
        """Never raises: if rules find nothing, the caller blames the corpus."""

    def _ambiguous(self, draft: Draft) -> str:
        """Drops a draft if another passage with the same title answers its question differently."""
        last, question = draft.passages[-1], draft.queries[-1]
        for other in self._by_title[last.title]:
            for fact in self._known(other) if other.id != last.id else ():
                if fact.about(last.title) == question and fact.answer not in draft.answers:
                    return f"{other.id} says {fact.answer!r}"
        return ""

    def _known(self, passage: Passage) -> list[Fact]:
        if passage.id not in self._facts:
            self._facts[passage.id] = facts(passage)
        return self._facts[passage.id]

    def _one(self, candidate: Candidate) -> list[Draft]:
        rng = random.Random("/".join((str(self._seed), *(passage.id for passage in candidate))))
        made = list(_two_hops(candidate[0], candidate[1], self._known)) if len(candidate) > 1 else list(_one_hop(candidate[0]))
        rng.shuffle(made)
        kept = made[: self._per_passage]
        if not kept and len(candidate) == 1 and (gaps := list(_cloze(candidate[0]))):
            kept = [rng.choice(gaps)]
        return kept


def facts(passage: Passage) -> list[Fact]:
    """The facts of ``passage`` about its title, one per question template."""
    if not bare_title(passage):
        return []
    sentences = sentences_of(passage.text)
    found = [*_lines(passage), *(fact for s in _about_title(passage, sentences) for fact in _of_sentence(s, passage))]
    if sentences and sentences[0].startswith(bare_title(passage)):
        found += _life(sentences[0], passage)
    answers: dict[str, list[Fact]] = defaultdict(list)
    for fact in found:
        answers[fact.template].append(fact)
    # A template with two different answers in a passage is ambiguous.
    return [of[0] for of in answers.values() if len({fact.answer for fact in of}) == 1]


def sentences_of(text: str) -> list[str]:
    """Splits running text into sentences by punctuation, except after abbreviations."""
    found: list[str] = []
    for line in text.splitlines():
        start = 0
        for match in re.finditer(r"[.!?][\"\u201d)]*\s+(?=[\"\u201c(]?[A-Z0-9])", line):
            if not ABBREVIATION.search(line[start : match.start() + 1]):
                found.append(line[start : match.end()].strip())
                start = match.end()
        found.append(line[start:].strip())
    return [sentence for sentence in found if sentence]


def _about_title(passage: Passage, sentences: Sequence[str]) -> list[str]:
    """Sentences whose subject is the title, or a pronoun if the passage begins with the title."""
    title = bare_title(passage)
    if not sentences or not sentences[0].startswith(title):
        return [s for s in sentences if s.startswith(title)]
    return [s for s in sentences if s.startswith(title) or PRONOUN.match(s)]


def _one_hop(passage: Passage) -> Iterator[Draft]:
    for fact in [*facts(passage), *_definitions(passage)]:
        text = fact.about(passage.title)
        yield Draft(
            text=text, answers=(fact.answer,), passages=(passage,), queries=(text,), made_by=NAME_OF_WRITER, rule=fact.rule
        )


def _two_hops(first: Passage, second: Passage, known: Callable[[Passage], list[Fact]]) -> Iterator[Draft]:
    """Facts of the second passage, whose subject is described by a relation in the first (e.g. its director). ``known``:
    returns a passage's facts.
    """
    subject = bare_title(second)
    if not any(DESCRIBING.search(before[-40:]) for before in first.text.split(subject)[:-1]):
        return  # true for most pairs; skips their sentences
    for sentence in _about_title(first, sentences_of(first.text)):
        for phrase, (question, description) in RELATIONS.items():
            match = (
                re.search(rf"\b{phrase} {re.escape(subject)}(?![\w-]| [A-Z])(?!,? (?:and|&) )", sentence)
                if description
                else None
            )
            if not match or NOT_ITS_OWN.search(sentence[: match.start()]):
                continue
            for fact in known(second):
                yield Draft(
                    text=fact.about(description.format(first.title)), answers=(fact.answer,), passages=(first, second),
                    queries=(question.format(first.title), fact.about(second.title)),
                    made_by=NAME_OF_WRITER, rule=f"relation + {fact.rule}",
                )  # fmt: skip


def _lines(passage: Passage) -> Iterator[Fact]:
    """Facts from ``Key: value`` lines and Markdown tables."""
    heading = str(passage.metadata.get("heading") or "")
    heading = heading if heading and heading not in passage.title else ""
    under = f" under {heading}" if heading else ""
    lines = passage.text.splitlines()
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        if (match := KEY_VALUE.fullmatch(line)) and not _continues(match["value"], after):
            key, value = match["key"].strip(" *_"), match["value"].strip(" *_.")
            if len(key.split()) <= _MOST_KEY_WORDS and 0 < len(value.split()) <= _MOST_VALUE_WORDS:
                yield Fact("key: value", f"What is the {_lower(key)} of {{}}{under}?", value)
    yield from _tables(lines)


def _continues(value: str, after: str) -> bool:
    """Whether the line ``after`` goes on with ``value``: a sentence that was wrapped, or a bracket that it closes."""
    unclosed = value.count("`") % 2 or any(value.count(a) != value.count(b) for a, b in ("()", "[]", "{}"))
    return bool(unclosed) or not (NEW_LINE_OF_ITS_OWN.match(after) or KEY_VALUE.match(after))


def _tables(lines: Sequence[str]) -> Iterator[Fact]:
    """Facts from tables with a header row: the value of each column for the row named by its first cell."""
    header: list[str] = []
    for number, line in enumerate(lines):
        if not line.strip().startswith("|"):
            header = []
        elif number + 1 < len(lines) and TABLE_RULE.fullmatch(lines[number + 1].strip()):
            header = _cells(line)
        elif header and not TABLE_RULE.fullmatch(line.strip()):
            name, *values = _cells(line)
            for column, value in zip(header[1:], values, strict=False):
                if name and column and value and len(value.split()) <= _MOST_VALUE_WORDS:
                    yield Fact("table", f"What is the {_lower(column)} of {name} in {{}}?", value)


def _cells(line: str) -> list[str]:
    return [cell.strip(" *`") for cell in line.strip().strip("|").split("|")]


def _life(sentence: str, passage: Passage) -> Iterator[Fact]:
    """Years of birth and death, as encyclopedias write them after a name."""
    head = sentence[len(bare_title(passage)) :]
    if match := BORN.match(head):
        yield Fact("born", "In what year was {} born?", match["born"])
    elif match := LIFE.match(head):
        yield Fact("born", "In what year was {} born?", match["born"])
        yield Fact("died", "In what year did {} die?", match["died"])


def _of_sentence(sentence: str, passage: Passage) -> Iterator[Fact]:
    title, pronoun = bare_title(passage), PRONOUN.match(sentence)
    rest = sentence[len(title) :] if sentence.startswith(title) else sentence[pronoun.end() :] if pronoun else sentence
    for phrase, (question, _) in RELATIONS.items():
        match = re.search(rf"\b{phrase} (?P<name>{NAME})(?P<after>.{{0,6}})", rest)
        # A list has several correct answers; in "based on X's novel", X is not the answer.
        if (
            match
            and not re.match(r",? (?:and|or|&) |, [A-Z]", match["after"])
            and not match["name"].endswith(("'s", "\u2019s"))
            and not NOT_ITS_OWN.search(rest[: match.start()])
        ):
            yield Fact("relation", question, match["name"].rstrip(".,'"))
    match = YEAR_OF.match(rest) if len(YEAR.findall(rest)) == 1 else None
    if match and PARTICIPLE.fullmatch(match["verb"]):
        yield Fact("year", f"In what year {match['be']} {{}} {match['verb']}{match['by'] or ''}?", match["year"])
    if match := AMOUNT.search(rest):
        yield Fact("amount", f"What {match['be'] or 'is'} the {match['what']} of {{}}?", match["amount"])
    if match := DEATH.match(rest):
        yield Fact("died", "In what year did {} die?", match["year"])


def _definitions(passage: Passage) -> Iterator[Fact]:
    """Questions for the title: ``X is a film directed by Y.`` asks for X."""
    sentences, title = sentences_of(passage.text), bare_title(passage)
    match = DEFINITION.match(sentences[0][len(title) :]) if title and sentences and sentences[0].startswith(title) else None
    if match and title.casefold() not in match[0].casefold():
        verb = "" if match["link"] else f"{match['be']} "
        yield Fact("definition", f"Which {match['what']} {verb}{match['rest'].rstrip('.')}?", title)


def _cloze(passage: Passage) -> Iterator[Draft]:
    """A sentence that contains the title, with its year left out."""
    title = bare_title(passage)
    for sentence in sentences_of(passage.text):
        if not title or title not in sentence or not _CLOZE_WORDS[0] <= len(sentence.split()) <= _CLOZE_WORDS[1]:
            continue
        gaps = YEAR.findall(sentence)
        if len(gaps) == 1 and gaps[0] not in title:
            text = _CLOZE.format(what="year", sentence=sentence.replace(gaps[0], "___", 1).rstrip("."))
            yield Draft(
                text=text, answers=(gaps[0],), passages=(passage,), queries=(text,), made_by=NAME_OF_WRITER, rule="cloze"
            )


def _lower(key: str) -> str:
    """``key`` in lower case, except for words with inner capitals, such as abbreviations."""
    return " ".join(word if any(c.isupper() for c in word[1:]) else word.lower() for word in key.split())
