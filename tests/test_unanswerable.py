"""Questions that the documents do not answer, from the file to the figures."""

import json
from pathlib import Path

import pytest

from conftest import PASSAGES, TINY_PROMPTS, TinyRetriever
from scripted import ScriptedEngine
from search_e1.config import Config, EvaluationConfig, RewardsConfig, RolloutConfig
from search_e1.data import prepare
from search_e1.data.prepare import Request
from search_e1.data.questions import load_questions, settle
from search_e1.data.user_files import Columns
from search_e1.errors import DataError
from search_e1.evaluation import recall
from search_e1.evaluation.audit import audit, read_source
from search_e1.evaluation.evaluate import evaluate
from search_e1.evaluation.failures import Failure
from search_e1.evaluation.recall import is_yes_no, patterns
from search_e1.rollout.demonstrations import hops, questions
from search_e1.rollout.demonstrations.writer import Writer
from search_e1.rollout.loop import rollout
from search_e1.rollout.starts import starts
from search_e1.stages.inputs import Inputs
from search_e1.types import Group, Question

NOT_FOUND = ("not in the documents", "unknown")
LIMITS = RolloutConfig(max_tokens=512, topk=1, rewards=RewardsConfig(not_found=NOT_FOUND))
PROMPTS = TINY_PROMPTS.model_copy(update={"instruction": "not in the documents? {question}"})


def ask(id: str, text: str, *answers: str) -> Question:
    """Unanswerable without answers, as a run has it."""
    question = Question(id=id, text=text, answers=answers, metadata={} if answers else {"unanswerable": True})
    return settle(question, NOT_FOUND, id)


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(id: str, text: str, *answers: str) -> dict:
    return {"id": id, "question": text, "golden_answers": list(answers)}


def test_a_run_takes_them_where_its_rewards_know_them(tmp_path):
    train = lines(tmp_path / "train.jsonl", row("1", "Who rules Bel?"), row("2", "Where is Bel?", "Arda"))
    dev = lines(tmp_path / "dev.jsonl", row("3", "Who rules Ion?"))

    def inputs(**rollout) -> Inputs:
        data = {"corpus": "c", "train": [train], "eval": {"own": dev}}
        config = {"run": tmp_path / "r", "policy": {"model": "p"}, "data": data, "rollout": rollout}
        return Inputs(Config.model_validate(config), tmp_path / "r")

    for read in (lambda run: run.train_questions, lambda run: run.eval_questions):
        with pytest.raises(
            DataError, match=r"\.jsonl:1: a question without answers .*set rollout\.rewards\.not_found"
        ) as error:
            read(inputs())
        assert "\n" not in str(error.value)
    run = inputs(rewards={"not_found": NOT_FOUND})
    assert [q.answers for q in run.train_questions] == [NOT_FOUND, ("Arda",)]
    assert [q.answers for q in run.eval_questions["own"]] == [NOT_FOUND]


def test_right_is_who_says_that_nothing_is_found(tiny_policy, tmp_path):
    search, none = "<search> Bel </search>", "<answer> Not in the documents. </answer>"
    script = {
        "Who rules Bel?": [search, none],
        "Who rules Ion?": [search, "<answer> Cor Dun </answer>"],
        "Who owns Bel?": ["<answer> It is not in the documents </answer>"],
        "Who is mayor of Bel?": [search, none],
    }
    asked = [ask(str(i), text, *(["Cor Dun"] if "mayor" in text else [])) for i, text in enumerate(script)]
    retriever = TinyRetriever(PASSAGES[::-1])
    rows = recall.measure(retriever, [f"{p.title} {p.text}" for p in PASSAGES], {"own": asked}, 1)
    assert [(r.in_topk, r.in_corpus) for r in rows] == [(None, None)] * 3 + [(False, True)]
    found = evaluate(
        ScriptedEngine(tiny_policy.tokenizer, script), retriever, {"own": asked}, PROMPTS,
        EvaluationConfig(samples=0, latency=0), LIMITS, seed=0, out=tmp_path,
        recalls={(r.benchmark, r.id): r for r in rows},
    )  # fmt: skip
    results = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    assert [(r["em"], r["reward"], r["failure"]) for r in results] == [
        (1.0, 1.0, None), (0.0, 0.0, Failure.INVENTED), (0.0, 0.0, Failure.WORDING), (0.0, 0.0, Failure.NOT_READ_OUT),
    ]  # fmt: skip
    assert {(r["read"], r["yes_no"]) for r in results[:3]} == {(None, False)}
    assert (found.em, found.answerable, found.in_corpus, found.in_topk) == (0.25, 1, 1.0, 0.0)
    kind = found.by_answer_type["unanswerable"]
    assert (kind.n, kind.em, kind.reward, kind.answerable) == (3, pytest.approx(1 / 3), pytest.approx(1 / 3), None)


def test_nothing_is_looked_for():
    bare = Question(id="q", text="Who?", answers=(), metadata={"unanswerable": True})
    assert (patterns(bare), is_yes_no(bare)) == ((), False)
    named = bare.model_copy(update={"answers": ("Cor Dun",)})  # what MuSiQue keeps beside the mark
    assert patterns(named) == ()


def test_a_demonstration_searches_and_says_so(tiny_policy):
    writer = Writer(tiny_policy.tokenizer, PROMPTS, LIMITS, TinyRetriever(PASSAGES[::-1]))
    plans = questions.plans([ask("1", "Who rules Bel?"), ask("2", "zzz?")], writer)
    [lesson] = hops.lessons(plans, writer)  # none of what finds nothing at all
    assert [turn.action_text for turn in lesson.clean.turns] == [
        "<think> I need to find Bel.</think><search> Bel</search>",
        "<think> No passage says it. So the answer is not in the documents.</think><answer> not in the documents</answer>",
    ]
    assert lesson.clean.correct


def test_a_reference_has_searched(tiny_policy):
    asked = ask("1", "Who rules Bel?")
    said = [
        ["<answer> unknown </answer>"],
        ["<search> Bel </search>", "<answer> unknown </answer>"],
    ]
    made = []
    for script in said:
        engine = ScriptedEngine(tiny_policy.tokenizer, {asked.text: script})
        made += rollout(
            engine, TinyRetriever(PASSAGES), starts(tiny_policy.tokenizer, PROMPTS, [asked]), LIMITS,
            temperature=0.0, seed=0, prompts=PROMPTS,
        )  # fmt: skip
    assert [(t.correct, t.searches) for t in made] == [(True, 0), (True, 1)]
    assert Group(question=asked, trajectories=tuple(made)).reference == made[1]
    assert Group(question=asked, trajectories=(made[0],)).reference is None
    other = asked.model_copy(update={"metadata": {}})
    assert Group(question=other, trajectories=tuple(made)).reference == made[0]


def test_the_audit_counts_them_apart(tmp_path):
    path = lines(
        tmp_path / "dev.jsonl", row("1", "Who rules Bel?"), row("2", "Who owns it?"), row("3", "Mayor of Bel?", "Cor Dun")
    )
    texts = [f"{p.title} {p.text}" for p in PASSAGES]
    found, examples = audit([read_source(path, "dev", "eval")], texts, topk=1)
    [total] = found.totals
    assert (total.questions, total.unanswerable, total.yes_no, total.in_corpus, total.most) == (3, 2, 0, 1.0, 1.0)
    assert (total.unsayable, total.conflicts, total.out_of_reach) == (0, 0, 0)
    assert not [e for e in examples if e.id in "12"]
    wording = next(f.text for f in found.findings if f.check == "wording")
    assert wording == (
        "0% of 3 questions are answered by yes or no, and 2 questions are marked as unanswerable; every other question has an "
        "answer that can be given."
    )
    refused = read_source(path, "dev", "eval", not_found=()).refused
    assert [(where, "rollout.rewards.not_found" in fault) for where, fault in refused] == [
        (f"{path}:1", True),
        (f"{path}:2", True),
    ]
    lines(path, row("1", "Who rules Bel?"), row("2", "who rules Bel"), row("3", "Who rules Bel?", "Cor Dun"))
    _, examples = audit([read_source(path, "dev", "eval")], texts, topk=1)
    assert [(e.id, e.answers, e.detail) for e in examples if e.problem == "conflict"] == [
        ("1", "unanswerable", f"{path}:3: Cor Dun"),
        ("2", "unanswerable", f"{path}:3: Cor Dun"),
        ("3", "Cor Dun", f"{path}:1: unanswerable"),
    ]


def test_data_prepare_keeps_them_when_asked_to(tmp_path):
    table = tmp_path / "q.csv"
    table.write_text("question,answers,gone\nWho rules Bel?,,yes\nWhere is Bel?,Arda,no\n")
    request = Request(train=(str(table),), columns=Columns.parse(["metadata.unanswerable=gone"]))
    with pytest.raises(DataError, match=r"q\.csv:2: a question without answers; .*--keep-unanswerable"):
        prepare.prepare(request)
    kept = prepare.prepare(Request(train=(str(table),), columns=request.columns, keep_unanswerable=True))
    assert kept.warnings == [
        f"q.train.jsonl: 1 questions are unanswerable ({table}:2); a run on them needs rollout.rewards.not_found"
    ]
    prepare.write(kept, request, tmp_path / "out")
    written = load_questions(tmp_path / "out" / "q.train.jsonl")
    assert [(q.answers, q.unanswerable) for q in written] == [((), True), (("Arda",), False)]
