"""Demonstrations from supporting passages, and the cold start that is made of them."""

import itertools
import json
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import PASSAGES, TinyRetriever
from search_e1 import config as configs
from search_e1.config import ColdstartConfig, Config, Prompts, RolloutConfig
from search_e1.errors import ConfigError, DataError
from search_e1.rollout.demonstrations import hops
from search_e1.rollout.demonstrations.forms import Lesson, batches, demonstration
from search_e1.rollout.demonstrations.hops import find_name
from search_e1.rollout.demonstrations.passages import plan, plans
from search_e1.rollout.demonstrations.writer import Writer
from search_e1.runs.context import StageContext
from search_e1.stages.coldstart import Coldstart
from search_e1.stages.inputs import Inputs
from search_e1.text.prompts import plain_prompt, privileged_prompt
from search_e1.training import new_policy
from search_e1.training import policy as policies
from search_e1.types import ActionKind, Question, StopReason, Turn

CORPUS = {p.id: p for p in PASSAGES}
CHAIN = Question(
    id="q_1",
    text="Which mayor has the capital of Arda, which has no river of length 12?",
    answers=("Cor Dun",),
    hops=2,
    metadata={"gold_passage_ids": ["p2", "p1"]},
)
SINGLE = Question(
    id="q_2", text="what length has ion", answers=("12", "twelve"), hops=1, metadata={"answer_passage_ids": ["p5"]}
)
COMPARISON = Question(
    id="q_3", text="Are Bel and Fen cities?", answers=("yes",), hops=2, metadata={"gold_passage_ids": ["p2", "p4"]}
)
ROLLOUT = RolloutConfig(topk=2)


def learn(tiny_policy, *questions: Question, rollout: RolloutConfig = ROLLOUT, seed: int = 0) -> list[Lesson]:
    writer = Writer(tiny_policy.tokenizer, tiny_policy.prompts, rollout, TinyRetriever(PASSAGES))
    return hops.lessons(plans(questions, CORPUS, seed=seed), writer)


def actions(lesson: Lesson) -> list[str]:
    return [turn.action_text for turn in lesson.clean.turns]


def test_hops_follow_what_is_known_and_quote_what_was_read(tiny_policy):
    [lesson] = learn(tiny_policy, CHAIN)
    assert actions(lesson) == [
        "<think> I need to find Arda.</think><search> Arda</search>",
        "<think> Arda: land with capital Bel. I need to find Bel.</think><search> Bel</search>",
        "<think> Bel: city with mayor Cor Dun. So the answer is Cor Dun.</think><answer> Cor Dun</answer>",
    ]
    assert [turn.passage_ids for turn in lesson.clean.turns] == [("p1",), ("p1", "p2"), ()]
    assert lesson.clean.reward == 1.0
    assert lesson.clean.stop_reason is StopReason.ANSWERED


def test_ids_are_those_of_each_action_by_itself(tiny_policy):
    [lesson] = learn(tiny_policy, CHAIN)
    encode = tiny_policy.tokenizer.encode
    assert lesson.clean.prompt_ids == plain_prompt(tiny_policy.tokenizer, tiny_policy.prompts, CHAIN.text)
    for turn in lesson.clean.turns:
        assert list(turn.action_ids) == encode(turn.action_text, add_special_tokens=False)
        assert list(turn.observation_ids) == encode(turn.observation_text, add_special_tokens=False)


def test_a_question_that_names_no_title_is_its_own_query(tiny_policy):
    question = SINGLE.model_copy(update={"text": "what is the length of the only river"})
    [lesson] = learn(tiny_policy, question)
    assert actions(lesson)[0] == f"<think> I will search for the question.</think><search> {question.text}</search>"
    assert lesson.clean.answer == "12"


def test_a_title_in_the_question_is_taken_as_it_is_written_there(tiny_policy):
    [lesson] = learn(tiny_policy, SINGLE)
    assert lesson.clean.turns[0].argument == "ion"


def test_a_comparison_may_answer_what_no_passage_says(tiny_policy):
    [lesson] = learn(tiny_policy, COMPARISON)
    assert [turn.argument for turn in lesson.clean.turns] == ["Bel", "Fen", "yes"]


def test_a_passage_that_was_read_already_is_not_searched_for(tiny_policy):
    question = CHAIN.model_copy(update={"text": "What is the capital of Arda, and the mayor of Bel?"})
    [lesson] = learn(tiny_policy, question)
    assert [turn.argument for turn in lesson.clean.turns] == ["Arda", "Bel", "Cor Dun"]
    both = question.model_copy(update={"text": "Bel has which mayor, in Arda?"})
    [lesson] = learn(tiny_policy, both)  # the search for Bel shows p1 and p2
    assert [turn.argument for turn in lesson.clean.turns] == ["Bel", "Cor Dun"]


@pytest.mark.parametrize(
    ("changes", "rollout"),
    [
        ({"answers": ("Nobody",)}, ROLLOUT),  # no passage says so
        ({"text": "zzz"}, ROLLOUT),  # nothing is found
        ({}, RolloutConfig(topk=2, max_searches=1)),
        ({}, RolloutConfig(topk=2, max_action_tokens=30)),
        ({}, RolloutConfig(topk=2, max_tokens=200)),
        ({}, RolloutConfig(topk=2, max_observation_tokens=60)),  # the evidence is cut off
        ({"metadata": {}}, ROLLOUT),
    ],
)
def test_what_cannot_be_shown_is_left_out(tiny_policy, changes, rollout):
    assert learn(tiny_policy, CHAIN.model_copy(update=changes), rollout=rollout) == []


def test_a_passage_that_the_corpus_lacks_is_refused():
    question = CHAIN.model_copy(update={"metadata": {"gold_passage_ids": ["p9"]}})
    with pytest.raises(DataError, match=r"question 'q_1': metadata.gold_passage_ids names passage 'p9'"):
        plan(question, CORPUS, random.Random(0))


def test_detours_never_find_what_is_needed(tiny_policy):
    for seed in range(20):
        [lesson] = learn(tiny_policy, CHAIN, seed=seed)
        assert all({"p1", "p2"}.isdisjoint(turn.passage_ids) for turn in lesson.detours)


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("Jaws (film)", "Who directed jaws?", "jaws"),
        ("Ion", "the region of Ionia", ""),
        ("C++ (language)", "Is C++ old?", "C++"),
        ("A", "a thing", ""),
    ],
)
def test_find_name(name, text, found):
    assert find_name(name, text) == found


def draw(tiny_policy, lesson, **shares) -> tuple:
    config = ColdstartConfig(**{"privileged": 0, "off_track": 0, "irrelevant": 0, "duplicate": 0, "early": 0} | shares)
    made = demonstration(lesson, config, random.Random(0))
    ids = zip(made.response_ids, made.action_mask, strict=True)
    imitated = tiny_policy.tokenizer.decode([id for id, one in ids if one])
    return made, imitated


def with_detours(lesson: Lesson, *turns: Turn) -> Lesson:
    changed = replace(lesson)
    changed.__dict__["detours"] = turns
    return changed


def test_a_clean_demonstration_imitates_actions_and_reads_observations(tiny_policy):
    [lesson] = learn(tiny_policy, CHAIN)
    made, imitated = draw(tiny_policy, lesson)
    assert made.prompt_ids == lesson.clean.prompt_ids
    assert made.response_ids == lesson.clean.response_ids
    assert made.action_mask == lesson.clean.action_mask
    assert imitated == "".join(actions(lesson))


def test_sloppy_demonstrations(tiny_policy):
    [lesson] = learn(tiny_policy, CHAIN)
    first, second, answer = actions(lesson)
    assert draw(tiny_policy, lesson, duplicate=1)[1] == first + first + second + answer
    jump = "<think> So the answer is Arda.</think><answer> Arda</answer>"
    assert draw(tiny_policy, lesson, early=1)[1] == first + jump
    stray = lesson.clean.turns[1].model_copy(update={"action_text": "stray"})
    assert draw(tiny_policy, with_detours(lesson, stray), irrelevant=1)[1] == second + first + second + answer


def test_a_privileged_demonstration_follows_the_reference_also_from_off_its_track(tiny_policy):
    [lesson] = learn(tiny_policy, CHAIN)
    lesson = with_detours(lesson)
    tokenizer, prompts, clean = tiny_policy.tokenizer, tiny_policy.prompts, lesson.clean
    shown = privileged_prompt(tokenizer, prompts, CHAIN.text, clean.text)
    made, imitated = draw(tiny_policy, lesson, privileged=1)
    assert (made.prompt_ids, made.response_ids) == (shown, clean.response_ids)
    made, imitated = draw(tiny_policy, lesson, privileged=1, off_track=1)
    stray = clean.turns[0].action_ids + clean.turns[0].observation_ids
    assert made.prompt_ids == shown
    assert made.response_ids == stray + clean.response_ids
    assert made.action_mask == (0,) * len(stray) + clean.action_mask
    assert imitated == "".join(actions(lesson))


def test_batches_go_through_all_lessons_and_are_the_same_for_a_seed(tiny_policy):
    taught = learn(tiny_policy, CHAIN, SINGLE, COMPARISON)
    config = ColdstartConfig(batch_size=3, privileged=0.4)
    plain = ColdstartConfig(batch_size=3)
    [batch] = itertools.islice(batches(taught, plain), 1)
    assert {made.prompt_ids for made in batch} == {lesson.clean.prompt_ids for lesson in taught}
    first, again, other = (list(itertools.islice(batches(taught, config, seed=seed), 4)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_drills_come_first_and_teach_the_first_search(tiny_policy):
    taught = learn(tiny_policy, CHAIN)
    config = ColdstartConfig(batch_size=2, drills=1)
    drills, whole = itertools.islice(batches(taught, config), 2)
    assert (len(drills), len(whole)) == (12, 2)
    action = taught[0].clean.turns[0].action_ids
    assert all((made.response_ids, made.action_mask) == (action, (1,) * len(action)) for made in drills)


def test_no_lesson_is_refused():
    with pytest.raises(DataError, match="no question gives a demonstration"):
        next(batches([], ColdstartConfig()))


def test_the_new_tokenizer_keeps_any_text_and_has_one_id_for_a_tag():
    tokenizer = new_policy.tokenizer(["the cat sat on the mat"] * 10, 300)
    assert len(tokenizer) <= 300
    text = "<think> Ωcat\n</think><search> the mat</search>"
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text
    assert all(len(tokenizer.encode(tag)) == 1 for tag in new_policy.TAGS)
    assert len(tokenizer.encode(" the")) == 1
    prompt = plain_prompt(tokenizer, Prompts(instruction="{question}?"), "why")
    assert tokenizer.decode(prompt) == "<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(ConfigError, match=r"coldstart.new_policy.vocabulary = 200 has no room"):
        new_policy.tokenizer(["a"], 200)


@pytest.mark.parametrize(
    "section", [{"new_policy": {"heads": 5}}, {"new_policy": {"heads": 64}}, {"early": 0.8, "duplicate": 0.3}, {"drills": 500}]
)
def test_impossible_sections_are_refused(section):
    with pytest.raises(
        ValueError, match=r"hidden_size 192 does not split|add up to more than 1|drills = 500 exceeds steps = 100"
    ):
        ColdstartConfig(**section)


def cold_start(config: Config, out: Path) -> Mapping[str, Any]:
    run = Inputs(config, out)
    run.__dict__["retriever"] = TinyRetriever(PASSAGES)
    stage = Coldstart()
    stage.check(run)
    return stage.work(run, StageContext(out))


def test_cold_start_makes_a_policy_that_loads(tmp_path: Path):
    corpus, train = tmp_path / "corpus.jsonl", tmp_path / "train.jsonl"
    corpus.write_text("".join(json.dumps({"id": p.id, "contents": p.contents}) + "\n" for p in PASSAGES))
    rows = [
        {"id": q.id, "question": q.text, "golden_answers": q.answers, "metadata": q.metadata | {"hops": q.hops}}
        for q in (CHAIN, SINGLE, COMPARISON)
    ]
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Config.model_validate(
        {
            "run": tmp_path / "run",
            "policy": {"model": "new", "device": "cpu"},
            "data": {"corpus": corpus, "train": [train], "eval": {"x": train}},
            "rollout": {"topk": 2, "max_searches": 2, "max_action_tokens": 60},  # the probe samples as long as it may
            "coldstart": {
                "new_policy": {"hidden_size": 32, "heads": 2, "layers": 2, "vocabulary": 400},
                "training": {"optimizer": "muon"},
                "learning_rate": 3e-3,
                "steps": 8,
                "drills": 2,
                "batch_size": 4,
            },
        }
    )
    result = cold_start(config, tmp_path)
    assert result["last_loss"] < result["first_loss"]
    policy = policies.load(tmp_path / "policy", config.policy)
    assert policy.model.num_parameters() == result["parameters"]
    assert policy.prompts == Prompts()
    without = config.model_copy(update={"coldstart": None})
    with pytest.raises(ConfigError, match=r"section \[coldstart\] is missing"):
        cold_start(without, tmp_path)


def test_the_checked_in_config_loads():
    config = configs.load(Path(__file__).parent.parent / "configs" / "real.toml")
    assert config.coldstart is not None
    assert len(config.data.eval) == 7
    assert config.coldstart.new_policy.context_length >= config.rollout.max_tokens


def test_a_first_title_is_guessed_only_after_a_search(tiny_policy):
    [lesson] = learn(tiny_policy, SINGLE)
    _, imitated = draw(tiny_policy, lesson, early=1)
    assert imitated.endswith("<answer> Ion</answer>")
    assert lesson.clean.turns[-1].kind is ActionKind.ANSWER
