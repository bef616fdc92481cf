"""Rewards of numbers, dates, lists, yes and no, of what a judge says, and of "not in the documents"; and their figures."""

import json

import pytest
from pydantic import ValidationError
from tenacity import wait_none

from conftest import PASSAGES, TINY_PROMPTS, TinyRetriever
from scripted import ScriptedEngine
from search_e1.agent.scheduler import Scheduler
from search_e1.cli.display import evaluation_table
from search_e1.config import Config, EvaluationConfig, JudgeConfig, RewardsConfig, RolloutConfig
from search_e1.errors import ConfigError, DataError, EndpointError
from search_e1.evaluation.evaluate import evaluate
from search_e1.evaluation.results import EVALUATION, QUESTIONS
from search_e1.rollout.loop import rollout
from search_e1.rollout.rewards import open_reward
from search_e1.rollout.rewards.dates import Day, read_date
from search_e1.rollout.rewards.judge import Judge
from search_e1.rollout.rewards.numbers import Quantity, quantity
from search_e1.rollout.rewards.scorer import open_scorer
from search_e1.rollout.starts import starts
from search_e1.types import Question
from serving import misbehaving


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("3 km", Quantity(3, "km")),
        ("about 3,000.5 kilometres long", Quantity(3000.5, "km")),
        ("3km", Quantity(3, "km")),
        ("-40 degrees Celsius", Quantity(-40, "°c")),
        ("\N{MINUS SIGN}40 °C", Quantity(-40, "°c")),
        ("$1.5 million", Quantity(1.5e6, "$")),
        ("1.5 million US dollars", Quantity(1.5e6, "$")),
        ("12 per cent", Quantity(12, "%")),
        ("12%", Quantity(12, "%")),
        ("5 sq km", Quantity(5, "km²")),
        ("seven", Quantity(7, "")),
        ("Twelve apostles.", Quantity(12, "apostles")),
        ("1e3", Quantity(1000, "")),
        ("9 of them", Quantity(9, "")),
        ("3 to 4", None),
        ("one or two", None),
        ("B12", None),
        ("Oslo", None),
    ],
)
def test_a_number_and_its_unit(text, found):
    assert quantity(text) == found


@pytest.mark.parametrize(
    ("text", "order", "found"),
    [
        ("5 May 2020", "MDY", Day(2020, 5, 5)),
        ("May 5, 2020", "MDY", Day(2020, 5, 5)),
        ("on the 5th of May 2020.", "MDY", Day(2020, 5, 5)),
        ("2020-05-06", "DMY", Day(2020, 5, 6)),  # never ambiguous
        ("5/6/2020", "MDY", Day(2020, 5, 6)),
        ("5/6/2020", "DMY", Day(2020, 6, 5)),
        ("05.06.2020", "DMY", Day(2020, 6, 5)),
        ("20/05/06", "YMD", Day(2020, 5, 6)),
        ("May 2020", "MDY", Day(2020, 5, None)),
        ("1969", "MDY", Day(1969, None, None)),
        ("29 February", "MDY", Day(None, 2, 29)),
        ("a Tuesday", "MDY", None),
        ("Oslo", "MDY", None),
        ("Boeing 747 crash", "MDY", None),
        ("31 February 2020", "MDY", None),
    ],
)
def test_a_date(text, order, found):
    assert read_date(text, order) == found


@pytest.mark.parametrize(
    ("name", "answer", "golds", "worth"),
    [
        ("number", "3 kilometers", ["3 km"], 1.0),
        ("number", "3000 m", ["3 km"], 0.0),  # no conversion
        ("number", "3", ["3 km"], 1.0),  # the question has named the unit
        ("number", "3 miles", ["3 km", "3 mi"], 1.0),
        ("number", "4 km", ["3 km"], 0.0),
        ("number", "three", ["3"], 1.0),
        ("number", "a lot", ["a lot"], 1.0),
        ("date", "2020-05-05", ["May 5, 2020"], 1.0),
        ("date", "5 May 2020", ["May 2020"], 1.0),
        ("date", "May 2020", ["5 May 2020"], 0.0),
        ("date", "5/6/2020", ["6 May 2020"], 1.0),  # month first unless said
        ("date", "the Ides of March", ["Ides of March"], 1.0),
        ("list", "Oslo, Bergen and the Fen", ["fen; Oslo; Bergen"], 1.0),
        ("list", "- Oslo\n- Bergen", ["Bergen, Oslo"], 1.0),
        ("list", "Oslo, Bergen", ["Oslo; Bergen; Fen"], 0.0),
        ("list", "Paris, Texas; Oslo", ["Oslo; Paris, Texas"], 1.0),
        ("list", "Oslo", ["Bergen", "Oslo"], 1.0),
        ("list_f1", "Oslo, Bergen", ["Oslo; Bergen; Fen"], 0.8),
        ("list_f1", "Ard", ["Oslo; Bergen"], 0.0),
        ("yes_no", "Yes, it is.", ["yes"], 1.0),
        ("yes_no", "True", ["Yes"], 1.0),
        ("yes_no", "no", ["yes"], 0.0),
        ("yes_no", "It may be", ["no"], 0.0),
    ],
)
def test_what_an_answer_is_worth(name, answer, golds, worth):
    assert open_reward(name)(answer, golds) == pytest.approx(worth)


def question(id="q", *answers, **metadata):
    return Question(id=id, text=f"{id}?", answers=answers or ("Oslo",), metadata=metadata)


def test_settings_reach_the_rewards():
    tolerant = open_scorer(RolloutConfig(reward="number", rewards=RewardsConfig(tolerance=0.1)))
    assert tolerant("95", question("q", "100")) == 1.0
    assert tolerant("85", question("q", "100")) == 0.0
    days = open_scorer(RolloutConfig(reward="date", rewards=RewardsConfig(date_order="DMY")))
    assert days("5/6/2020", question("q", "5 June 2020")) == 1.0


def test_each_kind_of_answer_has_its_reward():
    scorer = open_scorer(RolloutConfig(reward="typed", rewards=RewardsConfig(types={"set": "list_f1"})))
    assert scorer("three", question("q", "3", answer_type="number")) == 1.0
    assert scorer("three", question("q", "3")) == 0.0  # exact match
    assert scorer("x, y", question("q", "x", answer_type="set")) == pytest.approx(2 / 3)
    with pytest.raises(DataError, match=r"question 'q': metadata.answer_type = 'nmber'; known: text, number, date"):
        scorer("3", question("q", "3", answer_type="nmber"))
    with pytest.raises(DataError, match=r"question 'q': metadata\.answer_type = 'nmber'"):
        scorer.check([question("p", "3"), question("q", "3", answer_type="nmber")])
    with pytest.raises(
        ConfigError, match=r"rollout\.rewards\.types\.set = 'lst': no such reward function; did you mean 'list'"
    ):
        open_scorer(RolloutConfig(reward="typed", rewards=RewardsConfig(types={"set": "lst"})))


def test_not_in_the_documents():
    config = RolloutConfig(rewards=RewardsConfig(not_found=("not in the documents",)))
    scorer = open_scorer(config, "Say not in the documents if so. {question}")
    unanswerable = question("q", "whatever", unanswerable=True)
    assert scorer("Not in the documents.", unanswerable) == 1.0
    assert scorer("whatever", unanswerable) == 0.0
    assert scorer("not in the documents", question("q", "not in the documents")) == 0.0
    assert scorer("oslo", question()) == 1.0
    assert scorer(None, unanswerable) == 0.0
    with pytest.raises(ConfigError, match=r"prompts\.instruction does not tell the policy to answer 'not in the documents'"):
        open_scorer(config, "{question}")
    assert open_scorer(RolloutConfig())("whatever", unanswerable) == 1.0  # published: exact match and nothing else


def reply(content, tokens=11, finish_reason="stop", **message):
    choice = {"message": {"content": content, **message}, "finish_reason": finish_reason}
    return 200, json.dumps({"choices": [choice], "usage": {"total_tokens": tokens}}).encode()


def judging(server, tmp_path, **settings):
    judge = Judge(JudgeConfig(url=server.url, model="m", cache=str(tmp_path / "cache.jsonl"), **settings))
    judge._server.retrying.wait = wait_none()
    return judge


def test_a_judge_is_asked_once_for_each_answer(tmp_path):
    def answer(request, number):
        return reply(
            "Correct." if '"capital of Norway"' in request["messages"][0]["content"] else "<think>no</think> incorrect"
        )

    with misbehaving(answer) as server:
        judge = judging(server, tmp_path)
        assert judge.verdict("Oslo", question()) == 1.0  # an exact match needs no judge
        assert (judge.requests, judge.tokens) == (0, 0)
        assert judge.verdict("capital of Norway", question()) == 1.0
        assert judge.verdict("Bergen", question()) == 0.0
        assert judge.verdict("Bergen", question()) == 0.0
        assert (judge.requests, judge.tokens) == (2, 22)
        again = judging(server, tmp_path)
        assert again.ready("Bergen", question())
        assert [again.verdict(a, question()) for a in ("capital of Norway", "Bergen")] == [1.0, 0.0]
        assert again.requests == 0
        (tmp_path / "cache.jsonl").open("ab").write(b"cut off")
        assert judging(server, tmp_path).verdict("Bergen", question()) == 0.0
        assert judging(server, tmp_path, prompt="{question}{golds}{answer}").verdict("Bergen", question()) == 0.0
        assert len(server.requests) == 3  # another prompt is another question


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (reply("", None), r"the judge said '' instead of correct or incorrect; .*raise its max_tokens"),
        (reply("", finish_reason="length"), r"the judge said '' \(finish_reason length\) instead"),
        (reply(None, finish_reason="content_filter"), r"the judge said '' \(finish_reason content_filter\) instead"),
        (reply(None, refusal="I can't help with that."), r"the judge said \"I can't help with that\.\" instead"),
        ((429, b'{"error": {"message": "no credit", "code": "insufficient_quota"}}'), r"status 429 .*no credit.*; check"),
        (reply("It is correct, I think"), "the judge said 'It is correct, I think' instead of correct or incorrect"),
        ((401, b'{"error": {"message": "bad key"}}'), r"401.*check rollout\.rewards\.judge\.url"),
    ],
)
def test_a_judge_that_fails_stops_the_stage(said, message, tmp_path):
    with misbehaving(lambda request, number: said) as server:
        with pytest.raises(EndpointError, match=message) as caught:
            judging(server, tmp_path, time_limit=0.5).verdict("Bergen", question())
        assert len(server.requests) == 1  # a final answer is not paid for twice
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache.jsonl").exists()


@pytest.mark.parametrize(("body", "words"), [(b"{}", ""), (b'{"error": {"message": "no such model"}}', r" \(no such model\)")])
def test_what_is_no_answer_of_a_judge_is_asked_for_again(body, words, tmp_path):
    message = rf"no verdict after \d+ attempts: not an answer of /v1/chat/completions{words}$"
    with misbehaving(lambda request, number: (200, body)) as server, pytest.raises(EndpointError, match=message):
        judging(server, tmp_path, time_limit=0.5).verdict("Bergen", question())


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
def test_the_path_that_a_judge_is_asked_at(suffix, tmp_path):
    config = JudgeConfig(url=f"http://127.0.0.1:9{suffix}", model="m", cache=str(tmp_path / "cache.jsonl"))
    assert Judge(config)._server.shown == "http://127.0.0.1:9/v1/chat/completions"


def test_a_rollout_waits_for_its_judge(tiny_policy, tmp_path):
    with misbehaving(lambda request, number: reply("correct")) as server:
        config = RolloutConfig(
            max_tokens=512, reward="judge",
            rewards=RewardsConfig(judge=JudgeConfig(url=server.url, model="m", cache=str(tmp_path / "c.jsonl"))),
        )  # fmt: skip
        engine = ScriptedEngine(tiny_policy.tokenizer, {"q?": ["<answer> the capital </answer>"]})
        begun, ended = starts(tiny_policy.tokenizer, TINY_PROMPTS, [question()]), []
        [done] = rollout(
            engine, TinyRetriever(PASSAGES), begun, config, temperature=1.0, seed=0, prompts=TINY_PROMPTS,
            on_trajectory=lambda i, t: ended.append((i, t.reward)),
        )  # fmt: skip
    assert (done.reward, done.correct, ended) == (1.0, True, [(0, 1.0)])


def test_what_a_judge_costs_is_told(tmp_path, caplog):
    caplog.set_level("INFO")
    with misbehaving(lambda request, number: reply("correct")) as server:
        judge = judging(server, tmp_path)
        for answer in ("a", "b", "c", "d"):
            judge.verdict(f"{answer}!", question())
            judge.tell(seldom=True)
        judge.tell(seldom=False)
        judge.tell(seldom=False)
    told = [record.message.split(": ")[1].split(" tokens")[0] for record in caplog.records if "judge m" in record.message]
    assert told == ["1 requests, 11", "2 requests, 22", "4 requests, 44"]
    with pytest.raises(ConfigError, match=r"rollout\.rewards\.judge\.cache = .*: no such directory"):
        Judge(JudgeConfig(url="http://localhost", model="m", cache=str(tmp_path / "no" / "c.jsonl")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reward": "judge"}, "the reward judge needs rewards.judge"),
        ({"rewards": {"types": {"text": "judge"}}}, "the reward judge needs rewards.judge"),
        ({"rewards": {"judge": {"url": "u", "model": "m", "prompt": "{question}"}}}, "the template lacks {golds}"),
        ({"rewards": {"date_order": "MYD"}}, "date_order"),
    ],
)
def test_what_a_config_refuses(settings, message):
    with pytest.raises(ValidationError, match=message):
        RolloutConfig.model_validate(settings)


def run_evaluation(tokenizer, out, **settings):
    questions = [question("a", "3 km", answer_type="number"), question("b", "Bel"), question("c", "x", unanswerable=True)]
    script = {"a?": ["<answer> 3 kilometers </answer>"], "b?": ["<answer> Bel </answer>"], "c?": ["<answer> nowhere </answer>"]}
    prompts = TINY_PROMPTS.model_copy(update={"instruction": "nowhere? {question}"})
    out.mkdir()
    return evaluate(
        ScriptedEngine(tokenizer, script), TinyRetriever(PASSAGES), {"own": questions}, prompts,
        EvaluationConfig(samples=0, latency=0), RolloutConfig(max_tokens=512, **settings), seed=0, out=out,
    )  # fmt: skip


def test_the_figure_beside_em(tiny_policy, tmp_path):
    plain = run_evaluation(tiny_policy.tokenizer, tmp_path / "em")
    typed = run_evaluation(
        tiny_policy.tokenizer, tmp_path / "typed", reward="typed", rewards=RewardsConfig(not_found=("nowhere",))
    )
    assert (plain.em, plain.reward, plain.reward_name) == (pytest.approx(1 / 3), None, None)
    for file in (EVALUATION, QUESTIONS):
        assert "reward" not in (tmp_path / "em" / file).read_text()
        assert "answer_type" not in (tmp_path / "em" / file).read_text()
    assert (typed.em, typed.reward, typed.reward_name) == (plain.em, 1.0, "typed")
    assert {kind: (s.n, s.em, s.reward) for kind, s in typed.by_answer_type.items()} == {
        "number": (1, 0.0, 1.0), "unanswerable": (1, 0.0, 1.0),
    }  # fmt: skip
    headings = [column.header for column in evaluation_table(typed).columns]
    assert headings[5:7] == ["typed", "95%"]
    assert [column.header for column in evaluation_table(plain).columns][5:7] == ["F1", "cover"]


def test_an_agent_in_use_asks_no_judge(tiny_policy):
    judge = JudgeConfig(url="http://127.0.0.1:9", model="m")
    limits = RolloutConfig(max_tokens=512, reward="judge", rewards=RewardsConfig(judge=judge, not_found=("nowhere",)))
    engine = ScriptedEngine(tiny_policy.tokenizer, {"q?": ["<answer> Oslo </answer>"]})
    scheduler = Scheduler(engine, TinyRetriever(PASSAGES), TINY_PROMPTS, limits)
    assert scheduler._limits == RolloutConfig(max_tokens=512)


def test_how_a_judge_is_waited_for_binds_no_run():
    def fingerprint(**judge):
        rollout = {"reward": "judge", "rewards": {"judge": {"url": "u", "model": "m", **judge}}}
        data = {"corpus": "c", "train": ["t"], "eval": {"e": "e"}}
        return Config.model_validate({"run": "r", "policy": {"model": "p"}, "data": data, "rollout": rollout}).fingerprint()

    assert fingerprint(timeout=5.0, time_limit=9.0, concurrency=2, cache="other.jsonl") == fingerprint()
    assert fingerprint(prompt="{question}{golds}{answer}") != fingerprint()
