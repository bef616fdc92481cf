"""Supervised fine-tuning, the demonstrations of the small world, and the policy that came of them."""

import copy
import itertools
import json
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from search_e1.config import PolicyConfig, RolloutConfig
from search_e1.data.world import World, make_world
from search_e1.errors import DataError, TrainingError
from search_e1.retrieval.bm25 import Bm25Index
from search_e1.rollout.engines.base import BatchGenerator, Generation
from search_e1.rollout.engines.torch import HFGenerator
from search_e1.rollout.loop import Start, rollout, starts
from search_e1.rollout.world_demonstrations import CLEAN, CONFUSED, HABITS, DemonstrationWriter, Slips, batches
from search_e1.selfdistill.gold import Demonstrations
from search_e1.text.prompts import observation, plain_prompt, privileged_prompt
from search_e1.text.protocol import parse_action
from search_e1.training.policy import Policy, load, resolve
from search_e1.types import ActionKind
from search_e1.warmstart.trainer import Demonstration, _Muon, train

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


@pytest.mark.parametrize(
    ("demonstration", "message"),
    [
        (((1,), (2, 3), (1,)), "2 response_ids and 1 entries"),
        (((1,), (2, 3), (1, 2)), "0 and 1 only"),
        (((1,), (2, 3), (0, 0)), "at least one 1"),
        (((), (2,), (1,)), "without a prompt"),
    ],
)
def test_an_impossible_demonstration_is_refused(demonstration, message):
    with pytest.raises(DataError, match=message):
        Demonstration(*demonstration)


def test_the_loss_is_the_mean_cross_entropy_of_imitated_ids(tiny_policy):
    rows = [
        Demonstration((5, 6, 7), (8, 9, 10, 11), (1, 0, 0, 1)),
        Demonstration((5,), (20, 21), (1, 1)),
        Demonstration(tuple(range(40)), (30, 31, 32), (0, 1, 0)),
    ]
    terms = []
    for row in rows:
        ids = torch.tensor([row.prompt_ids + row.response_ids])
        logprobs = torch.log_softmax(tiny_policy.model(ids).logits[0].detach(), -1)
        terms += [
            -logprobs[len(row.prompt_ids) + i - 1, id].item()
            for i, (id, imitated) in enumerate(zip(row.response_ids, row.action_mask, strict=True))
            if imitated
        ]
    expected = sum(terms) / 5
    for pass_tokens in (1, 60, 10_000):
        policy = Policy(copy.deepcopy(tiny_policy.model), tiny_policy.tokenizer, tiny_policy.prompts)
        [loss] = train(policy, iter([rows]), steps=1, learning_rate=1e-3, pass_tokens=pass_tokens)
        assert loss == pytest.approx(expected, rel=1e-5)


def test_what_is_not_imitated_gets_no_gradient(tiny_policy):
    trained = []
    for last in (50, 60):
        policy = Policy(copy.deepcopy(tiny_policy.model), tiny_policy.tokenizer, tiny_policy.prompts)
        rows = [Demonstration((5, 6), (8, 9, last), (1, 1, 0))]
        train(policy, iter([rows, rows]), steps=2, learning_rate=1e-3)
        trained.append(policy.model.state_dict())
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


def test_training_is_the_same_for_a_seed_and_lowers_the_loss(tiny_policy):
    rows = [Demonstration((5, 6), (8, 9, 10), (1, 1, 1)), Demonstration((6, 5), (10, 9, 8), (1, 1, 1))]
    runs = []
    for _ in range(2):
        policy = Policy(copy.deepcopy(tiny_policy.model), tiny_policy.tokenizer, tiny_policy.prompts)
        told: list[tuple[int, int]] = []
        losses = train(
            policy,
            itertools.repeat(rows),
            steps=40,
            learning_rate=4e-2,
            progress=lambda done, total, figure="", told=told: told.append((done, total)),
        )
        assert told == [(i, 40) for i in range(1, 41)]
        runs.append(losses)
    assert runs[0] == runs[1]
    assert runs[0][-1] < 0.1 < runs[0][0]


def test_muon_is_torchs_but_for_its_precision(tiny_policy):
    torch.manual_seed(0)
    for shape in ((24, 48), (48, 24), (32, 32)):
        ours, theirs = (torch.nn.Parameter(torch.zeros(shape)) for _ in range(2))
        optimizers = (
            _Muon([ours], {"lr": 0.1}),
            torch.optim.Muon([theirs], lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        )
        for _ in range(3):
            gradient = torch.randn(shape)
            for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
                parameter.grad = gradient.clone()
                optimizer.step()
        assert (ours - theirs).norm() < 0.02 * theirs.norm()  # bfloat16 has 8 bits


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(tiny_policy):
    policy = Policy(copy.deepcopy(tiny_policy.model), tiny_policy.tokenizer, tiny_policy.prompts)
    policy.model.model.norm.weight.data[0] = float("nan")
    before = copy.deepcopy(policy.model.state_dict())
    with pytest.raises(TrainingError, match="loss of step 1 is nan"):
        train(policy, itertools.repeat([Demonstration((5,), (6,), (1,))]), steps=3, learning_rate=1e-2)
    after = policy.model.state_dict()
    assert all(torch.equal(before[n].nan_to_num(), after[n].nan_to_num()) for n in before)


def test_demonstrations_that_cannot_be_used_are_refused(tiny_policy):
    policy = Policy(copy.deepcopy(tiny_policy.model), tiny_policy.tokenizer, tiny_policy.prompts)
    one = Demonstration((5,), (6,), (1,))
    with pytest.raises(DataError, match="ran out after 2 of 3 steps"):
        train(policy, iter([[one], [one]]), steps=3, learning_rate=1e-3)
    with pytest.raises(DataError, match="batch 1 holds no"):
        train(policy, iter([[]]), steps=1, learning_rate=1e-3)
    context = policy.model.config.max_position_embeddings
    with pytest.raises(DataError, match=f"{context + 1} tokens does not fit"):
        train(policy, iter([[Demonstration((5,) * context, (6,), (1,))]]), steps=1, learning_rate=1e-3)


@given(st.text())
def test_the_small_tokenizer_encodes_any_text_and_back(small, text):
    ids = small.tokenizer.encode(text, add_special_tokens=False)
    assert small.tokenizer.decode(ids, skip_special_tokens=False) == text


def test_a_name_and_a_tag_are_one_token_a_word(small):
    tokens = small.tokenizer.tokenize(
        "<think> need director of Gula Purdak </think> <search> director Gula Purdak </search>"
    )
    assert len(tokens) == 12
    ids = small.tokenizer.encode(" <search> director Gula Purdak </search>", add_special_tokens=False)
    action = parse_action(small.tokenizer.decode(ids))
    assert (action.kind, action.argument) == (ActionKind.SEARCH, "director Gula Purdak")


def test_clean_demonstrations_are_what_the_rollout_loop_would_have_made(writer, world, index, small):
    for question in world.questions("train", 30):
        demonstration = writer.plain(random.Random(0), question, CLEAN)
        assert demonstration.prompt_ids == plain_prompt(small.tokenizer, small.prompts, question.text)
        replayed = _Replay(small.tokenizer, demonstration)
        [trajectory] = rollout(
            replayed, index, [Start(question, demonstration.prompt_ids)], ROLLOUT, temperature=0.0, seed=0
        )
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
        kind = (
            "confused" if question.metadata["relations"][-1] in CONFUSED else "long" if question.hops > 2 else "other"
        )
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
        walk = writer._walk(question)
        writer._step(walk, rng, False)
        for _ in range(5):
            relation, name = writer._irrelevant(walk, rng)
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
    generator = HFGenerator(small.model, small.tokenizer, batch_size=64)
    asked = world.questions("dev", 32)
    plain = rollout(generator, index, starts(small.tokenizer, small.prompts, asked), ROLLOUT, temperature=0.0, seed=0)
    assert sum(t.reward for t in plain) / 32 >= 0.35


class _Replay(BatchGenerator):
    """A generator that says what a demonstration says."""

    context_length = 2048

    def __init__(self, tokenizer, demonstration: Demonstration) -> None:
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
