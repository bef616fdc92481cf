"""The cold start as a stage: where its demonstrations come from, and what it says of the policy before and after."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import PASSAGES, TinyRetriever, make_tiny_policy
from search_e1 import evolve
from search_e1.config import Config
from search_e1.errors import ConfigError, DataError, SearchE1Error
from search_e1.rollout.demonstrations.forms import Lesson
from search_e1.rollout.demonstrations.writer import Writer
from search_e1.rollout.sampler import RolloutSampler
from search_e1.runs import checksum
from search_e1.runs.checkpoints import Checkpointer
from search_e1.runs.context import StageContext
from search_e1.runs.opening import opened
from search_e1.stages import demonstrations, probe
from search_e1.stages.coldstart import Coldstart
from search_e1.stages.inputs import Inputs
from search_e1.training import policy as policies
from search_e1.types import Group, Question
from serving import misbehaving
from test_endpoint import completion

ROWS: list[dict[str, Any]] = [
    {
        "id": "named",
        "question": "Who is mayor of Bel?",
        "golden_answers": ["Cor Dun"],
        "metadata": {"gold_passage_ids": ["p2"]},
    },
    {"id": "alone", "question": "Who is mayor of Fen?", "golden_answers": ["Gil Hor"]},
    {"id": "lost", "question": "Who is mayor of Ion?", "golden_answers": ["Nobody"]},
]
RIGHT = {"id": "named", "text": "<think>who</think><search>Bel</search><think>so</think><answer>Cor Dun</answer>"}
SERVED = {"url": "http://127.0.0.1:1"}
WRONG = {"id": "alone", "text": "<answer>Fen</answer>"}


@pytest.fixture
def configured(tmp_path: Path):
    corpus, train, policy = tmp_path / "corpus.jsonl", tmp_path / "train.jsonl", tmp_path / "policy"
    corpus.write_text("".join(json.dumps({"id": p.id, "contents": p.contents}) + "\n" for p in PASSAGES))
    train.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    make_tiny_policy().save(policy)

    def configure(data: Mapping[str, Any] = {}, retrieval: Mapping[str, Any] = {}, **coldstart: Any) -> Config:
        return Config.model_validate(
            {
                "run": tmp_path / "run",
                "policy": {"model": str(policy), "device": "cpu"},
                "data": {"corpus": corpus, "train": [train], "eval": {"x": train}, **data},
                "retrieval": retrieval,
                "rollout": {"topk": 1, "max_searches": 1, "max_action_tokens": 120, "max_tokens": 800},
                "coldstart": {"steps": 2, "batch_size": 2, **coldstart},
            }
        )

    return configure


def inputs_of(config: Config, root: Path) -> Inputs:
    run = Inputs(config, root)
    run.__dict__["retriever"] = TinyRetriever(PASSAGES[::-1])
    return run


def cold_start(config: Config, out: Path) -> Mapping[str, Any]:
    out.mkdir(exist_ok=True)
    stage, run = Coldstart(), inputs_of(config, out)
    stage.check(run)
    torch.manual_seed(0)  # as the runner does
    return stage.work(run, StageContext(out))


def write(path: Path, *rows: Mapping[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_without_being_told_the_source_follows_from_what_is_given(configured, tmp_path):
    given, endpoint = {"demonstrations": tmp_path / "own.jsonl"}, {"url": "http://127.0.0.1:1", "model": "m"}
    assert demonstrations.sources(configured()) == ("passages", "questions")
    assert demonstrations.sources(configured({"corpus": ()}, SERVED)) == ("questions",)
    assert demonstrations.sources(configured(given)) == ("file",)
    assert demonstrations.sources(configured(given, endpoint=endpoint)) == ("endpoint",)
    assert demonstrations.sources(configured(given, endpoint=endpoint, demonstrations="passages")) == ("passages",)


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"data": {"demonstrations": "missing.jsonl"}}, "missing.jsonl: "),
    ({"data": {"demonstrations": "own.jsonl"}}, "own.jsonl:1: not a demonstration"),
    ({"data": {"demonstrations": "own.jsonl"}, "policy": {"model": "new"}}, "own.jsonl:1: not a demonstration"),
    ({"rollout": {"max_observation_tokens": 3}}, "rollout.max_observation_tokens = 3 has no room for the tags alone"),
]


@pytest.mark.parametrize(("change", "says"), MISTAKES)
def test_a_mistake_is_refused_before_any_work_and_binds_nothing(configured, tmp_path, monkeypatch, change, says):
    """Not after the index and the base evaluation: then the corrected config would be another run's."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "own.jsonl", {"id": "named"})
    good = configured({"demonstrations": write(tmp_path / "good.jsonl", RIGHT)}, steps=1, probe=0)
    good = good.model_copy(update={"grpo": good.grpo.model_copy(update={"questions_per_step": 2})})
    given = {name: {**good.model_dump(mode="json", exclude_none=True)[name], **values} for name, values in change.items()}
    with pytest.raises(SearchE1Error) as refusal:
        evolve.train(Config.model_validate(good.model_dump(exclude_none=True) | given))
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not [place.name for place in good.run.iterdir() if place.is_dir()]
    with opened(good.run, good.fingerprint()):  # the corrected config has the directory
        pass


@pytest.mark.parametrize(
    ("data", "coldstart", "says"),
    [
        ({"corpus": ()}, {"retrieval": SERVED, "demonstrations": "passages"}, "data.corpus is missing"),
        ({}, {"demonstrations": "file"}, "data.demonstrations is missing"),
        ({}, {"endpoint": {"url": "ftp://x", "model": "m"}}, "coldstart.endpoint.url"),
    ],
)
def test_what_a_source_lacks_is_said_before_any_work(configured, tmp_path, data, coldstart, says):
    with pytest.raises(ConfigError, match=says):
        Coldstart().check(inputs_of(configured(data, **coldstart), tmp_path))


def test_passages_and_questions_teach_and_what_gives_nothing_is_counted(configured, tmp_path):
    result = cold_start(configured(probe=0), tmp_path / "out")
    assert result["demonstrations"] == {"passages": 1, "questions": 1}
    assert (result["questions"], result["untaught"]) == (3, 1)
    assert not {"before", "after"} & set(result)
    only = cold_start(configured(probe=0, demonstrations="passages"), tmp_path / "only")
    assert (only["demonstrations"], only["untaught"]) == ({"passages": 1}, 2)


def test_of_the_corpus_only_the_passages_that_questions_name_are_kept(configured, tmp_path, monkeypatch):
    kept, honest = [], demonstrations.gather
    monkeypatch.setattr(demonstrations, "gather", lambda *given: (kept.append(set(given[2])), honest(*given))[1])
    cold_start(configured(probe=0), tmp_path / "out")
    cold_start(configured(probe=0, demonstrations="questions"), tmp_path / "only")
    assert kept == [{"p2"}, set()]


def test_no_demonstration_at_all_ends_before_the_policy_is_asked(configured, tmp_path):
    rows = write(tmp_path / "lost.jsonl", ROWS[2])
    with pytest.raises(DataError, match="no question gives a demonstration; give training questions whose metadata"):
        cold_start(configured({"train": [rows]}), tmp_path / "out")
    assert not (tmp_path / "out" / "before.jsonl").exists()


def test_a_demonstration_longer_than_the_policys_context_is_left_out(configured, tmp_path):
    long = write(tmp_path / "own.jsonl", RIGHT, RIGHT | {"text": "<think>" + "x" * 1020 + "</think>" + RIGHT["text"]})
    config = configured({"demonstrations": long}, probe=0)
    loose = {"max_tokens": 4096, "max_action_tokens": 4000, "topk": 1}
    result = cold_start(config.model_copy(update={"rollout": config.rollout.model_copy(update=loose)}), tmp_path / "out")
    assert result["demonstrations"] == {"file": 1, "left_out": 1}


def test_a_users_file_teaches_what_is_right_in_it_and_the_retriever_answers_its_searches(configured, tmp_path):
    config = configured({"demonstrations": write(tmp_path / "own.jsonl", WRONG, RIGHT)}, probe=0)
    run, policy = inputs_of(config, tmp_path), make_tiny_policy()
    writer = Writer(policy.tokenizer, policy.prompts, config.rollout, run.retriever)
    [lesson], figures = demonstrations.gather(run, writer, {}, StageContext(tmp_path))
    assert figures == {"file": 1, "left_out": 1}
    assert lesson.clean.text == (
        "<think>who</think><search>Bel</search>"
        "\n\n<information>\nDoc 1(Title: Bel) Bel is a city with mayor Cor Dun.\n</information>\n\n"
        "<think>so</think><answer>Cor Dun</answer>"
    )
    assert policy.tokenizer.decode(lesson.clean.response_ids) == lesson.clean.text
    assert lesson.clean.turns[0].passage_ids == ("p2",)
    assert run.retriever.queries == ["Bel"]
    assert Coldstart().inputs(run)["demonstrations"] == checksum(tmp_path / "own.jsonl")


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (
            [WRONG],
            r"own\.jsonl: none of 1 demonstrations .*; .*own\.jsonl:1 answers 'Fen', .* 'alone' has \['Gil Hor'\]",
        ),
        ([RIGHT | {"text": "no answer"}], r"own\.jsonl:1: turn 1 is not an answer in the protocol's form"),
        ([RIGHT | {"id": "stranger"}], "no demonstration of any training question"),
    ],
)
def test_a_users_file_that_teaches_nothing_is_one_line(configured, tmp_path, rows, says):
    config = configured({"demonstrations": write(tmp_path / "own.jsonl", *rows)})
    with pytest.raises(DataError, match=says) as refusal:
        cold_start(config, tmp_path / "out")
    assert "\n" not in str(refusal.value)


def test_an_endpoint_teaches(configured, tmp_path):
    def reply(request, number):
        return completion("<answer>Cor Dun" if "Bel" in request["messages"][0]["content"] else "<answer>x")

    with misbehaving(reply) as server:
        config = configured(endpoint={"url": server.url, "model": "m", "group_size": 1}, probe=0)
        result = cold_start(config, tmp_path / "out")
    assert result["demonstrations"] == {"endpoint": 1, "em": 1 / 3, "stop_reasons": {"answered": 3}}
    assert len(server.requests) == 3


def test_the_probe_takes_questions_that_are_not_taught_first():
    questions = [Question(id=f"q{i}", text="x", answers=("y",)) for i in range(10)]
    policy = make_tiny_policy()
    writer = Writer(policy.tokenizer, policy.prompts, Config.model_fields["rollout"].default, TinyRetriever(PASSAGES))
    clean = writer.trajectory(questions[0], [writer.answer("so", "y")])
    lessons = [Lesson(question, clean, writer, (), frozenset()) for question in questions[:6]]
    untaught = {question.id for question in questions[6:]}
    first = probe.questions_of(questions, lessons, 3, seed=1)
    assert {question.id for question in first} < untaught
    assert first == probe.questions_of(questions, lessons, 3, seed=1)
    assert untaught < {question.id for question in probe.questions_of(questions, lessons, 7, seed=1)}
    assert len(probe.questions_of(questions, lessons, 32, seed=1)) == 10
    assert probe.questions_of(questions, lessons, 0, seed=1) == []


def test_the_probe_tells_how_the_policy_acts_and_leaves_training_as_it_was(configured, tmp_path):
    probed, plain = (cold_start(configured(probe=n, lora={"dropout": 0.2}), tmp_path / str(n)) for n in (2, 0))
    for name in ("before", "after"):
        lines = (tmp_path / "2" / f"{name}.jsonl").read_text().splitlines()
        sampled = [Group.model_validate_json(line).trajectories[0] for line in lines]
        assert len(sampled) == 2
        assert probed[name] == {
            "malformed": sum(t.stop_reason == "malformed" for t in sampled) / 2,
            "searching": sum(t.searches > 0 for t in sampled) / 2,
            "em": 0.0,
        }
    assert probed["before"]["malformed"] == 1.0  # random weights
    assert (probed["first_loss"], probed["last_loss"]) == (plain["first_loss"], plain["last_loss"])
    one, other = (policies.load(tmp_path / n / "policy", configured().policy).model.state_dict() for n in ("2", "0"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_the_probe_has_sampled_is_not_sampled_again(configured, tmp_path, monkeypatch):
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    out.mkdir()
    run = inputs_of(configured(probe=2), tmp_path)
    first = Coldstart().work(run, StageContext(out, checkpointer=Checkpointer(work)))
    monkeypatch.setattr(RolloutSampler, "groups", lambda *_, **__: pytest.fail("sampled again"))
    again = Coldstart().work(run, StageContext(out, checkpointer=Checkpointer(work)))
    assert (again["before"], again["after"]) == (first["before"], first["after"])
