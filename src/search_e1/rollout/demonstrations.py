"""Demonstrations from supporting passages: how a question could have been searched and answered.

Each supporting passage is retrieved by a search whose query the searcher could know by then: a title named in the question or
in an earlier passage, or the question itself. The observations are the real ones.
"""

import os
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any

from search_e1.config import ColdstartConfig, Prompts, RolloutConfig
from search_e1.data.answers import exact_match, f1
from search_e1.errors import DataError
from search_e1.retrieval.base import Retriever
from search_e1.runs.progress import Progress, silent
from search_e1.text.prompts import neutralize, observation, plain_prompt, privileged_prompt
from search_e1.types import ActionKind, Passage, Question, Sample, StopReason, Trajectory, Turn

_QUOTE_WORDS = 3  # quoted before the target words: where a longer quote should begin is a guess
_OPENING_WORDS = 4  # quoted of a passage that contains neither the answer nor the next title
_BATCH = 256  # queries a call of the retriever
_DRILL_FACTOR = 6  # drills a batch for each demonstration that it otherwise holds
_UNANSWERED = dict(observation_ids=(), observation_text="", passage_ids=())
_YES_NO = frozenset({"yes", "no"})
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Hop:
    """A required search: any of ``passages`` satisfies it; ``queries`` are tried in order."""

    passages: tuple[Passage, ...]
    name: str
    """The entity searched for, as the question or an earlier passage writes it; empty: the question is the query."""
    queries: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """The searches that a question takes."""

    question: Question
    hops: tuple[Hop, ...]
    detours: tuple[str, ...]
    """Queries that are unlikely to retrieve anything useful."""


@dataclass(frozen=True)
class Lesson:
    """A correct, direct trajectory, and needless searches that could precede it."""

    plan: Plan
    clean: Trajectory
    writer: "_Writer"

    @property
    def question(self) -> Question:
        return self.plan.question

    @cached_property
    def detours(self) -> tuple[Turn, ...]:
        """The searches of ``plan.detours`` that retrieve something, but no passage of a hop; run when they are first needed.

        Raises:
            RetrievalError: from the retriever.
        """
        # One that retrieves a needed passage would be the pending search in other words.
        return tuple(
            self.writer.search_turn(f"I need to find {query}.", query)
            for query in self.plan.detours
            if self.writer.passages(query) and not self.writer.retrieves(query, *self.plan.hops)
        )


def plan(question: Question, passages: Mapping[str, Passage], rng: random.Random) -> Plan | None:
    """The searches that ``question`` takes, by its ``metadata``; ``None`` if that names no supporting passage.

    Several ``gold_passage_ids`` are all required if the question has several hops, and alternatives if it has one;
    ``answer_passage_ids`` are always alternatives.

    Raises:
        DataError: ``passages`` lacks a passage that is named.
    """
    gold, answering = (_named(question, key, passages) for key in ("gold_passage_ids", "answer_passage_ids"))
    if not gold and not answering:
        return None
    if gold and (question.hops or 1) > 1:
        hops = _chain(question.text, gold)
    else:
        alternatives = list({p.id: p for p in (*gold, *answering)}.values())
        names = [name for p in alternatives if (name := find_name(p.title, question.text))]
        hops = [_hop(tuple(alternatives), max(names, key=len, default=""), question.text)]
    words = [word for word in question.text.rstrip("?").split() if len(word) > 3] or question.text.split()
    detours = tuple(" ".join(rng.sample(words, min(2, len(words)))) for _ in range(2))
    return Plan(question, tuple(hops), detours)


def find_name(name: str, text: str) -> str:
    """``name`` as it is written in ``text``, ignoring case and a final parenthesis; empty if it does not occur."""
    match = _search(name, text)
    return match[0] if match else ""


def lessons(
    questions: Sequence[Question],
    passages: Mapping[str, Passage],
    retriever: Retriever,
    tokenizer: Any,
    prompts: Prompts,
    rollout: RolloutConfig,
    *,
    seed: int = 0,
    progress: Progress = silent,
) -> list[Lesson]:
    """A lesson for every question whose supporting passages are named and can be retrieved.

    Questions whose answer does not occur in the retrieved passages, or that exceed the limits of ``rollout``, are left out.

    Raises:
        DataError: a question names a passage that ``passages`` lacks.
        RetrievalError: from the retriever.
    """
    rng = random.Random(seed)
    plans = [planned for question in questions if (planned := plan(question, passages, rng))]
    hops = [hop for planned in plans for hop in planned.hops]
    writer = _Writer(tokenizer, prompts, rollout, retriever)
    writer.retrieve((hop.queries[0] for hop in hops), progress)
    missed = [hop for hop in hops if not writer.retrieves(hop.queries[0], hop)]
    writer.retrieve((query for hop in missed for query in hop.queries[1:]), progress)
    tokenizer.encode("")  # sets truncation and padding, which must not happen in several threads at once
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the tokenizer works outside Python's lock
        return [lesson for lesson in pool.map(writer.lesson, plans) if lesson]


def batches(taught: Sequence[Lesson], config: ColdstartConfig, *, seed: int = 0) -> Iterator[list[Sample]]:
    """Endless batches: first ``config.drills`` of first searches only, then whole demonstrations.

    Every pass over the lessons has a new order, and draws the form of each anew.

    Raises:
        DataError: there are no lessons.
        RetrievalError: a needless search failed.
    """
    if not taught:
        raise DataError(
            "no question gives a demonstration; give training questions whose metadata names gold_passage_ids or "
            "answer_passage_ids of data.corpus"
        )
    rng = random.Random(seed)
    for _ in range(config.drills):
        # Many short ones: everything else builds on copying a name from the question into a query.
        yield [
            _sample(lesson, lesson.clean.prompt_ids, [lesson.clean.turns[0].model_copy(update=_UNANSWERED)])
            for lesson in rng.choices(taught, k=_DRILL_FACTOR * config.batch_size)
        ]
    batch: list[Sample] = []
    while True:
        for lesson in rng.sample(taught, len(taught)):
            batch.append(demonstration(lesson, config, rng))
            if len(batch) == config.batch_size:
                yield batch
                batch = []


def demonstration(lesson: Lesson, config: ColdstartConfig, rng: random.Random) -> Sample:
    """``lesson`` in a form drawn by the shares of ``config``: following a reference, direct, or sloppy."""
    clean, tokenizer, rollout = lesson.clean, lesson.writer.tokenizer, lesson.writer.rollout
    may_search = clean.searches < rollout.max_searches
    if rng.random() < config.privileged:
        off_track = may_search and rng.random() < config.off_track
        detour = (rng.choice((*lesson.detours, clean.turns[0])),) if off_track else ()
        prompt = privileged_prompt(tokenizer, lesson.writer.prompts, lesson.question.text, clean.text)
        followed = _sample(lesson, prompt, (*detour, *clean.turns), read_only=len(detour))
        if len(followed) <= rollout.max_tokens:
            return followed
    draw = rng.random()
    turns = clean.turns
    if draw < config.early:
        turns = (turns[0], _premature_answer(tokenizer, turns[0])) if turns[0].passage_ids else turns
    elif draw < config.early + config.duplicate:
        turns = (turns[0], *turns) if may_search else turns
    elif draw < config.early + config.duplicate + config.irrelevant:
        turns = (rng.choice(lesson.detours), *turns) if may_search and lesson.detours else turns
    sloppy = _sample(lesson, clean.prompt_ids, turns)
    return sloppy if len(sloppy) <= rollout.max_tokens else _sample(lesson, clean.prompt_ids, clean.turns)


def _sample(lesson: Lesson, prompt_ids: tuple[int, ...], turns: Sequence[Turn], read_only: int = 0) -> Sample:
    """The first ``read_only`` turns are not imitated."""
    ids: list[int] = []
    mask: list[int] = []
    for number, turn in enumerate(turns):
        ids += turn.action_ids + turn.observation_ids
        mask += [int(number >= read_only)] * len(turn.action_ids) + [0] * len(turn.observation_ids)
    return Sample(question_id=lesson.question.id, prompt_ids=prompt_ids, response_ids=tuple(ids), action_mask=tuple(mask))


def _premature_answer(tokenizer: Any, search: Turn) -> Turn:
    """An answer with the title of the first passage."""
    title = re.search(r"Doc 1\(Title: (.*?)\)", search.observation_text)
    guess = title[1] if title else "unknown"
    return _action(tokenizer, f"So the answer is {guess}.", ActionKind.ANSWER, guess)


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
        if match := _search(title, text):
            return number, match.start()
    return len(texts), 0


def _hop(passages: tuple[Passage, ...], name: str, question: str) -> Hop:
    return Hop(passages, name, (name, question, f"{name} {question}") if name else (question,))


def _search(name: str, text: str) -> re.Match[str] | None:
    bare = re.sub(r"\s*\([^()]*\)$", "", name).strip()
    if len(bare) < 2 or bare.casefold() not in text.casefold():  # most often not, and a pattern takes long to compile
        return None
    return re.search(rf"(?<!\w){re.escape(bare)}(?!\w)", text, re.IGNORECASE)


def _action(tokenizer: Any, thought: str, kind: ActionKind, argument: str) -> Turn:
    text = f"<think> {thought}</think><{kind}> {argument}</{kind}>"
    ids = tuple(tokenizer.encode(text, add_special_tokens=False))
    return Turn(action_ids=ids, action_text=text, kind=kind, argument=argument)


class _Writer:
    """Writes lessons as text and ids. Threads may share it."""

    def __init__(self, tokenizer: Any, prompts: Prompts, rollout: RolloutConfig, retriever: Retriever) -> None:
        self.tokenizer, self.prompts, self.rollout, self.retriever = tokenizer, prompts, rollout, retriever
        self._found: dict[str, Sequence[Passage]] = {}
        self._lock = Lock()

    def retrieve(self, queries: Iterable[str], progress: Progress = silent) -> None:
        """Retrieve for the queries that were not asked before, in batches."""
        new = [query for query in dict.fromkeys(queries) if query not in self._found]
        total = len(self._found) + len(new)
        for start in range(0, len(new), _BATCH):
            batch = new[start : start + _BATCH]
            self._found |= zip(batch, self.retriever.search(batch, self.rollout.topk), strict=True)
            progress(len(self._found), total, "queries")

    def passages(self, query: str) -> Sequence[Passage]:
        """The passages retrieved for ``query``."""
        if query not in self._found:
            with self._lock:
                self.retrieve([query])
        return self._found[query]

    def retrieves(self, query: str, *hops: Hop) -> bool:
        """Whether ``query`` retrieves a passage of one of ``hops``."""
        wanted = {passage.id for hop in hops for passage in hop.passages}
        return not wanted.isdisjoint(passage.id for passage in self.passages(query))

    def lesson(self, plan: Plan) -> Lesson | None:
        turns = self._turns(plan)
        if turns is None:
            return None
        answer = turns[-1].argument
        clean = Trajectory(
            question_id=plan.question.id,
            prompt_ids=plain_prompt(self.tokenizer, self.prompts, plan.question.text),
            turns=turns,
            stop_reason=StopReason.ANSWERED,
            answer=answer,
            reward=exact_match(answer, plan.question.answers),
            f1=f1(answer, plan.question.answers),
        )
        too_long = len(clean.prompt_ids) + len(clean.response_ids) > self.rollout.max_tokens
        too_long |= any(len(turn.action_ids) > self.rollout.max_action_tokens for turn in turns)
        if not clean.correct or too_long or clean.searches > self.rollout.max_searches:
            return None
        return Lesson(plan, clean, self)

    def _turns(self, plan: Plan) -> tuple[Turn, ...] | None:
        """A search for each hop that no earlier search has satisfied, each after a thought on what was read; the answer."""
        question, turns, thought = plan.question.text, [], ""
        read = ""  # every observation so far
        answer = ""
        for number, hop in enumerate(plan.hops):
            last = number + 1 == len(plan.hops)
            if not self._shown(hop, read):
                turn = self._first_hit(hop, thought, question, plan.question.answers if len(plan.hops) == 1 else ())
                if turn is None:
                    return None
                turns.append(turn)
                read += turn.observation_text
                thought = ""
            passage = self._shown(hop, read, plan.question.answers if last else ())
            assert passage is not None
            if last:
                answer = self._answer(plan, read)
                if not answer:
                    return None
            target = answer if last else plan.hops[number + 1].name
            thought += f"{passage.title}: {self._fact(plan.question, passage, target, read)}. "
        turns.append(_action(self.tokenizer, f"{thought}So the answer is {answer}.", ActionKind.ANSWER, answer))
        return tuple(turns)

    def _first_hit(self, hop: Hop, thought: str, question: str, answers: Sequence[str]) -> Turn | None:
        """The first of the hop's queries that retrieves its passage (and shows one of ``answers``, if there are any)."""
        for query in hop.queries:
            if not self.retrieves(query, hop):
                continue
            goal = f"I need to find {hop.name}." if query != question else "I will search for the question."
            turn = self.search_turn(thought + goal, query)
            shown = self._shown(hop, turn.observation_text)
            if shown and (not answers or any(find_name(a, turn.observation_text) for a in answers)):
                return turn
        return None

    def search_turn(self, thought: str, query: str) -> Turn:
        passages = self.passages(query)
        text, ids = observation(self.tokenizer, passages, self.rollout.max_observation_tokens)
        action = _action(self.tokenizer, thought, ActionKind.SEARCH, query)
        found = tuple(passage.id for passage in passages)
        return action.model_copy(update=dict(observation_text=text, observation_ids=ids, passage_ids=found))

    def _shown(self, hop: Hop, read: str, answers: Sequence[str] = ()) -> Passage | None:
        """The passage of ``hop`` whose title and opening occur in ``read``, preferably one that contains an answer."""
        openings = {p.id: neutralize(self.tokenizer, f"(Title: {p.title}) {_opening(p.text)}") for p in hop.passages}
        shown = [p for p in hop.passages if openings[p.id] in read]
        return max(shown, key=lambda p: any(find_name(a, p.text) for a in answers), default=None)

    def _answer(self, plan: Plan, read: str) -> str:
        """An answer as it was read; that of a comparison may occur in the question only."""
        places = [p.text for hop in reversed(plan.hops) for p in hop.passages] + [p.title for p in plan.hops[-1].passages]
        for text in places:
            for answer in plan.question.answers:
                # Without its final parenthesis it may be a different answer.
                if (name := find_name(answer, text)) and name in read and exact_match(name, plan.question.answers):
                    return name
        compares = [a for a in plan.question.answers if a.lower() in _YES_NO or find_name(a, plan.question.text)]
        return compares[0] if compares else ""

    def _fact(self, question: Question, passage: Passage, target: str, read: str) -> str:
        """What ``passage`` says: the words up to ``target``, an annotated fact, or its opening."""
        if target and not find_name(target, question.text):
            quotes = _quotes(passage.text, target, question.text)
            if quote := next((q for q in quotes if neutralize(self.tokenizer, q) in read), ""):
                return quote
        for subject, relation, value in question.metadata.get("evidences") or ():
            if find_name(passage.title, subject) and find_name(value, read):
                return f"{relation} {value}"
        return _opening(passage.text)


def _quotes(text: str, target: str, question: str) -> list[str]:
    """Every occurrence of ``target`` with the words before it; those that share most words with the question first."""
    text = " ".join(text.split())
    asked = set(_WORD.findall(question.lower()))
    quotes = []
    for match in re.finditer(rf"(?<!\w){re.escape(target)}(?!\w)", text):
        before = re.split(r"(?<=[.!?]) ", text[: match.start()])[-1].split()
        quotes.append(" ".join([*before[-_QUOTE_WORDS:], match[0]]))
    return sorted(quotes, key=lambda q: -len(asked & set(_WORD.findall(q.lower()))))


def _opening(text: str) -> str:
    return " ".join(text.split()[:_OPENING_WORDS])
