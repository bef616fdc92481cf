"""The small world: the same for a seed, splits that do not touch, questions that its passages answer."""

import json
import re
from collections import Counter

import pytest

from search_e1.data.world import HARD, RELATIONS, SPLITS, Entity, World, make_world, name_halves, write
from search_e1.errors import DataError
from search_e1.retrieval.bm25 import Bm25Index
from search_e1.types import Passage


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


def test_a_seed_makes_one_world(world):
    assert make_world().passages == world.passages
    assert make_world(1).passages != world.passages
    assert world.questions("dev", 50, seed=3) == world.questions("dev", 50, seed=3)
    assert world.questions("dev", 50, seed=3) != world.questions("dev", 50, seed=4)


def test_it_has_the_size_and_the_homonyms_that_it_claims(world):
    assert len(world.entities) == 4736
    assert len({e.kind for e in world.entities.values()}) == 6
    assert len(RELATIONS) == 12
    bearers = Counter(e.name for e in world.entities.values())
    assert set(bearers.values()) == {1, 2}
    assert 2 * sum(n == 2 for n in bearers.values()) / 4736 == pytest.approx(0.25, abs=0.01)


def test_homonyms_are_of_different_kinds(world):
    assert len({(e.name, e.kind) for e in world.entities.values()}) == len(world.entities)


def test_names_are_made_of_135_and_150_halves(world):
    first, last = (set(halves) for halves in name_halves())
    assert (len(first), len(last)) == (135, 150)
    for entity in world.entities.values():
        a, b = entity.name.split()
        assert a in first
        assert b in last


def test_facts_and_names_stay_within_a_split(world):
    for entity in world.entities.values():
        assert {world.entities[value].split for value in entity.facts.values()} == {entity.split}
    names = {split: {e.name for e in world.entities.values() if e.split == split} for split in SPLITS}
    assert not names["train"] & names["dev"]
    assert not names["train"] & names["test"]
    assert not names["dev"] & names["test"]


def test_questions_of_two_splits_share_no_entity(world):
    met = {s: {i for q in world.questions(s, 600) for i in q.metadata["entities"]} for s in SPLITS}
    assert not met["train"] & met["dev"]
    assert not met["train"] & met["test"]
    assert not met["dev"] & met["test"]


def test_practice_worlds_share_no_name_with_the_world(world):
    practice = make_world(1, practice=True)
    assert not {e.name for e in practice.entities.values()} & {e.name for e in world.entities.values()}


def test_a_chain_is_stated_by_its_passages(world):
    passages = {p.id: p for p in world.passages}
    for question in world.questions("test", 400):
        entities, relations = question.metadata["entities"], question.metadata["relations"]
        assert question.hops == len(relations) == len(entities) - 1
        for here, relation, there in zip(entities[:-1], relations, entities[1:], strict=True):
            assert f"{relation} {passages[there].title}" in passages[here].text
        assert question.answers == (passages[entities[-1]].title,)
        assert passages[entities[0]].title in question.text


def test_a_question_is_right_about_one_entity_only(world):
    # A name may be shared, but what is asked of it first is stated about one of its bearers only.
    for question in world.questions("dev", 400):
        start = world.entities[question.metadata["entities"][0]]
        bearers = [e for e in world.entities.values() if e.name == start.name]
        assert [e for e in bearers if question.metadata["relations"][0] in e.facts] == [start]


def test_the_hard_world_has_longer_chains_and_three_bearers_of_a_name():
    hard = make_world(difficulty=HARD)
    names = Counter(e.name for e in hard.entities.values())
    shared = [e for e in hard.entities.values() if names[e.name] > 1]
    assert {names[e.name] for e in shared} == {3}
    assert len(shared) / len(hard.entities) == pytest.approx(0.6, abs=0.01)
    assert all(len({e.kind for e in shared if e.name == name}) == 3 for name in {e.name for e in shared[:50]})
    questions = hard.questions("train", 400)
    assert {q.hops for q in questions} == {3, 4, 5, 6}
    for question in questions:
        bearers = [e for e in hard.entities.values() if e.name == hard.entities[question.metadata["entities"][0]].name]
        assert [e.id for e in bearers if question.metadata["relations"][0] in e.facts] == [question.metadata["entities"][0]]


def test_a_passage_reads_as_documented(world):
    film = next(p for p in world.passages if world.entities[p.id].kind == "film")
    assert re.fullmatch(rf"{film.title} is a film with (director|studio) \w+ \w+ and (director|studio) \w+ \w+\.", film.text)
    assert Passage.from_contents(film.id, film.contents) == film


def test_bm25_finds_each_step_of_a_chain(world, tmp_path):
    index = Bm25Index.build(world.passages, tmp_path / "index")
    for question in world.questions("dev", 60):
        entities = [world.entities[i] for i in question.metadata["entities"]]
        queries = [f"{r} {e.name}" for r, e in zip(question.metadata["relations"], entities, strict=False)]
        found = index.search(queries, 2)
        assert all(e.id in [p.id for p in hits] for e, hits in zip(entities, found, strict=False))


def test_questions_differ_and_cover_the_hops(world):
    questions = world.questions("train", 1000)
    assert len({q.id for q in questions}) == 1000
    assert {q.hops for q in questions} == {1, 2, 3, 4}


def test_a_split_that_is_none_or_too_small_is_refused(world):
    with pytest.raises(DataError, match="no split 'valid'"):
        world.questions("valid", 5)
    city = Entity("c", "city", "Bodo Baltim", "dev")
    film = Entity("f", "film", "Gula Purdak", "dev", {"director": "c"})
    with pytest.raises(DataError, match="holds only about 1 questions in split 'dev'; ask for fewer than 2"):
        World({"c": city, "f": film}).questions("dev", 2)


def test_written_files_hold_the_world(world, tmp_path):
    write(world, tmp_path / "world", train=20, dev=10, test=5, seed=1)
    lines = {p.stem: p.read_text().splitlines() for p in (tmp_path / "world").iterdir()}
    assert {name: len(rows) for name, rows in lines.items()} == {"corpus": 4736, "train": 20, "dev": 10, "test": 5}
    passage, question = json.loads(lines["corpus"][0]), json.loads(lines["dev"][0])
    assert passage == {"id": world.passages[0].id, "contents": world.passages[0].contents}
    first = world.questions("dev", 10, seed=1)[0]
    assert question == {
        "id": first.id,
        "question": first.text,
        "golden_answers": list(first.answers),
        "metadata": first.metadata,
    }
