"""Demonstrations of searching in the small world: sloppy ones under the plain prompt, efficient ones beside a reference.

They make a base policy that is to the small world what an instruct model is to the real one: it knows the protocol, wastes
searches and words, is often wrong, and follows an example that it is shown, also from a bad start.
"""

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from search_e1.config import Prompts
from search_e1.data.world import RELATIONS, Entity, World
from search_e1.retrieval.base import Retriever
from search_e1.retrieval.bm25 import Bm25Index
from search_e1.text.prompts import observation, plain_prompt, privileged_prompt
from search_e1.training.policy import Reader
from search_e1.types import Question
from search_e1.warmstart.trainer import Demonstration

_SLIP = "|"  # before a word: choosing it is a slip. What follows from it is not marked

_FILLERS = (
    "let me think about the question step by step .",
    "okay so I should look at what I know so far and decide what to do next .",
    "I have to be careful here and read the documents again .",
    "the question is not easy but I can search for more .",
)

PHRASES = " ".join([*_FILLERS, "found need done search again for maybe of is useful I give up unknown : ."])
"""Every word of a thought that is not of the world itself, for a tokenizer's vocabulary."""


@dataclass(frozen=True, slots=True)
class Slips:
    """How sloppy a demonstration is."""

    irrelevant: float = 0.15
    """Probability, at each turn, of a search that does not help."""
    duplicate: float = 0.12
    """Probability, at each turn, of repeating the last search."""
    recheck: float = 0.3
    """Probability, at each turn, of searching on although the evidence is complete."""
    early: tuple[float, float, float] = (0.2, 0.2, 0.2)
    """Share of trajectories of two, three and four hops that answer with an entity on the way."""
    one_short: bool = False
    """Those stop one fact short, not anywhere."""
    give_up: float = 0.08
    """Share of trajectories that answer with ``unknown``."""
    wrong: float = 0.18
    """Share of trajectories that take the value of another relation somewhere."""
    confused: float = 0.0
    """Share of the remaining trajectories that mistake the last relation for another, if it is one of ``CONFUSED``."""
    verbose: float = 0.5
    """Share of trajectories that fill their thoughts."""
    favourite: float = 0.0
    """Share of what they fill them with that is the same everywhere; the rest is drawn."""
    misread: float = 0.0
    """Probability, at each turn of a bad start, of going on from a name that no passage holds."""
    stray: int = 3
    """Most turns of a bad start."""

    def correct(self) -> "Slips":
        """The same inefficiency, without the slips that cost the answer."""
        return replace(self, early=(0.0, 0.0, 0.0), give_up=0.0, wrong=0.0, confused=0.0)


CLEAN = Slips(irrelevant=0, duplicate=0, recheck=0, early=(0, 0, 0), give_up=0, wrong=0, verbose=0)
HABITS = Slips(early=(0.15, 0.65, 0.7), one_short=True, wrong=0.05, confused=0.7, misread=0.35, stray=4)
"""Slips of which some are more likely than what is right, so that the greedy trajectory goes wrong too."""
WORDY = replace(HABITS, verbose=0.9, favourite=0.85)
"""Filled thoughts too are more likely than plain ones. They cost nothing but tokens, so that a reward for the answer alone does
not see them."""
CONFUSED = {
    "employer": "birthplace",
    "studio": "director",
    "headquarters": "founder",
    "mayor": "country",
    "publisher": "author",
}


@dataclass(slots=True)
class _Walk:
    """A trajectory in the making, and what is known in it."""

    chain: Sequence[Entity]  # from the entity that the question names to the answer
    relations: Sequence[str]
    ids: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)  # of ``ids``: part of an action, not of an observation
    slips: list[bool] = field(default_factory=list)  # of ``ids``: chosen by a slip
    seen: set[str] = field(default_factory=set)  # ids of the passages that were retrieved
    queries: list[tuple[str, str]] = field(default_factory=list)  # relation, name
    answered: bool = False

    @property
    def hops(self) -> int:
        return len(self.relations)

    @property
    def progress(self) -> int:
        """How many of the chain's facts are stated in what was retrieved, from the first on."""
        return next((h for h in range(self.hops) if self.chain[h].id not in self.seen), self.hops)


class DemonstrationWriter:
    """Writes demonstrations of one world, with observations as the rollout loop would insert them."""

    def __init__(
        self,
        world: World,
        retriever: Retriever,
        tokenizer: Any,
        prompts: Prompts,
        *,
        topk: int = 2,
        max_observation_tokens: int = 128,
        max_searches: int = 5,
    ) -> None:
        """``max_searches`` bounds the detours: a demonstration never needs more."""
        self.world = world
        self.retriever = retriever
        self.tokenizer = tokenizer
        self.prompts = prompts
        self.topk = topk
        self.max_observation_tokens = max_observation_tokens
        self.max_searches = max_searches
        self._word_ids: dict[str, list[int]] = {}
        self._found: dict[str, tuple[str, tuple[int, ...], tuple[str, ...]]] = {}
        self._fetch([f"{relation} {e.name}" for e in world.entities.values() for relation in e.facts])

    def plain(self, rng: random.Random, question: Question, slips: Slips) -> Demonstration:
        """A trajectory with slips under the plain prompt; all its actions are to be imitated."""
        walk = self._walk(question)
        self._go(walk, rng, slips)
        prompt = plain_prompt(self.tokenizer, self.prompts, question.text)
        return Demonstration(prompt, tuple(walk.ids), tuple(map(int, walk.sampled)))

    def privileged(self, rng: random.Random, question: Question, slips: Slips, *, off_track: float) -> Demonstration:
        """An efficient trajectory under the privileged prompt.

        With probability ``off_track`` it goes on from a sloppy beginning. Of that, slips are not imitated, but the words
        that follow from them are: a teacher that meets a strange phrase should complete it and then do the right thing.
        """
        reference = self._walk(question)
        self._go(reference, rng, slips.correct() if rng.random() < 0.5 else CLEAN)
        walk = self._walk(question)
        if rng.random() < off_track:
            self._stray(walk, rng, slips)
        if rng.random() < 0.15 and 0 < walk.progress < walk.hops:
            self._answer(
                walk, [*_known(walk), "|done", "."], walk.chain[-1].name
            )  # too early, but what is right is known
        else:
            self._go(walk, rng, CLEAN)
        prompt = privileged_prompt(self.tokenizer, self.prompts, question.text, "".join(reference.text))
        mask = [int(s and not slip) for s, slip in zip(walk.sampled, walk.slips, strict=True)]
        return Demonstration(prompt, tuple(walk.ids), tuple(mask))

    def clean_text(self, question: Question) -> str:
        """The text of the efficient trajectory: one search a hop, then the answer."""
        walk = self._walk(question)
        self._go(walk, random.Random(0), CLEAN)
        return "".join(walk.text)

    def _walk(self, question: Question) -> _Walk:
        chain = [self.world.entities[id] for id in question.metadata["entities"]]
        return _Walk(chain, question.metadata["relations"])

    def _go(self, walk: _Walk, rng: random.Random, slips: Slips) -> None:
        """Take turns until the answer, or to the end of a plan that makes it wrong."""
        verbose = slips.favourite if rng.random() < slips.verbose else None
        plan, turn = _plan(walk, rng, slips)
        while not walk.answered:
            at = walk.progress
            mistaken = plan == "confused" and at == turn  # and so sure of it that nothing is checked
            if not mistaken and self._detour(walk, rng, slips, verbose):
                continue
            if plan == "give_up" and at >= turn:
                self._answer(walk, [*_known(walk), "|I", "give", "up", "."], "unknown", slip="|")
            elif plan == "early" and at == turn:
                self._answer(walk, [*_known(walk), "|done", "."], walk.chain[at].name, slip="|")
            elif plan == "wrong" and at == turn:
                self._take_wrong(walk, rng, verbose)
            elif mistaken:
                self._answer_with(walk, rng, walk.chain[-2], CONFUSED[walk.relations[-1]], verbose)
            else:
                self._step(walk, rng, verbose)

    def _stray(self, walk: _Walk, rng: random.Random, slips: Slips) -> None:
        """Take some turns, most of them bad, and do not answer."""
        verbose = slips.favourite if rng.random() < slips.verbose else None
        heavy = replace(slips, irrelevant=0.35, duplicate=0.25, recheck=0.7)
        for _ in range(rng.randint(1, slips.stray)):
            if slips.misread and self._misread(walk, rng, slips, verbose):
                continue
            if self._detour(walk, rng, heavy, verbose):
                continue
            if walk.progress == walk.hops or len(walk.queries) + walk.hops - walk.progress >= self.max_searches:
                return
            if walk.progress and len(walk.chain[walk.progress - 1].facts) > 1 and rng.random() < 0.3:
                self._search_wrong(walk, rng, verbose)
            else:
                self._step(walk, rng, verbose)

    def _step(self, walk: _Walk, rng: random.Random, verbose: float | None) -> None:
        """The right thing: search for the next fact, or answer."""
        at = walk.progress
        thought = self._filled(rng, _known(walk), verbose)
        if at == walk.hops:
            self._answer(walk, [*thought, "done", "."], walk.chain[-1].name)
        else:
            relation, name = walk.relations[at], walk.chain[at].name
            self._search(walk, [*thought, "need", relation, "of", name], relation, name)

    def _detour(self, walk: _Walk, rng: random.Random, slips: Slips, verbose: float | None) -> bool:
        """Perhaps a search that does not help; whether one was made."""
        if len(walk.queries) + walk.hops - walk.progress >= self.max_searches:
            return False
        again = slips.recheck if walk.progress == walk.hops else slips.duplicate
        if walk.queries and rng.random() < again:
            relation, name = walk.queries[-1]
            thought = self._filled(rng, [*_known(walk), "|search", "again", "for", relation, "of", name], verbose)
        elif rng.random() < slips.irrelevant:
            relation, name = self._irrelevant(walk, rng)
            thought = self._filled(rng, [*_known(walk), "|maybe", relation, "of", name, "is", "useful"], verbose)
        else:
            return False
        self._search(walk, thought, relation, name)
        return True

    def _irrelevant(self, walk: _Walk, rng: random.Random) -> tuple[str, str]:
        """A query about something that was read about and is not on the chain, or one that names nothing in particular."""
        names = {e.name for e in walk.chain}
        met = [self.world.entities[id] for id in sorted(walk.seen)]
        others = [self.world.entities[value] for e in met for value in e.facts.values()]
        others = [e for e in others + met if e.name not in names]
        if not others:
            pending = walk.relations[walk.progress] if walk.progress < walk.hops else ""
            return rng.choice([r for r in RELATIONS if r != pending]), walk.chain[0].kind
        entity = rng.choice(others)
        return rng.choice(list(entity.facts)), entity.name

    def _take_wrong(self, walk: _Walk, rng: random.Random, verbose: float | None) -> None:
        """Go wrong at the last fact that was found: answer with, or search on from, another value, and then answer."""
        if walk.progress < walk.hops:
            entity = self._search_wrong(walk, rng, verbose)
            relation = rng.choice(list(entity.facts))
        else:
            entity = walk.chain[-2]
            relation = rng.choice([r for r in entity.facts if r != walk.relations[-1]] or list(entity.facts))
        self._answer_with(walk, rng, entity, relation, verbose)

    def _misread(self, walk: _Walk, rng: random.Random, slips: Slips, verbose: float | None) -> bool:
        """Perhaps a search that goes on from a fact whose value was copied wrongly; whether one was made."""
        at = walk.progress
        if not at or len(walk.queries) + walk.hops - at >= self.max_searches or rng.random() >= slips.misread:
            return False
        first, last = walk.chain[at].name.split()
        other = rng.choice(list(self.world.entities.values())).name.split()
        name = (
            f"{first} {_SLIP}{other[1]}" if rng.random() < 0.6 else f"{_SLIP}{other[0]} {rng.choice((last, other[1]))}"
        )
        found = ["found", walk.relations[at - 1], "of", walk.chain[at - 1].name, ":", *name.split(), "."]
        thought = self._filled(rng, found, verbose)
        if at == walk.hops:
            relation, name = walk.relations[-1], walk.chain[-2].name
            self._search(walk, [*thought, f"{_SLIP}search", "again", "for", relation, "of", name], relation, name)
        else:
            relation, name = walk.relations[at], name.replace(_SLIP, "")
            self._search(walk, [*thought, "need", relation, "of", name], relation, name)
        return True

    def _answer_with(
        self, walk: _Walk, rng: random.Random, entity: Entity, relation: str, verbose: float | None
    ) -> None:
        """Answer with a fact that was not asked for."""
        value = self.world.entities[entity.facts[relation]].name
        thought = self._filled(rng, ["found", f"|{relation}", "of", entity.name, ":", value, "."], verbose)
        self._answer(walk, [*thought, "done", "."], value)

    def _search_wrong(self, walk: _Walk, rng: random.Random, verbose: float | None) -> Entity:
        """Search the next relation of a value that is not the one asked for; returns whose that is."""
        at = walk.progress
        before = walk.chain[at - 1]
        taken = rng.choice([r for r in before.facts if r != walk.relations[at - 1]] or list(before.facts))
        entity = self.world.entities[before.facts[taken]]
        thought = self._filled(rng, ["found", f"|{taken}", "of", before.name, ":", entity.name, "."], verbose)
        relation = rng.choice(list(entity.facts))
        self._search(walk, [*thought, "need", relation, "of", entity.name], relation, entity.name)
        return entity

    def _filled(self, rng: random.Random, thought: Sequence[str], verbose: float | None) -> list[str]:
        """Perhaps filled: ``verbose`` is ``Slips.favourite`` in a trajectory that fills its thoughts."""
        if verbose is None or rng.random() >= 0.8:
            return list(thought)
        filler = _FILLERS[0] if verbose and rng.random() < verbose else rng.choice(_FILLERS)
        return [f"{_SLIP}{filler}", *thought]

    def _search(self, walk: _Walk, thought: Sequence[str], relation: str, name: str) -> None:
        self._act(walk, ["<think>", *thought, "</think>", "<search>", relation, name, "</search>"])
        query = f"{relation} {name}"
        self._fetch([query])
        text, ids, passages = self._found[query]
        walk.text.append(text)
        walk.ids += ids
        walk.sampled += [False] * len(ids)
        walk.slips += [False] * len(ids)
        walk.seen |= set(passages)
        walk.queries.append((relation, name))

    def _answer(self, walk: _Walk, thought: Sequence[str], name: str, slip: str = "") -> None:
        self._act(walk, ["<think>", *thought, "</think>", "<answer>", f"{slip}{name}", "</answer>"])
        walk.answered = True

    def _act(self, walk: _Walk, words: Sequence[str]) -> None:
        for i, word in enumerate(words):
            text = word.removeprefix(_SLIP)
            text = f" {text}" if i else text
            if text not in self._word_ids:
                self._word_ids[text] = self.tokenizer.encode(text, add_special_tokens=False)
            ids = self._word_ids[text]
            walk.text.append(text)
            walk.ids += ids
            walk.sampled += [True] * len(ids)
            walk.slips += [word.startswith(_SLIP)] + [False] * (len(ids) - 1)

    def _fetch(self, queries: Sequence[str]) -> None:
        new = [query for query in dict.fromkeys(queries) if query not in self._found]
        for query, passages in zip(new, self.retriever.search(new, self.topk) if new else (), strict=True):
            text, ids = observation(self.tokenizer, passages, self.max_observation_tokens)
            self._found[query] = text, ids, tuple(p.id for p in passages)


def write_gold(path: Path, world: World, questions: Sequence[Question], reader: Reader) -> None:
    """Write the efficient trajectory of each question, a line of ``id`` and ``text`` each: what ``distill.gold`` reads.

    Words and prompts are those of ``reader``'s policy; what comes back is what BM25 finds over the world's passages.
    """
    with TemporaryDirectory() as directory:
        index = Bm25Index.build(world.passages, Path(directory) / "index")
        writer = DemonstrationWriter(world, index, reader.tokenizer, reader.prompts)
        rows = [{"id": question.id, "text": writer.clean_text(question)} for question in questions]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def batches(
    writers: Sequence[DemonstrationWriter],
    *,
    size: int,
    drills: int,
    slips: Slips,
    seed: int,
    privileged: float = 0.5,
    off_track: float = 0.6,
) -> Iterator[list[Demonstration]]:
    """Batches without end: ``drills`` of clean one-hop trajectories (twice as many, they are short), then the mixture.

    ``privileged`` is the share of demonstrations beside a reference, ``off_track`` the share of those from a bad start.
    """
    rng = random.Random(seed)
    pools = [(w, [q for s in ("train", "dev", "test") for q in w.world.questions(s, 1500, seed)]) for w in writers]
    for step in itertools.count():
        rows = [(writer, rng.choice(questions)) for writer, questions in rng.choices(pools, k=size)]
        if step < drills:
            easy = [
                next(q for q in iter(lambda: rng.choice(pools[0][1]), None) if q.hops == 1) for _ in range(2 * size)
            ]
            yield [pools[0][0].plain(rng, question, CLEAN) for question in easy]
        else:
            yield [
                writer.privileged(rng, question, slips, off_track=off_track)
                if rng.random() < privileged
                else writer.plain(rng, question, slips)
                for writer, question in rows
            ]


def _known(walk: _Walk) -> list[str]:
    """The thought that states the last fact that was found on the chain."""
    at = walk.progress
    return ["found", walk.relations[at - 1], "of", walk.chain[at - 1].name, ":", walk.chain[at].name, "."] if at else []


def _plan(walk: _Walk, rng: random.Random, slips: Slips) -> tuple[str, int]:
    """What makes the answer wrong, if anything does, and after how many facts."""
    draw = rng.random()
    early = slips.early[min(walk.hops, 4) - 2] if walk.hops > 1 else slips.early[0]
    if draw < early:
        return (
            ("early", rng.randint(walk.hops - 1 if slips.one_short else 1, walk.hops - 1)) if walk.hops > 1 else ("", 0)
        )
    if draw < early + slips.give_up:
        return "give_up", rng.randint(0, walk.hops)
    if draw < early + slips.give_up + slips.wrong:
        return "wrong", rng.randint(1, walk.hops)
    if slips.confused and walk.relations[-1] in CONFUSED and rng.random() < slips.confused:
        return "confused", walk.hops
    return "", 0
