import json
import re
from pathlib import Path

import pytest
import torch

from scripted import ScriptedEngine
from search_e1.config import EvaluationConfig, Prompts, RolloutConfig
from search_e1.data.benchmarks import BENCHMARKS, TEST_SIZES
from search_e1.errors import DataError
from search_e1.evaluation.evaluate import SAMPLED, TIMINGS, TRAJECTORIES, evaluate
from search_e1.evaluation.failures import Failure
from search_e1.evaluation.published import PUBLISHED_3B, comparison
from search_e1.evaluation.recall import Recall
from search_e1.evaluation.results import QUESTIONS as QUESTIONS_FILE
from search_e1.evaluation.results import Evaluation, Result, read
from search_e1.evaluation.statistics import wilson
from search_e1.rollout.engines.base import Generation
from search_e1.rollout.engines.torch import TorchEngine
from search_e1.training.policy import Policy
from search_e1.types import Group, Question, StopReason

PROMPTS = Prompts(instruction="Q: {question}\n", correction="\nNo.\n")
LIMITS = RolloutConfig(max_searches=1, topk=1, max_action_tokens=64, max_observation_tokens=100, batch_size=2)
SCRIPT = {
    "one?": ["<search> arda </search>", "<answer> Bel </answer>"],  # right: 8 + 5 ids, 1 search
    "two?": ["<answer> Cor </answer>"],  # wrong, F1 2/3: 7 ids
    "three?": ["hm", "hm"],  # malformed: 4 ids
    "four?": ["<answer> Fen </answer>"],  # right: 7 ids
}


def question(text: str, answer: str, hops: int | None) -> Question:
    return Question(id=text, text=text, answers=(answer,), hops=hops)


QUESTIONS = {
    "nq": [question("one?", "Bel", 2), question("two?", "Cor Dun", 1), question("three?", "x", 2)],
    "musique": [question("four?", "Fen", None)],
}


class Flipping(ScriptedEngine):
    """When it samples, every second trajectory of a first action answers ``wrong``."""

    def generate(self, requests, *, temperature, stop):
        done = super().generate(requests, temperature=temperature, stop=stop)
        wrong = tuple(self.tokenizer.encode("<answer>wrong</answer>"))
        return [Generation(wrong) if temperature and request.key % 2 else g for request, g in zip(requests, done, strict=True)]


def test_scores_by_hand(tiny_policy: Policy, tiny_retriever, tmp_path: Path) -> None:
    generator = Flipping(tiny_policy.tokenizer, SCRIPT)
    shown: list[tuple[int, int, str]] = []
    result = evaluate(
        generator, tiny_retriever, QUESTIONS, PROMPTS, EvaluationConfig(samples=2, temperature=0.5), LIMITS,
        seed=0, out=tmp_path, progress=lambda done, total, figure="": shown.append((done, total, figure)),
    )  # fmt: skip
    tokens = {text: sum(len(tiny_policy.tokenizer.encode(action)) for action in actions) for text, actions in SCRIPT.items()}
    assert (result.n, result.em, result.searches) == (4, 0.5, 0.25)
    assert result.f1 == pytest.approx((1 + 2 / 3 + 0 + 1) / 4)
    assert result.tokens == sum(tokens.values()) / 4
    assert result.macro_em == pytest.approx((1 / 3 + 1) / 2)
    assert result.em_sampled == 0.25
    assert result.stop_reasons == {StopReason.ANSWERED: 3, StopReason.MALFORMED: 1}
    assert list(result.by_benchmark) == ["nq", "musique"]
    four, nq = result.by_benchmark["musique"], result.by_benchmark["nq"]
    assert (four.n, four.em, four.em_sampled, four.f1, four.searches) == (1, 1.0, 0.5, 1.0, 0.0)
    assert (four.tokens, four.em_interval, four.failures) == (tokens["four?"], wilson(1, 1), {})
    assert result.em_interval == wilson(2, 4)
    assert (nq.read, four.read) == (1 / 3, 0.0)  # "one?" read that Arda's capital is Bel
    assert (result.answerable, result.em_answerable, result.in_topk, result.in_corpus) == (None, None, None, None)
    assert nq.failures == {Failure.FORMAT: 1, Failure.NO_SEARCH: 1}
    assert result.em_by_sample == (0.5, 0.0)
    assert result.macro_em_sampled == pytest.approx((0.5 / 3 + 0.5) / 2)
    # Sampled: one? 15 and 7 ("wrong"), two? 7 and 7, three? 2 + 2 and 7, four? 7 and 7.
    assert result.sampled_tokens == sum(tokens.values()) + 61
    assert {hops: (row.n, row.em, row.em_sampled) for hops, row in result.by_hops.items()} == {
        1: (1, 0.0, 0.0),
        2: (2, 0.5, 0.25),
    }
    assert {call["temperature"] for call in generator.calls} == {0.0, 0.5}
    assert {figure.partition(" ")[0] for _, _, figure in shown} == {"greedy", "sampled", "EM"}
    told = [(done, total, re.sub(r", \d+ tok/s$", "", figure)) for done, total, figure in shown]
    assert told[3] == (4, 12, "greedy EM 0.500")
    assert told[11:] == [(12, 12, "sampled EM 0.250"), (12, 12, "EM greedy 0.500, sampled 0.250")]
    assert [done for done, *_ in shown] == [*range(1, 13), 12]
    assert Evaluation.model_validate(json.loads(result.model_dump_json())) == result


def test_searches_that_find_nothing_are_said_in_one_line(tiny_policy: Policy, tiny_retriever, tmp_path: Path, caplog) -> None:
    asked = {
        "one?": ["<search> \u6e05\u6717 </search>", "<answer> x </answer>"],
        "two?": ["<search> Bel </search>", "<answer> y </answer>"],
    }
    questions = {name: [Question(id=name, text=name, answers=("z",))] for name in asked}
    for script, said in ((asked, []), ({**asked, "two?": asked["one?"]}, ["2 of 2 searches found no passage"])):
        caplog.clear()
        made = tmp_path / str(len(said))
        made.mkdir()
        generator = ScriptedEngine(tiny_policy.tokenizer, script)
        evaluate(
            generator, tiny_retriever, questions, PROMPTS, EvaluationConfig(samples=0), LIMITS, seed=0,
            out=made,
        )  # fmt: skip
        assert [message.partition(":")[0] for message in caplog.messages] == said
        assert all("\n" not in message for message in caplog.messages)


def test_groups_are_written_in_order(tiny_policy: Policy, tiny_retriever, tmp_path: Path) -> None:
    generator = Flipping(tiny_policy.tokenizer, SCRIPT)
    evaluate(generator, tiny_retriever, QUESTIONS, PROMPTS, EvaluationConfig(samples=3), LIMITS, seed=0, out=tmp_path)
    for name, size in ((TRAJECTORIES, 1), (SAMPLED, 3)):
        groups = [Group.model_validate_json(line) for line in (tmp_path / name).read_text().splitlines()]
        assert [group.question for group in groups] == [q for part in QUESTIONS.values() for q in part]
        assert [len(group.trajectories) for group in groups] == [size] * 4


def test_without_samples_there_are_none(tiny_policy: Policy, tiny_retriever, tmp_path: Path) -> None:
    generator = ScriptedEngine(tiny_policy.tokenizer, SCRIPT)
    result = evaluate(generator, tiny_retriever, QUESTIONS, PROMPTS, EvaluationConfig(samples=0), LIMITS, seed=0, out=tmp_path)
    assert result.em_sampled is None
    assert [row.em_sampled for row in result.by_benchmark.values()] == [None, None]
    assert not (tmp_path / SAMPLED).exists()


def test_many_batches_score_as_one(tiny_policy: Policy, tiny_retriever, tmp_path: Path) -> None:
    many = {"nq": [q.model_copy(update={"id": f"{q.id}{i}"}) for i in range(20) for q in QUESTIONS["nq"]]}
    generator = ScriptedEngine(tiny_policy.tokenizer, SCRIPT)
    result = evaluate(generator, tiny_retriever, many, PROMPTS, EvaluationConfig(samples=0), LIMITS, seed=0, out=tmp_path)
    assert max(len(call["prompts"]) for call in generator.calls) == 4
    assert (result.n, result.em, result.searches) == (60, pytest.approx(1 / 3), pytest.approx(1 / 3))


def test_sampling_depends_on_its_seed_alone(tiny_policy: Policy, tiny_retriever, tmp_path: Path) -> None:
    generator = TorchEngine(tiny_policy.model, tiny_policy.tokenizer)
    limits = LIMITS.model_copy(update={"max_action_tokens": 6})

    def sampled(seed: int) -> str:
        torch.rand(seed + 1)
        state = torch.get_rng_state()
        evaluate(generator, tiny_retriever, QUESTIONS, PROMPTS, EvaluationConfig(), limits, seed=seed, out=tmp_path)
        assert torch.equal(torch.get_rng_state(), state)
        return (tmp_path / SAMPLED).read_text()

    assert sampled(0) == sampled(0) != sampled(1)


@pytest.mark.parametrize("questions", [{}, {"nq": []}, {**QUESTIONS, "popqa": []}])
def test_nothing_to_evaluate_on_is_refused(tiny_policy: Policy, tiny_retriever, tmp_path: Path, questions) -> None:
    generator = ScriptedEngine(tiny_policy.tokenizer, SCRIPT)
    with pytest.raises(DataError, match="no questions to evaluate on"):
        evaluate(generator, tiny_retriever, questions, PROMPTS, EvaluationConfig(), LIMITS, seed=0, out=tmp_path)


def test_every_question_is_judged(tiny_policy: Policy, tiny_retriever, tmp_path: Path) -> None:
    recalls = {
        ("nq", "one?"): Recall(benchmark="nq", id="one?", in_topk=True, in_corpus=True),
        ("nq", "two?"): Recall(benchmark="nq", id="two?", in_topk=False, in_corpus=True),
        ("nq", "three?"): Recall(benchmark="nq", id="three?", in_topk=False, in_corpus=False),
    }
    result = evaluate(
        Flipping(tiny_policy.tokenizer, SCRIPT), tiny_retriever, QUESTIONS, PROMPTS, EvaluationConfig(samples=2), LIMITS,
        seed=0, out=tmp_path, recalls=recalls,
    )  # fmt: skip
    one, two, three, four = read(tmp_path / QUESTIONS_FILE)
    tokens = [len(tiny_policy.tokenizer.encode(action)) for action in SCRIPT["one?"]]
    assert one == Result(
        benchmark="nq", id="one?", hops=2, question="one?", answers=("Bel",), answer="Bel", em=1.0, f1=1.0, cover_em=1.0,
        searches=1, tokens=sum(tokens), stop_reason=StopReason.ANSWERED, em_of_samples=(1.0, 0.0),
        tokens_of_samples=one.tokens_of_samples, yes_no=False, read=True, in_topk=True, in_corpus=True, failure=None,
    )  # fmt: skip
    assert (two.failure, two.cover_em, two.answer) == (Failure.NO_SEARCH, 0.0, "Cor")
    assert (three.failure, three.answer) == (Failure.NOT_IN_CORPUS, None)
    assert (four.in_topk, four.in_corpus) == (None, None)  # not looked for
    assert (result.answerable, result.em_answerable, result.in_topk) == (2, 0.5, 1 / 3)
    assert result.in_corpus == pytest.approx(2 / 3)


def test_some_benchmarks_come_out_as_among_all(tiny_policy: Policy, tiny_retriever, tmp_path: Path) -> None:
    generator = TorchEngine(tiny_policy.model, tiny_policy.tokenizer)
    limits = LIMITS.model_copy(update={"max_action_tokens": 6})
    found = []
    for name, questions in (("all", QUESTIONS), ("some", {"musique": QUESTIONS["musique"]})):
        (tmp_path / name).mkdir()
        evaluate(generator, tiny_retriever, questions, PROMPTS, EvaluationConfig(), limits, seed=0, out=tmp_path / name)
        found.append([(tmp_path / name / file).read_text().splitlines()[-1] for file in (TRAJECTORIES, SAMPLED)])
    assert found[0] == found[1]


def test_latency_is_that_of_questions_asked_alone(tiny_policy: Policy, tiny_retriever, tmp_path: Path) -> None:
    generator = ScriptedEngine(tiny_policy.tokenizer, SCRIPT)
    config = EvaluationConfig(samples=0, latency=2)
    evaluate(generator, tiny_retriever, QUESTIONS, PROMPTS, config, LIMITS, seed=0, out=tmp_path)
    timings = json.loads((tmp_path / TIMINGS).read_text())
    assert {name: timing["alone"] for name, timing in timings.items()} == {"nq": 2, "musique": 1}
    assert all(0 < timing["latency"] <= timing["longest"] for timing in timings.values())
    alone = [call["prompts"] for call in generator.calls if len(call["prompts"]) == 1]
    asked = [tiny_policy.tokenizer.decode(prompt).split("\n")[0] for [prompt] in alone]
    # Once all batches are through, one by one: "one?" (two actions), "two?", "four?".
    assert asked[-4:] == ["Q: one?", "Q: one?", "Q: two?", "Q: four?"]
    untimed = config.model_copy(update={"latency": 0})
    evaluate(generator, tiny_retriever, QUESTIONS, PROMPTS, untimed, LIMITS, seed=0, out=tmp_path)
    assert json.loads((tmp_path / TIMINGS).read_text())["nq"]["latency"] is None


def test_published_averages_are_those_of_their_rows() -> None:
    for row in PUBLISHED_3B:
        if row.em:
            assert tuple(row.em) == BENCHMARKS
            assert sum(row.em.values()) / 7 == pytest.approx(row.average, abs=0.051), row.method
    assert {row.method: row.average for row in PUBLISHED_3B}["Search-E1"] == 44.0
    assert sum(TEST_SIZES.values()) == 51_713


def test_a_comparison_is_over_the_same_benchmarks() -> None:
    rows = comparison({"nq": 0.4, "bamboogle": 0.2, "world": 0.9}, "mine")
    assert rows[-1].model_dump() == {
        "method": "mine",
        "em": {"nq": 40.0, "bamboogle": 20.0},
        "average": 30.0,
        "note": "",
    }
    by_method = {row.method: row for row in rows}
    assert by_method["RAG"].average == pytest.approx((34.8 + 8.0) / 2)
    assert by_method["EviSD"].average is None
    whole = comparison(dict.fromkeys(BENCHMARKS, 0.5))
    assert [row.average for row in whole] == [*(row.average for row in PUBLISHED_3B), 50.0]
    assert comparison({"world": 0.9}) == []
