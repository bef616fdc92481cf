"""EM and F1 beside torchmetrics' SQuAD, on answers of our own making."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from search_e1.types import Question

PATH = Path(__file__).parent.parent / "benchmarks" / "judging.py"
QUESTIONS = [
    Question(id=str(i), text="?", answers=answers, benchmark="made", metadata={"answer_in_corpus": said})
    for i, (answers, said) in enumerate(
        [
            (("Velmora", "The Velmora", "Velmora City"), True),
            (("J. K. Ornway's \u201cRed\u201d-house",), True),
            (("1,204.5 km", "1204.5 kilometres"), False),
            (("A Man and the Sea", "Man & Sea"), False),
            (("Łódzk\u2013Ävre", "U.S.A."), True),
            (("the", "The The"), False),
            (("24 December 1913",), True),
            (("yes",), False),
        ]
    )
]


@pytest.fixture(scope="module")
def judging():
    spec = importlib.util.spec_from_file_location("benchmark_judging", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_em_and_f1_are_torchmetrics(judging):
    made = judging.pairs(QUESTIONS, 1_100, seed=0)
    assert made == judging.pairs(QUESTIONS, 1_100, seed=0)
    rows, differing = judging.agreement(made)
    assert {row["kind"]: row["pairs"] for row in rows} == dict.fromkeys([*judging.PERTURBATIONS, judging.OTHER], 100)
    assert 300 < sum(row["right"] for row in rows) < 700  # both outcomes are common
    # They differ where they are meant to: F1 by HotpotQA's rule for yes and no, both by an answer of which nothing is left.
    for row in differing:
        assert row["gold"] == ["yes"] or row["gold"] == ["the", "The The"], row
        assert row["ours"][1] == 0.0
    assert sum(100 - row["em_agrees"] for row in rows) == sum(row["ours"][0] != row["theirs"][0] for row in differing) > 0
    assert all(row["ours"][0] == 0.0 for row in differing if row["ours"][0] != row["theirs"][0])


def test_the_corpus_is_held_against_the_metadata(judging, tmp_path, monkeypatch, capsys):
    corpus, questions = tmp_path / "corpus.jsonl", tmp_path / "made.dev.jsonl"
    texts = ["Velmora lies by the sea.", "a 1,204.5 km road", "Łódzk\u2013Ävre", "It was on 24 December 1913."]
    corpus.write_text("".join(json.dumps({"id": i, "contents": f'"t"\n{t}'}) + "\n" for i, t in enumerate(texts)))
    records = [{"id": q.id, "question": "?", "golden_answers": q.answers, "metadata": q.metadata} for q in QUESTIONS]
    questions.write_text("".join(json.dumps(record) + "\n" for record in records))
    out = tmp_path / "rows.json"
    words = [questions, "--pairs", 22, "--corpus", corpus, "--json", out]
    monkeypatch.setattr(sys, "argv", ["judging.py", *map(str, words)])
    judging.main()
    found = json.loads(out.read_text())
    [row] = found["corpus"]
    assert row == {"benchmark": "made", "questions": 8, "apart": 2, "here": 4, "said": 4}
    assert [(r["id"], r["here"], r["said"]) for r in found["corpus_differing"]] == [
        ("1", False, True),
        ("2", True, False),
    ]
    assert max(map(len, capsys.readouterr().out.splitlines()[:16])) <= 80
