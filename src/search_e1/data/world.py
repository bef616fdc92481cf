"""A generated world: entities with invented names, one passage about each, and questions of one to six hops.

It replaces Wikipedia and a question set without a download, and is determined by a seed. Entities are divided into three splits
and no fact crosses splits, so that questions of different splits share no entity and no name.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from search_e1.data.lines import write_lines
from search_e1.data.questions import to_record
from search_e1.errors import DataError
from search_e1.types import Passage, Question

SPLITS = ("train", "dev", "test")
BENCHMARK = "world"
_SHARES = {"train": 0.5, "dev": 0.25, "test": 0.25}

KINDS = {"person": 1800, "city": 600, "country": 135, "film": 1000, "company": 500, "book": 700}
"""Kind of entity -> number of entities."""

RELATIONS = {
    "director": ("film", "person"),
    "studio": ("film", "company"),
    "birthplace": ("person", "city"),
    "spouse": ("person", "person"),
    "employer": ("person", "company"),
    "country": ("city", "country"),
    "mayor": ("city", "person"),
    "founder": ("company", "person"),
    "headquarters": ("company", "city"),
    "capital": ("country", "city"),
    "author": ("book", "person"),
    "publisher": ("book", "company"),
}
"""Relation -> (kind of its subject, kind of its value). The subject's kind distinguishes homonyms."""

_SYNONYMS = {
    "director": "filmmaker",
    "studio": "producer",
    "birthplace": "hometown",
    "spouse": "partner",
    "employer": "workplace",
    "country": "nation",
    "mayor": "head",
    "founder": "creator",
    "headquarters": "base",
    "capital": "seat",
    "author": "writer",
    "publisher": "imprint",
}
_WORDINGS = (
    "What is {chain}?",
    "Who or what is {chain}?",
    "Name {chain}.",
    "Tell me {chain}.",
    "I would like to know {chain}.",
    "Find out {chain}, please.",
)


@dataclass(frozen=True, slots=True)
class Difficulty:
    """Parameters that determine how hard a world's questions are."""

    hops: dict[int, float]
    """Number of hops -> share of questions."""
    homonyms: float
    """Share of entities that share their name with entities of other kinds."""
    namesakes: int
    """Entities per shared name. If more than ``topk`` share a name, searching for the name alone may miss the right one."""


USUAL = Difficulty(hops={1: 0.3, 2: 0.4, 3: 0.25, 4: 0.05}, homonyms=0.25, namesakes=2)
HARD = Difficulty(hops={3: 0.2, 4: 0.3, 5: 0.3, 6: 0.2}, homonyms=0.6, namesakes=3)


@dataclass(frozen=True, slots=True)
class Entity:
    """A named entity and the facts that its passage states."""

    id: str
    kind: str
    name: str
    split: str
    facts: dict[str, str] = field(default_factory=dict)
    """Relation -> id of its value, in the order of the passage."""


@dataclass(frozen=True, slots=True)
class World:
    """All entities by id; built by ``make_world``."""

    entities: dict[str, Entity]
    difficulty: Difficulty = USUAL

    @property
    def passages(self) -> list[Passage]:
        """One passage per entity, with the entity's id, and its name as title."""
        return [Passage(id=e.id, title=e.name, text=self._text(e)) for e in self.entities.values()]

    def _text(self, entity: Entity) -> str:
        facts = [f"{relation} {self.entities[value].name}" for relation, value in entity.facts.items()]
        listed = " and ".join([", ".join(facts[:-1]), facts[-1]] if len(facts) > 1 else facts)
        return f"{entity.name} is a {entity.kind} with {listed}."

    def questions(self, split: str, n: int, seed: int = 0) -> list[Question]:
        """``n`` distinct questions about entities of ``split``, determined by ``seed``.

        ``metadata`` holds the gold chain: ``entities`` (ids, the answer last), ``relations`` (one fewer) and ``hops``.

        Raises:
            DataError: an unknown split, or fewer than ``n`` questions in it.
        """
        if split not in SPLITS:
            raise DataError(f"the world has no split {split!r}; it has {', '.join(SPLITS)}")
        rng = random.Random(f"{seed}/{split}")
        starts, hops = [e for e in self.entities.values() if e.split == split], self.difficulty.hops
        made: dict[tuple[str, ...], Question] = {}
        misses = 0  # consecutive draws without a new question
        while len(made) < n and misses < 1000:
            misses += 1
            chain = self._chain(rng, rng.choice(starts), rng.choices(list(hops), list(hops.values()))[0])
            if chain is None:
                continue
            entities, relations = chain
            key = (entities[0].id, *relations)
            if key not in made:
                made[key] = _question(rng, f"world-{split}-{seed}-{len(made)}", entities, relations)
                misses = 0
        if len(made) < n:
            raise DataError(f"the world holds only about {len(made)} questions in split {split!r}; ask for fewer than {n}")
        return list(made.values())

    def _chain(self, rng: random.Random, start: Entity, hops: int) -> tuple[list[Entity], list[str]] | None:
        """A random walk of ``hops`` facts that never repeats a name; ``None`` if it ends early."""
        entities, relations = [start], []
        for _ in range(hops):
            met = {e.name for e in entities}
            onward = [r for r, value in entities[-1].facts.items() if self.entities[value].name not in met]
            if not onward:
                return None
            relations.append(rng.choice(onward))
            entities.append(self.entities[entities[-1].facts[relations[-1]]])
        return entities, relations


def make_world(seed: int = 0, *, practice: bool = False, difficulty: Difficulty = USUAL) -> World:
    """The world of a seed: about 4,700 entities and as many passages.

    ``practice`` worlds share no name with other worlds, although their names combine the same halves: a policy trained on
    practice worlds has seen no entity of the others.
    """
    rng = random.Random(f"{seed}/{practice}")
    names = _names(rng, practice)
    entities: dict[str, Entity] = {}
    for split in SPLITS:
        for entity in _part(rng, split, names, difficulty):
            entities[entity.id] = entity
    return World(entities, difficulty)


def _part(rng: random.Random, split: str, names: Iterator[str], difficulty: Difficulty) -> list[Entity]:
    """The entities of one split, with facts among themselves."""
    kinds = [kind for kind, count in KINDS.items() for _ in range(round(count * _SHARES[split]))]
    named: list[list[str]] = [[kind, ""] for kind in kinds]
    order = rng.sample(range(len(kinds)), len(kinds))
    size = difficulty.namesakes
    shared_names = round(difficulty.homonyms * len(kinds) / size)
    while shared_names:
        namesakes = order[-size:]
        if len({kinds[i] for i in namesakes}) < size:
            rng.shuffle(order)
            continue
        name = next(names)
        for i in namesakes:
            named[i][1] = name
        del order[-size:]
        shared_names -= 1
    for i in order:
        named[i][1] = next(names)
    entities = [Entity(f"{split}-{i}", kind, name, split) for i, (kind, name) in enumerate(named)]
    by_kind = {kind: [e for e in entities if e.kind == kind] for kind in KINDS}
    for entity in entities:
        relations = [relation for relation, (about, _) in RELATIONS.items() if about == entity.kind]
        for relation in rng.sample(relations, len(relations)):
            values = [e for e in by_kind[RELATIONS[relation][1]] if e.name != entity.name]
            entity.facts[relation] = rng.choice(values).id
    return entities


def _names(rng: random.Random, practice: bool) -> Iterator[str]:
    """Distinct two-word names in random order; practice worlds use three quarters of all combinations, others the rest."""
    first, last = name_halves()
    grid = [(i, j) for i in range(len(first)) for j in range(len(last)) if ((i + j) % 4 != 0) == practice]
    return (f"{first[i]} {last[j]}" for i, j in rng.sample(grid, len(grid)))


def name_halves() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The 135 first and 150 last halves that every world's names are made of."""
    rng = random.Random("halves")
    # The endings keep names distinct from English stop words and from each other after stemming.
    first = [a + b + c + d for a in "BDFGKLMNPRSTVZ" for b in "aeiou" for c in "bdgklmnrtvz" for d in "aiou"]
    last = [
        a + b + c + d for a in "BCDFGHJKLMNPRSTVWZ" for b in "aeiou" for c in "lmnrx" for d in ("dak", "gorn", "tim", "vok")
    ]
    return tuple(sorted(rng.sample(first, 135))), tuple(sorted(rng.sample(last, 150)))


def _question(rng: random.Random, id: str, entities: Sequence[Entity], relations: Sequence[str]) -> Question:
    words = [relation if rng.random() < 0.5 else _SYNONYMS[relation] for relation in relations]
    start = f"the {entities[0].kind} {entities[0].name}" if rng.random() < 0.5 else entities[0].name
    if rng.random() < 0.3:
        chain = f"{start}'s {words[0]}"
        words = words[1:]
    else:
        chain = start
    for word in words:
        chain = f"the {word} of {chain}"
    return Question(
        id=id,
        text=rng.choice(_WORDINGS).format(chain=chain),
        answers=(entities[-1].name,),
        benchmark=BENCHMARK,
        hops=len(relations),
        metadata={"hops": len(relations), "entities": [e.id for e in entities], "relations": list(relations)},
    )


def write(world: World, directory: Path, *, train: int, dev: int, test: int, seed: int = 0) -> None:
    """Write ``corpus.jsonl``, and the given numbers of questions to ``train.jsonl``, ``dev.jsonl`` and ``test.jsonl``.

    Raises:
        DataError: a split has too few questions; nothing is written.
    """
    questions = {split: world.questions(split, n, seed) for split, n in zip(SPLITS, (train, dev, test), strict=True)}
    directory.mkdir(parents=True, exist_ok=True)
    write_lines(directory / "corpus.jsonl", ({"id": p.id, "contents": p.contents} for p in world.passages))
    for split, rows in questions.items():
        write_lines(directory / f"{split}.jsonl", map(to_record, rows))
