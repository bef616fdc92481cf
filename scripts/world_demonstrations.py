"""Demonstrations of searching in the small world: sloppy ones under the plain prompt, efficient ones with a reference.

A policy trained on them resembles an instruct model in the real world: it knows the protocol, wastes searches and words, is
often wrong, and follows an example in its prompt, even from a bad start.

    python scripts/world_demonstrations.py runs/laboratory-world

Writes the efficient trajectories of that world's training questions into its ``demonstrations.jsonl``, for
``pairs.references_by = "gold"``. It also works for the hard world.
"""

import itertools
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from search_e1.config import PolicyConfig, Prompts
from search_e1.data.corpus import Corpus
from search_e1.data.questions import load_questions
from search_e1.data.world import HARD, RELATIONS, SPLITS, USUAL, Entity, World, make_world
from search_e1.retrieval.base import Retriever
from search_e1.retrieval.bm25 import Bm25Index
from search_e1.text.prompts import observation, plain_prompt, privileged_prompt
from search_e1.training.policy import Reader, load_reader
from search_e1.types import Question, Sample

_SLIP = "|"  # prefix of a word whose choice is a slip; words that follow from it are not marked

_TOPK, _MAX_OBSERVATION_TOKENS = 2, 128
_MAX_SEARCHES = 5  # bounds the detours: a demonstration never needs more

_FILLERS = (
    "let me think about the question step by step .",
    "okay so I should look at what I know so far and decide what to do next .",
    "I have to be careful here and read the documents again .",
    "the question is not easy but I can search for more .",
)

PHRASES = " ".join([*_FILLERS, "found need done search again for maybe of is useful I give up unknown : ."])
"""Every word of a thought except names and relations of the world, for the tokenizer's vocabulary."""


@dataclass(frozen=True, slots=True)
class Slips:
    """How sloppy a demonstration is."""

    irrelevant: float = 0.15
    """Probability, at each turn, of a search that does not help."""
    duplicate: float = 0.12
    """Probability, at each turn, of repeating the last search."""
    recheck: float = 0.3
    """Probability, at each turn, of another search even though the evidence is complete."""
    early: tuple[float, float, float] = (0.2, 0.2, 0.2)
    """Shares of trajectories of two, three and four hops that answer with an intermediate entity."""
    one_short: bool = False
    """Early answers stop exactly one fact short, rather than anywhere."""
    give_up: float = 0.08
    """Share of trajectories that answer with ``unknown``."""
    wrong: float = 0.18
    """Share of trajectories that at some point take the value of another relation."""
    confused: float = 0.0
    """Share of the remaining trajectories that confuse the last relation, if it is in ``CONFUSED``, with another."""
    verbose: float = 0.5
    """Share of trajectories that pad their thoughts."""
    favourite: float = 0.0
    """Share of the padding that is always the same sentence; the rest is random."""
    misread: float = 0.0
    """Probability, at each turn of a bad start, of continuing with a name that is in no passage."""
    stray: int = 3
    """Maximum turns of a bad start."""

    def correct(self) -> "Slips":
        """The same inefficiency, without the slips that lead to a wrong answer."""
        return replace(self, early=(0.0, 0.0, 0.0), give_up=0.0, wrong=0.0, confused=0.0)


CLEAN = Slips(irrelevant=0, duplicate=0, recheck=0, early=(0, 0, 0), give_up=0, wrong=0, verbose=0)
HABITS = Slips(early=(0.15, 0.65, 0.7), one_short=True, wrong=0.05, confused=0.7, misread=0.35, stray=4)
"""Some slips are more likely than the right action, so that greedy trajectories are wrong too."""
WORDY = replace(HABITS, verbose=0.9, favourite=0.85)
"""Padded thoughts are more likely than plain ones. They cost only tokens: a reward for the answer ignores them."""
CONFUSED = {
    "employer": "birthplace",
    "studio": "director",
    "headquarters": "founder",
    "mayor": "country",
    "publisher": "author",
}


class DemonstrationWriter:
    """Writes demonstrations of one world, with the observations that the rollout loop would insert."""

    def __init__(self, world: World, retriever: Retriever, tokenizer: Any, prompts: Prompts) -> None:
        self.world, self.retriever, self.tokenizer, self.prompts = world, retriever, tokenizer, prompts
        self._word_ids: dict[str, list[int]] = {}
        self._found: dict[str, tuple[str, tuple[int, ...], tuple[str, ...]]] = {}
        self._retrieve([f"{relation} {e.name}" for e in world.entities.values() for relation in e.facts])

    def plain(self, rng: random.Random, question: Question, slips: Slips) -> Sample:
        """A trajectory with slips under the plain prompt; all its actions are imitated."""
        walk = Walk(self, question, rng)
        walk.go(slips)
        return walk.sample(plain_prompt(self.tokenizer, self.prompts, question.text), imitate_slips=True)

    def privileged(self, rng: random.Random, question: Question, slips: Slips, *, off_track: float) -> Sample:
        """An efficient trajectory under the privileged prompt.

        With probability ``off_track`` it continues a sloppy beginning. Slips in that are not imitated, but the words that
        follow from them are: a teacher that sees a strange phrase should complete it and then act correctly.
        """
        reference = Walk(self, question, rng)
        reference.go(slips.correct() if rng.random() < 0.5 else CLEAN)
        walk = Walk(self, question, rng)
        if rng.random() < off_track:
            walk.stray(slips)
        if rng.random() < 0.15 and 0 < walk.progress < walk.hops:
            walk.answer([*walk.known(), "|done", "."], walk.chain[-1].name)  # too early, but the answer is known
        else:
            walk.go(CLEAN)
        prompt = privileged_prompt(self.tokenizer, self.prompts, question.text, "".join(reference.text))
        return walk.sample(prompt, imitate_slips=False)

    def clean_text(self, question: Question) -> str:
        """The text of the efficient trajectory: one search per hop, then the answer."""
        walk = Walk(self, question, random.Random(0))
        walk.go(CLEAN)
        return "".join(walk.text)

    def ids(self, text: str) -> list[int]:
        if text not in self._word_ids:
            self._word_ids[text] = self.tokenizer.encode(text, add_special_tokens=False)
        return self._word_ids[text]

    def observe(self, query: str) -> tuple[str, tuple[int, ...], tuple[str, ...]]:
        """Text and ids of the observation, and ids of its passages."""
        if query not in self._found:
            self._retrieve([query])
        return self._found[query]

    def _retrieve(self, queries: Sequence[str]) -> None:
        queries = list(dict.fromkeys(queries))
        for query, passages in zip(queries, self.retriever.search(queries, _TOPK), strict=True):
            text, ids = observation(self.tokenizer, passages, _MAX_OBSERVATION_TOKENS)
            self._found[query] = text, ids, tuple(p.id for p in passages)


class Walk:
    """A trajectory under construction, and the facts found so far."""

    def __init__(self, writer: DemonstrationWriter, question: Question, rng: random.Random) -> None:
        self.writer, self.rng, self.question = writer, rng, question
        self.entities = writer.world.entities
        self.chain = [self.entities[id] for id in question.metadata["entities"]]  # from the named entity to the answer
        self.relations: Sequence[str] = question.metadata["relations"]
        self.hops = len(self.relations)
        self.text: list[str] = []
        self.ids: list[int] = []
        self.sampled: list[bool] = []  # for each id: part of an action, not of an observation
        self.slips: list[bool] = []  # for each id: chosen by a slip
        self.seen: set[str] = set()  # ids of the retrieved passages
        self.queries: list[tuple[str, str]] = []  # relation, name
        self.padding: float | None = None  # ``Slips.favourite`` while thoughts are padded
        self.answered = False

    @property
    def progress(self) -> int:
        """Number of the chain's facts, from the first on, that the retrieved passages state."""
        return next((h for h in range(self.hops) if self.chain[h].id not in self.seen), self.hops)

    @property
    def searches_spent(self) -> bool:
        """Whether all remaining searches are needed."""
        return len(self.queries) + self.hops - self.progress >= _MAX_SEARCHES

    def sample(self, prompt_ids: tuple[int, ...], *, imitate_slips: bool) -> Sample:
        mask = (int(s and (imitate_slips or not slip)) for s, slip in zip(self.sampled, self.slips, strict=True))
        return Sample(
            question_id=self.question.id, prompt_ids=prompt_ids, response_ids=tuple(self.ids), action_mask=tuple(mask)
        )

    def go(self, slips: Slips) -> None:
        """Take turns up to the answer, or to the end of a plan that makes the answer wrong."""
        self._draw_padding(slips)
        plan, turn = self._plan(slips)
        while not self.answered:
            at = self.progress
            mistaken = plan == "confused" and at == turn  # confident: does not check first
            if not mistaken and self._detour(slips):
                continue
            if plan == "give_up" and at >= turn:
                self.answer([*self.known(), "|I", "give", "up", "."], "unknown", slip="|")
            elif plan == "early" and at == turn:
                self.answer([*self.known(), "|done", "."], self.chain[at].name, slip="|")
            elif plan == "wrong" and at == turn:
                self._take_wrong()
            elif mistaken:
                self._answer_with(self.chain[-2], CONFUSED[self.relations[-1]])
            else:
                self.step()

    def stray(self, slips: Slips) -> None:
        """Take some turns, most of them bad, without an answer."""
        self._draw_padding(slips)
        heavy = replace(slips, irrelevant=0.35, duplicate=0.25, recheck=0.7)
        for _ in range(self.rng.randint(1, slips.stray)):
            if (slips.misread and self._misread(slips)) or self._detour(heavy):
                continue
            if self.progress == self.hops or self.searches_spent:
                return
            if self.progress and len(self.chain[self.progress - 1].facts) > 1 and self.rng.random() < 0.3:
                self._search_wrong()
            else:
                self.step()

    def step(self) -> None:
        """The right action: search for the next fact, or answer."""
        at = self.progress
        thought = self._padded(self.known())
        if at == self.hops:
            self.answer([*thought, "done", "."], self.chain[-1].name)
        else:
            relation, name = self.relations[at], self.chain[at].name
            self._search([*thought, "need", relation, "of", name], relation, name)

    def _detour(self, slips: Slips) -> bool:
        """Make a useless search with some probability; returns whether one was made."""
        if self.searches_spent:
            return False
        again = slips.recheck if self.progress == self.hops else slips.duplicate
        if self.queries and self.rng.random() < again:
            relation, name = self.queries[-1]
            thought = [*self.known(), "|search", "again", "for", relation, "of", name]
        elif self.rng.random() < slips.irrelevant:
            relation, name = self.irrelevant()
            thought = [*self.known(), "|maybe", relation, "of", name, "is", "useful"]
        else:
            return False
        self._search(self._padded(thought), relation, name)
        return True

    def irrelevant(self) -> tuple[str, str]:
        """A query about an entity that was read about and is not on the chain, or about nothing in particular."""
        names = {e.name for e in self.chain}
        met = [self.entities[id] for id in sorted(self.seen)]
        others = [self.entities[value] for e in met for value in e.facts.values()]
        others = [e for e in others + met if e.name not in names]
        if not others:
            pending = self.relations[self.progress] if self.progress < self.hops else ""
            return self.rng.choice([r for r in RELATIONS if r != pending]), self.chain[0].kind
        entity = self.rng.choice(others)
        return self.rng.choice(list(entity.facts)), entity.name

    def _take_wrong(self) -> None:
        """Go wrong at the last known fact: answer with another value, or search on from it and then answer."""
        if self.progress < self.hops:
            entity = self._search_wrong()
            relation = self.rng.choice(list(entity.facts))
        else:
            entity = self.chain[-2]
            relation = self._other_relation(entity, self.relations[-1])
        self._answer_with(entity, relation)

    def _misread(self, slips: Slips) -> bool:
        """With some probability, search on from a wrongly copied name; returns whether it did."""
        at, rng = self.progress, self.rng
        if not at or self.searches_spent or rng.random() >= slips.misread:
            return False
        first, last = self.chain[at].name.split()
        other = rng.choice(list(self.entities.values())).name.split()
        name = f"{first} {_SLIP}{other[1]}" if rng.random() < 0.6 else f"{_SLIP}{other[0]} {rng.choice((last, other[1]))}"
        thought = self._padded(self._stated(self.relations[at - 1], self.chain[at - 1].name, *name.split()))
        if at == self.hops:
            relation, name = self.relations[-1], self.chain[-2].name
            self._search([*thought, f"{_SLIP}search", "again", "for", relation, "of", name], relation, name)
        else:
            relation, name = self.relations[at], name.replace(_SLIP, "")
            self._search([*thought, "need", relation, "of", name], relation, name)
        return True

    def _answer_with(self, entity: Entity, relation: str) -> None:
        """Answer with a fact that was not asked for."""
        value = self.entities[entity.facts[relation]].name
        thought = self._padded(self._stated(f"|{relation}", entity.name, value))
        self.answer([*thought, "done", "."], value)

    def _search_wrong(self) -> Entity:
        """Search for a fact about a value that is not the one asked for; returns the entity searched for."""
        at = self.progress
        before = self.chain[at - 1]
        taken = self._other_relation(before, self.relations[at - 1])
        entity = self.entities[before.facts[taken]]
        thought = self._padded(self._stated(f"|{taken}", before.name, entity.name))
        relation = self.rng.choice(list(entity.facts))
        self._search([*thought, "need", relation, "of", entity.name], relation, entity.name)
        return entity

    def _other_relation(self, entity: Entity, relation: str) -> str:
        return self.rng.choice([r for r in entity.facts if r != relation] or list(entity.facts))

    def _plan(self, slips: Slips) -> tuple[str, int]:
        """The plan that makes the answer wrong ("" for none), and the number of facts after which it applies."""
        rng, hops = self.rng, self.hops
        draw = rng.random()
        early = slips.early[max(0, min(hops, 4) - 2)]
        if draw < early:
            return ("early", rng.randint(hops - 1 if slips.one_short else 1, hops - 1)) if hops > 1 else ("", 0)
        if draw < early + slips.give_up:
            return "give_up", rng.randint(0, hops)
        if draw < early + slips.give_up + slips.wrong:
            return "wrong", rng.randint(1, hops)
        if slips.confused and self.relations[-1] in CONFUSED and rng.random() < slips.confused:
            return "confused", hops
        return "", 0

    def known(self) -> list[str]:
        """A thought that states the last known fact of the chain."""
        at = self.progress
        return self._stated(self.relations[at - 1], self.chain[at - 1].name, self.chain[at].name) if at else []

    def _stated(self, relation: str, name: str, *value: str) -> list[str]:
        return ["found", relation, "of", name, ":", *value, "."]

    def _draw_padding(self, slips: Slips) -> None:
        self.padding = slips.favourite if self.rng.random() < slips.verbose else None

    def _padded(self, thought: Sequence[str]) -> list[str]:
        rng, favourite = self.rng, self.padding
        if favourite is None or rng.random() >= 0.8:
            return list(thought)
        filler = _FILLERS[0] if favourite and rng.random() < favourite else rng.choice(_FILLERS)
        return [f"{_SLIP}{filler}", *thought]

    def _search(self, thought: Sequence[str], relation: str, name: str) -> None:
        self._act(["<think>", *thought, "</think>", "<search>", relation, name, "</search>"])
        text, ids, passages = self.writer.observe(f"{relation} {name}")
        self._append(text, ids, sampled=False)
        self.seen |= set(passages)
        self.queries.append((relation, name))

    def answer(self, thought: Sequence[str], name: str, slip: str = "") -> None:
        self._act(["<think>", *thought, "</think>", "<answer>", f"{slip}{name}", "</answer>"])
        self.answered = True

    def _act(self, words: Sequence[str]) -> None:
        for i, word in enumerate(words):
            text = word.removeprefix(_SLIP)
            text = f" {text}" if i else text
            self._append(text, self.writer.ids(text), slip=word.startswith(_SLIP))

    def _append(self, text: str, ids: Sequence[int], *, sampled: bool = True, slip: bool = False) -> None:
        self.text.append(text)
        self.ids += ids
        self.sampled += [sampled] * len(ids)
        self.slips += [slip and not i for i in range(len(ids))]


def write_gold(path: Path, world: World, questions: Sequence[Question], reader: Reader) -> None:
    """Write the efficient trajectory of each question, one line of ``id`` and ``text`` each, in the format of ``pairs.gold``.

    Prompts and tokenizer come from ``reader``; observations from BM25 over the world's passages.
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
) -> Iterator[list[Sample]]:
    """Endless batches: first ``drills`` batches of clean one-hop trajectories (twice the size, since they are short), then the
    mixture.

    ``privileged``: share of demonstrations with a reference; ``off_track``: share of these that begin badly.
    """
    rng = random.Random(seed)
    pools = [(w, [q for s in SPLITS for q in w.world.questions(s, 1500, seed)]) for w in writers]
    for step in itertools.count():
        rows = [(writer, rng.choice(questions)) for writer, questions in rng.choices(pools, k=size)]
        if step < drills:
            drawn = (rng.choice(pools[0][1]) for _ in itertools.count())
            easy = list(itertools.islice((q for q in drawn if q.hops == 1), 2 * size))
            yield [pools[0][0].plain(rng, question, CLEAN) for question in easy]
        else:
            yield [
                writer.privileged(rng, question, slips, off_track=off_track)
                if rng.random() < privileged
                else writer.plain(rng, question, slips)
                for writer, question in rows
            ]


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    there = {passage.id: passage.text for passage in Corpus(directory / "corpus.jsonl")}
    worlds = [make_world(difficulty=difficulty) for difficulty in (USUAL, HARD)]
    made = next((world for world in worlds if {p.id: p.text for p in world.passages} == there), None)
    if made is None:
        sys.exit(f"{directory}: not a world of `search-e1 world`, whose facts would be known")
    reader = load_reader("small", PolicyConfig(model="small"))
    write_gold(directory / "demonstrations.jsonl", made, load_questions(directory / "train.jsonl"), reader)
