"""Demonstrations from supporting passages: how a question could have been searched and answered.

For every supporting passage there is a search that really retrieves it, made of what a searcher knows by then: a title
that the question or an earlier passage names, or the question itself. What comes back is the real observation.
"""

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from search_e1.config import Prompts, RolloutConfig, WarmstartConfig
from search_e1.data.answers import exact_match, f1
from search_e1.errors import DataError
from search_e1.retrieval.base import Retriever
from search_e1.runs.progress import Progress, silent
from search_e1.text.prompts import neutralize, observation, plain_prompt, privileged_prompt
from search_e1.types import ActionKind, Passage, Question, StopReason, Trajectory, Turn
from search_e1.warmstart.trainer import Demonstration

_QUOTE_WORDS = 3  # of the evidence, before the words that it ends with: where a longer quote begins is a guess
_OPENING_WORDS = 4  # of a passage that holds neither the answer nor the next title
_QUERIES_AT_ONCE = 256
_DRILLS_FOR_ONE = 6  # drills in a batch where otherwise there is one demonstration
_YES_NO = frozenset({"yes", "no"})
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Hop:
    """A search that is needed: any of ``passages`` serves it; ``queries`` are tried in their order."""

    passages: tuple[Passage, ...]
    name: str
    """What the searcher is after, in the words of the question or of an earlier passage; empty: the question itself."""
    queries: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a question takes."""

    question: Question
    hops: tuple[Hop, ...]
    detours: tuple[str, ...]
    """Queries that are likely to lead nowhere."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """A correct, direct trajectory, and needless searches that could stand before it."""

    question: Question
    clean: Trajectory
    detours: tuple[Turn, ...]


def plan(question: Question, passages: Mapping[str, Passage], rng: random.Random) -> Plan | None:
    """The searches that ``question`` takes, by its ``metadata``; ``None`` if that names no supporting passage.

    Several ``gold_passage_ids`` are all needed if the question has several hops, and are alternatives if it has one;
    ``answer_passage_ids`` are always alternatives.

    Raises:
        DataError: a passage is named that ``passages`` lacks.
    """
    named = {key: _passages(question, key, passages) for key in ("gold_passage_ids", "answer_passage_ids")}
    gold, answering = named.values()
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
    """``name``, without a parenthesis at its end, as it stands in ``text``, whatever the case; empty if it does not."""
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
    """A lesson for every question whose supporting passages are named and can be retrieved; the others are left out.

    Left out are also questions whose answer does not show in what is retrieved, or that exceed the limits of ``rollout``.

    Raises:
        DataError: a question names a passage that ``passages`` lacks.
        RetrievalError: from the retriever.
    """
    rng = random.Random(seed)
    plans = [made for question in questions if (made := plan(question, passages, rng))]
    queries = list(dict.fromkeys(q for p in plans for q in (*(q for h in p.hops for q in h.queries), *p.detours)))
    found: dict[str, Sequence[Passage]] = {}
    for at in range(0, len(queries), _QUERIES_AT_ONCE):
        part = queries[at : at + _QUERIES_AT_ONCE]
        found |= zip(part, retriever.search(part, rollout.topk), strict=True)
        progress(len(found), len(queries), "queries")
    writer = _Writer(tokenizer, prompts, rollout, found)
    return [lesson for made in plans if (lesson := writer.lesson(made))]


def batches(
    taught: Sequence[Lesson],
    tokenizer: Any,
    prompts: Prompts,
    config: WarmstartConfig,
    rollout: RolloutConfig,
    *,
    seed: int = 0,
) -> Iterator[list[Demonstration]]:
    """Batches without end: first ``config.drills`` of nothing but first searches, then whole demonstrations.

    All lessons come in a new order each time round, each in a form that is drawn anew.

    Raises:
        DataError: there are no lessons.
    """
    if not taught:
        raise DataError(
            "no question gives a demonstration; give training questions whose metadata names gold_passage_ids or "
            "answer_passage_ids of data.corpus"
        )
    rng = random.Random(seed)
    for _ in range(config.drills):
        # Short ones, and many: copying a name from a question into a query is what everything else begins with.
        yield [
            _demonstration(lesson.clean.prompt_ids, [_unanswered(lesson.clean.turns[0])])
            for lesson in rng.choices(taught, k=_DRILLS_FOR_ONE * config.batch_size)
        ]
    batch: list[Demonstration] = []
    while True:
        for lesson in rng.sample(taught, len(taught)):
            batch.append(demonstration(lesson, tokenizer, prompts, config, rollout, rng))
            if len(batch) == config.batch_size:
                yield batch
                batch = []


def demonstration(
    lesson: Lesson,
    tokenizer: Any,
    prompts: Prompts,
    config: WarmstartConfig,
    rollout: RolloutConfig,
    rng: random.Random,
) -> Demonstration:
    """``lesson`` in a form drawn by the shares of ``config``: following a reference, direct, or sloppy."""
    clean = lesson.clean
    room = rollout.max_searches - clean.searches
    if rng.random() < config.privileged:
        strays = (*lesson.detours, clean.turns[0])[: 3 if room else 0]
        stray = (rng.choice(strays),) if strays and rng.random() < config.off_track else ()
        prompt = privileged_prompt(tokenizer, prompts, lesson.question.text, clean.text)
        followed = _demonstration(prompt, (*stray, *clean.turns), read_only=len(stray))
        if len(followed) <= rollout.max_tokens:
            return followed
    draw = rng.random()
    turns = clean.turns
    if draw < config.early:
        turns = (turns[0], _jump(tokenizer, turns[0])) if turns[0].passage_ids else turns
    elif draw < config.early + config.duplicate:
        turns = (turns[0], *turns) if room else turns
    elif draw < config.early + config.duplicate + config.irrelevant:
        turns = (rng.choice(lesson.detours), *turns) if room and lesson.detours else turns
    sloppy = _demonstration(clean.prompt_ids, turns)
    return sloppy if len(sloppy) <= rollout.max_tokens else _demonstration(clean.prompt_ids, clean.turns)


def _demonstration(prompt_ids: tuple[int, ...], turns: Sequence[Turn], read_only: int = 0) -> Demonstration:
    """The first ``read_only`` turns are not imitated."""
    ids: list[int] = []
    mask: list[int] = []
    for number, turn in enumerate(turns):
        ids += turn.action_ids + turn.observation_ids
        mask += [int(number >= read_only)] * len(turn.action_ids) + [0] * len(turn.observation_ids)
    return Demonstration(prompt_ids, tuple(ids), tuple(mask))


def _unanswered(turn: Turn) -> Turn:
    return turn.model_copy(update=dict(observation_ids=(), observation_text="", passage_ids=()))


def _jump(tokenizer: Any, search: Turn) -> Turn:
    """An answer that takes the first title it sees for the answer."""
    title = re.search(r"Doc 1\(Title: (.*?)\)", search.observation_text)
    guess = title[1] if title else "unknown"
    return _action(tokenizer, f"So the answer is {guess}.", ActionKind.ANSWER, guess)


def _passages(question: Question, key: str, passages: Mapping[str, Passage]) -> list[Passage]:
    ids = list(dict.fromkeys(question.metadata.get(key) or ()))
    for id in ids:
        if id not in passages:
            raise DataError(
                f"question {question.id!r}: metadata.{key} names passage {id!r}, which data.corpus lacks; give the corpus "
                "that the questions belong to"
            )
    return [passages[id] for id in ids]


def _chain(question: str, gold: Sequence[Passage]) -> list[Hop]:
    """The hops in the order in which their titles come to be known."""
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
    return re.search(rf"(?<!\w){re.escape(bare)}(?!\w)", text, re.IGNORECASE) if len(bare) > 1 else None


def _action(tokenizer: Any, thought: str, kind: ActionKind, argument: str) -> Turn:
    text = f"<think> {thought}</think><{kind}> {argument}</{kind}>"
    ids = tuple(tokenizer.encode(text, add_special_tokens=False))
    return Turn(action_ids=ids, action_text=text, kind=kind, argument=argument)


class _Writer:
    """Writes lessons in words and ids, with what each query finds at hand."""

    def __init__(
        self, tokenizer: Any, prompts: Prompts, rollout: RolloutConfig, found: Mapping[str, Sequence[Passage]]
    ) -> None:
        self.tokenizer = tokenizer
        self.prompts = prompts
        self.rollout = rollout
        self.found = found

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
        needed = {p.id for hop in plan.hops for p in hop.passages}
        # A detour that finds what is needed would be the pending search in other words.
        strays = [query for query in plan.detours if self.found[query] and needed.isdisjoint(self._ids(query))]
        detours = tuple(self._served(f"I need to find {query}.", query) for query in strays)
        return Lesson(plan.question, clean, detours)

    def _turns(self, plan: Plan) -> tuple[Turn, ...] | None:
        """A search for each hop that no earlier one has served, each after a thought on what was read; the answer."""
        question, turns, thought = plan.question.text, [], ""
        read = ""  # every observation so far
        answer = ""
        for number, hop in enumerate(plan.hops):
            last = number + 1 == len(plan.hops)
            if not self._shown(hop, read):
                turn = self._retrieve(hop, thought, question, plan.question.answers if len(plan.hops) == 1 else ())
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

    def _retrieve(self, hop: Hop, thought: str, question: str, answers: Sequence[str]) -> Turn | None:
        """The first of the hop's queries that retrieves its passage (and shows one of ``answers``, if there are any)."""
        for query in hop.queries:
            goal = f"I need to find {hop.name}." if query != question else "I will search for the question."
            if not self.found[query]:
                continue
            turn = self._served(thought + goal, query)
            shown = self._shown(hop, turn.observation_text)
            if shown and (not answers or any(find_name(a, turn.observation_text) for a in answers)):
                return turn
        return None

    def _served(self, thought: str, query: str) -> Turn:
        text, ids = observation(self.tokenizer, self.found[query], self.rollout.max_observation_tokens)
        action = _action(self.tokenizer, thought, ActionKind.SEARCH, query)
        return action.model_copy(
            update=dict(observation_text=text, observation_ids=ids, passage_ids=tuple(self._ids(query)))
        )

    def _ids(self, query: str) -> list[str]:
        return [passage.id for passage in self.found[query]]

    def _shown(self, hop: Hop, read: str, answers: Sequence[str] = ()) -> Passage | None:
        """The passage of ``hop`` whose title and beginning are in ``read``; one that holds an answer comes first."""
        openings = {p.id: neutralize(self.tokenizer, f"(Title: {p.title}) {_opening(p.text)}") for p in hop.passages}
        shown = [p for p in hop.passages if openings[p.id] in read]
        return max(shown, key=lambda p: any(find_name(a, p.text) for a in answers), default=None)

    def _answer(self, plan: Plan, read: str) -> str:
        """An answer as it was read; one that compares may stand in the question alone."""
        places = [p.text for hop in reversed(plan.hops) for p in hop.passages] + [
            p.title for p in plan.hops[-1].passages
        ]
        for text in places:
            for answer in plan.question.answers:
                # Without a parenthesis at its end an answer may be another one.
                if (name := find_name(answer, text)) and name in read and exact_match(name, plan.question.answers):
                    return name
        compares = [a for a in plan.question.answers if a.lower() in _YES_NO or find_name(a, plan.question.text)]
        return compares[0] if compares else ""

    def _fact(self, question: Question, passage: Passage, target: str, read: str) -> str:
        """What ``passage`` says: the words up to ``target``, an annotated fact, or how it begins."""
        if target and not find_name(target, question.text):
            quotes = _quotes(passage.text, target, question.text)
            if quote := next((q for q in quotes if neutralize(self.tokenizer, q) in read), ""):
                return quote
        for subject, relation, value in question.metadata.get("evidences") or ():
            if find_name(passage.title, subject) and find_name(value, read):
                return f"{relation} {value}"
        return _opening(passage.text)


def _quotes(text: str, target: str, question: str) -> list[str]:
    """``target`` with the words before it, wherever it stands; those that share most words with the question first."""
    text = " ".join(text.split())
    asked = set(_WORD.findall(question.lower()))
    quotes = []
    for match in re.finditer(rf"(?<!\w){re.escape(target)}(?!\w)", text):
        before = re.split(r"(?<=[.!?]) ", text[: match.start()])[-1].split()
        quotes.append(" ".join([*before[-_QUOTE_WORDS:], match[0]]))
    return sorted(quotes, key=lambda q: -len(asked & set(_WORD.findall(q.lower()))))


def _opening(text: str) -> str:
    return " ".join(text.split()[:_OPENING_WORDS])
