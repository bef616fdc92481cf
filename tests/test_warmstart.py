"""The demonstrations of the small world, and the policy that came of them."""

import itertools
import json
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from search_e1.config import PolicyConfig, RolloutConfig
from search_e1.data.world import World, make_world
from search_e1.retrieval.bm25 import Bm25Index
from search_e1.rollout.demonstrations.file import Demonstrations
from search_e1.rollout.engines.base import BatchEngine, Generation
from search_e1.rollout.engines.torch import TorchEngine
from search_e1.rollout.loop import rollout
from search_e1.rollout.starts import Start, starts
from search_e1.text.prompts import observation, plain_prompt, privileged_prompt
from search_e1.text.protocol import parse_action
from search_e1.training.policy import Policy, load
from search_e1.training.sources import resolve
from search_e1.types import ActionKind, Sample
from world_demonstrations import CLEAN, CONFUSED, HABITS, DemonstrationWriter, Slips, Walk, batches

ROLLOUT = RolloutConfig(
    max_searches=5, topk=2, max_action_tokens=48, max_observation_tokens=128, max_tokens=1024, batch_size=128
)


@pytest.fixture(scope="module")
def small() -> Policy:
    return load("small", PolicyConfig(model="small", device="cpu"))


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


@pytest.fixture(scope="module")
def index(world, tmp_path_factory) -> Bm25Index:
    return Bm25Index.build(world.passages, tmp_path_factory.mktemp("world") / "index")


@pytest.fixture(scope="module")
def writer(world, index, small) -> DemonstrationWriter:
    return DemonstrationWriter(world, index, small.tokenizer, small.prompts)


@given(st.text())
def test_the_small_tokenizer_encodes_any_text_and_back(small, text):
    ids = small.tokenizer.encode(text, add_special_tokens=False)
    assert small.tokenizer.decode(ids, skip_special_tokens=False) == text


def test_a_name_and_a_tag_are_one_token_a_word(small):
    tokens = small.tokenizer.tokenize("<think> need director of Gula Purdak </think> <search> director Gula Purdak </search>")
    assert len(tokens) == 12
    ids = small.tokenizer.encode(" <search> director Gula Purdak </search>", add_special_tokens=False)
    action = parse_action(small.tokenizer.decode(ids))
    assert (action.kind, action.argument) == (ActionKind.SEARCH, "director Gula Purdak")


def test_clean_demonstrations_are_what_the_rollout_loop_would_have_made(writer, world, index, small):
    for question in world.questions("train", 30):
        demonstration = writer.plain(random.Random(0), question, CLEAN)
        assert demonstration.prompt_ids == plain_prompt(small.tokenizer, small.prompts, question.text)
        replayed = _Replay(small.tokenizer, demonstration)
        [trajectory] = rollout(replayed, index, [Start(question, demonstration.prompt_ids)], ROLLOUT, temperature=0.0, seed=0)
        assert trajectory.correct
        assert trajectory.searches == question.hops
        assert trajectory.response_ids == demonstration.response_ids
        assert trajectory.action_mask == demonstration.action_mask
        assert trajectory.text == writer.clean_text(question)


def test_sloppy_demonstrations_are_often_wrong_and_wasteful(writer, world, small):
    rng = random.Random(0)
    questions = world.questions("train", 300)
    right = searches = 0
    for question in questions:
        text = small.tokenizer.decode(writer.plain(rng, question, Slips()).response_ids)
        right += text.endswith(f"<answer> {question.answers[0]} </answer>")
        searches += text.count("<search>")
        assert text.count("<search>") <= 5
    assert 0.5 < right / 300 < 0.75
    assert searches > 1.2 * sum(q.hops for q in questions)


def test_bad_habits_are_more_likely_than_what_is_right(writer, world, small):
    rng = random.Random(0)
    right = {"confused": [], "long": [], "other": []}
    for question in world.questions("train", 400):
        text = small.tokenizer.decode(writer.plain(rng, question, HABITS).response_ids)
        kind = "confused" if question.metadata["relations"][-1] in CONFUSED else "long" if question.hops > 2 else "other"
        right[kind].append(text.endswith(f"<answer> {question.answers[0]} </answer>"))
    shares = {kind: sum(rows) / len(rows) for kind, rows in right.items()}
    assert shares["confused"] < 0.5
    assert shares["long"] < 0.5
    assert shares["other"] > 0.65


@pytest.mark.parametrize("slips", [Slips(), HABITS])
def test_privileged_demonstrations_imitate_no_slip_and_end_right(writer, world, small, slips):
    rng = random.Random(0)
    off_track = 0
    for question in world.questions("train", 200):
        demonstration = writer.privileged(rng, question, slips, off_track=0.6)
        text = small.tokenizer.decode(demonstration.response_ids)
        assert text.endswith(f"<answer> {question.answers[0]} </answer>")
        imitated = [
            small.tokenizer.decode([id])
            for id, m in zip(demonstration.response_ids, demonstration.action_mask, strict=True)
            if m
        ]
        assert " maybe" not in imitated
        assert "<information>" not in imitated
        off_track += " maybe" in text or " again" in text
        prompt = small.tokenizer.decode(demonstration.prompt_ids)
        reference = prompt.split("Example:\n")[1].rsplit("\n", 1)[0]
        assert reference.endswith(f"<answer> {question.answers[0]} </answer>")
        assert demonstration.prompt_ids == privileged_prompt(small.tokenizer, small.prompts, question.text, reference)
    assert off_track > 40


def test_an_irrelevant_search_is_not_the_pending_one(writer, world):
    rng = random.Random(0)
    for question in world.questions("train", 200):
        walk = Walk(writer, question, rng)
        walk.padding = 0.0
        walk.step()
        for _ in range(5):
            relation, name = walk.irrelevant()
            assert name not in {e.name for e in walk.chain}, (relation, name)


def test_batches_are_the_same_for_a_seed(writer):
    def some():
        return list(itertools.islice(batches([writer], size=4, drills=1, slips=Slips(), seed=7), 3))

    first = some()
    assert [len(batch) for batch in first] == [8, 4, 4]
    assert first == some()


def test_the_small_policy_is_small():
    weights = resolve("small") / "model.safetensors"
    assert 1e6 < weights.stat().st_size <= 8e6


def test_observations_fit_the_small_tokenizer(small, world):
    text, ids = observation(small.tokenizer, world.passages[:2], 128)
    assert small.tokenizer.decode(ids) == text
    _, cut = observation(small.tokenizer, world.passages[:2], 30)
    assert len(cut) <= 30
    assert small.tokenizer.decode(cut).endswith("</information>\n\n")


def test_the_small_policy_answers_questions_about_entities_it_has_never_met(small, world, index):
    torch.manual_seed(0)
    generator = TorchEngine(small.model, small.tokenizer, batch_size=64)
    asked = world.questions("dev", 32)
    plain = rollout(generator, index, starts(small.tokenizer, small.prompts, asked), ROLLOUT, temperature=0.0, seed=0)
    assert sum(t.reward for t in plain) / 32 >= 0.35


class _Replay(BatchEngine):
    """A generator that says what a demonstration says."""

    context_length = 2048

    def __init__(self, tokenizer, demonstration: Sample) -> None:
        self.tokenizer = tokenizer
        runs = itertools.groupby(
            zip(demonstration.action_mask, demonstration.response_ids, strict=True), key=lambda pair: pair[0]
        )
        self.actions = [tuple(id for _, id in run) for sampled, run in runs if sampled]

    def generate(self, requests, *, temperature, stop):
        return [Generation(self.actions.pop(0)) for _ in requests]


def test_the_efficient_text_reads_back_to_the_ids_that_it_was_written_with(world, writer, small, tmp_path):
    """What `search-e1 world` writes for its training questions, and what ``pairs.references_by = "gold"`` makes of it."""
    questions = world.questions("train", 40)
    rows = [{"id": question.id, "text": writer.clean_text(question)} for question in questions]
    (tmp_path / "gold.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    gold = Demonstrations(tmp_path / "gold.jsonl", small.tokenizer, small.prompts)
    gold.check(questions)
    for question in questions:
        [made] = gold(question)
        written = writer.plain(random.Random(0), question, CLEAN)
        assert (made.prompt_ids, made.response_ids) == (written.prompt_ids, written.response_ids)
        assert made.action_mask == written.action_mask
        assert (made.searches, made.reward) == (question.hops, 1.0)
