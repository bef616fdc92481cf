import json
from pathlib import Path
from typing import Any

import pytest

from search_e1.data import prepare
from search_e1.data.prepare import Request
from search_e1.data.questions import to_record
from search_e1.data.user_files import Columns
from search_e1.errors import DataError

CONTEXT = [["Arthur's Magazine", ["A magazine.", " It ended."]], ["First for Women", ["Another."]], ["Radio City", ["Radio."]]]
HOTPOT = {
    "supporting_facts": [["Arthur's Magazine", 0], ["First for Women", 0], ["Arthur's Magazine", 1]],
    "level": "medium",
    "question": "Which magazine was started first?",
    "context": CONTEXT,
    "answer": "Arthur's Magazine",
    "_id": "5a7a06935542990198eaf050",
    "type": "comparison",
}
WIKI2 = {
    "_id": "8813f87c0bdd11eba7f7acde48001122",
    "type": "compositional",
    "question": "Who is the mother of the director of film Polish-Russian War?",
    "context": [["Polish-Russian War (film)", ["A film."]], ["Xawery Żuławski", ["A director."]]],
    "entity_ids": "Q7320430_Q51759",
    "supporting_facts": [["Polish-Russian War (film)", 1], ["Xawery Żuławski", 2]],
    "evidences": [["Polish-Russian War", "director", "Xawery Żuławski"], ["Xawery Żuławski", "mother", "Małgorzata Braunek"]],
    "answer": "Małgorzata Braunek",
    "evidences_id": [["Q1", "director", "Q2"], ["Q2", "mother", "Q274277"]],
    "answer_id": "Q274277",
}
MUSIQUE = {
    "id": "2hop__482757_12019",
    "paragraphs": [
        {"idx": 0, "title": "Maria Bello", "paragraph_text": "An actor.", "is_supporting": False},
        {"idx": 1, "title": "Green (album)", "paragraph_text": "By Steve Hillage.", "is_supporting": True},
        {"idx": 2, "title": "Miquette Giraudy", "paragraph_text": "His partner.", "is_supporting": True},
    ],
    "question": "Who is the spouse of the Green performer?",
    "question_decomposition": [
        {"id": 482757, "question": "Green >> performer", "answer": "Steve Hillage", "paragraph_support_idx": 1},
        {"id": 12019, "question": "#1 >> spouse", "answer": "Miquette Giraudy", "paragraph_support_idx": 2},
    ],
    "answer": "Miquette Giraudy",
    "answer_aliases": ["Giraudy"],
    "answerable": True,
}
UNANSWERABLE = MUSIQUE | {"id": "2hop__1_2", "question": "Whose?", "answerable": False, "question_decomposition": [
    {"id": 1, "question": "Green >> performer", "answer": "x", "paragraph_support_idx": None},
    {"id": 2, "question": "#1 >> spouse", "answer": "y", "paragraph_support_idx": 2},
]}  # fmt: skip
TRIVIA = {
    "Data": [
        {
            "Answer": {
                "Aliases": ["Harry Sinclair Lewis", "(Harry) Sinclair Lewis", ""],
                "HumanAnswers": ["Lewis"],
                "MatchedWikiEntityName": "Sinclair Lewis",
                "NormalizedAliases": ["sinclair lewis", "harry sinclair lewis"],
                "NormalizedMatchedWikiEntityName": "sinclair lewis",
                "NormalizedValue": "sinclair lewis",
                "Type": "WikipediaEntity",
                "Value": "Sinclair Lewis",
            },
            "EntityPages": [{"DocSource": "TagMe", "Filename": "Nobel.txt", "Title": "Nobel Prize"}],
            "Question": "Which American-born Sinclair won the Nobel Prize for Literature in 1930?",
            "QuestionId": "tc_1",
            "QuestionSource": "http://www.triviacountry.com/",
            "SearchResults": [],
        }
    ],
    "Domain": "unfiltered-web",
    "Split": "train",
    "VerifiedEval": False,
    "Version": 1.0,
}
KILT = {
    "id": "6915606477668963399",
    "input": "what do the 3 dots mean in math",
    "meta": {"left_context": "", "mention": "", "right_context": "", "partial_evidence": []},
    "output": [
        {"answer": "the therefore sign", "provenance": [
            {"wikipedia_id": "10593264", "title": "Therefore sign", "start_paragraph_id": 1, "end_paragraph_id": 1},
            {"wikipedia_id": "10593264", "title": "Therefore sign", "start_paragraph_id": 2, "end_paragraph_id": 2},
        ]},
        {"answer": "therefore sign ( ∴ )"},
        {"provenance": [{"wikipedia_id": "1", "title": "Another page"}]},
    ],
}  # fmt: skip


def read(path: Path, *, mapping: tuple[str, ...] = (), **more: Any) -> tuple[list[dict[str, Any]], list[str]]:
    made = prepare.prepare(Request(train=(str(path),), columns=Columns.parse(mapping), **more))
    return [to_record(row.question) for row in made.parts[0].rows], made.warnings


def file(path: Path, content: Any) -> Path:
    lines = path.suffix == ".jsonl"
    text = "".join(json.dumps(row) + "\n" for row in content) if lines else json.dumps(content)
    path.write_text(text)
    return path


def test_hotpotqa(tmp_path: Path) -> None:
    [record], warnings = read(file(tmp_path / "hotpot_dev_fullwiki_v1.json", [HOTPOT]))
    assert warnings == []
    assert record == {
        "id": "5a7a06935542990198eaf050",
        "question": "Which magazine was started first?",
        "golden_answers": ["Arthur's Magazine"],
        "metadata": {
            "hops": 2,
            "supporting_titles": ["Arthur's Magazine", "First for Women"],
            "type": "comparison",
            "level": "medium",
        },
    }


def test_2wikimultihopqa_and_its_aliases(tmp_path: Path) -> None:
    four = WIKI2 | {"_id": "b", "type": "bridge_comparison", "answer_id": None, "question": "Which?", "answer": "no"}
    path = file(tmp_path / "dev.json", [WIKI2, four])
    (first, second), warnings = read(path)
    assert warnings == []
    assert first["golden_answers"] == ["Małgorzata Braunek"]
    assert first["metadata"] == {
        "hops": 2,
        "supporting_titles": ["Polish-Russian War (film)", "Xawery Żuławski"],
        "evidences": WIKI2["evidences"],
        "type": "compositional",
    }
    assert (second["golden_answers"], second["metadata"]["hops"]) == (["no"], 4)
    names = {"Q_id": "Q274277", "aliases": ["Malgorzata Braunek"], "demonyms": ["Braunek"]}
    aliases = tmp_path / "id_aliases.json"
    aliases.write_text(json.dumps(names) + "\n" + json.dumps({"Q_id": "Q9", "aliases": [], "demonyms": ["x"]}) + "\n")
    (first, second), warnings = read(path)
    assert first["golden_answers"] == ["Małgorzata Braunek", "Malgorzata Braunek", "Braunek"]
    assert second["golden_answers"] == ["no"]
    assert warnings == [f"dev.train.jsonl: answers include the aliases in {aliases}"]


def test_musique_without_its_unanswerable_questions(tmp_path: Path) -> None:
    path = file(tmp_path / "musique_full_v1.0_dev.jsonl", [MUSIQUE, UNANSWERABLE])
    [record], warnings = read(path)
    assert warnings == [
        f"musique_full_v1.train.jsonl: 1 unanswerable questions are left out ({path}:2); --keep-unanswerable keeps them"
    ]
    assert record == {
        "id": "2hop__482757_12019",
        "question": "Who is the spouse of the Green performer?",
        "golden_answers": ["Miquette Giraudy", "Giraudy"],
        "metadata": {"hops": 2, "supporting_titles": ["Green (album)", "Miquette Giraudy"]},
    }
    (_, other), warnings = read(path, keep_unanswerable=True)
    assert warnings == [
        f"musique_full_v1.train.jsonl: 1 questions are unanswerable ({path}:2); a run on them needs rollout.rewards.not_found"
    ]
    assert other["metadata"] == {"hops": 2, "supporting_titles": ["Miquette Giraudy"], "unanswerable": True}
    with pytest.raises(DataError, match=r"no questions in it but unanswerable ones \(--keep-unanswerable\)"):
        read(file(tmp_path / "none.jsonl", [UNANSWERABLE]))


@pytest.mark.parametrize("indent", [None, 2])
def test_triviaqa(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "wikipedia-dev.json"
    path.write_text(json.dumps(TRIVIA, indent=indent))
    [record], warnings = read(path)
    assert warnings == []
    assert record == {
        "id": "tc_1",
        "question": "Which American-born Sinclair won the Nobel Prize for Literature in 1930?",
        "golden_answers": ["Sinclair Lewis", "Harry Sinclair Lewis", "Lewis"],
        "metadata": {"hops": 1},
    }


def test_nq_open(tmp_path: Path) -> None:
    rows = [{"question": "when was the last time anyone was on the moon", "answer": ["14 December 1972 UTC", "December 1972"]}]
    [record], warnings = read(file(tmp_path / "NQ-open.dev.jsonl", rows))
    assert warnings == []
    assert record["golden_answers"] == ["14 December 1972 UTC", "December 1972"]
    assert record["id"].startswith("NQ-open_")


def test_kilt(tmp_path: Path) -> None:
    [record], warnings = read(file(tmp_path / "nq-dev-kilt.jsonl", [KILT]))
    assert warnings == []
    assert record == {
        "id": "6915606477668963399",
        "question": "what do the 3 dots mean in math",
        "golden_answers": ["the therefore sign", "therefore sign ( ∴ )"],
        "metadata": {"supporting_titles": ["Therefore sign"]},
    }


def test_columns_that_are_given_count_before_a_layout(tmp_path: Path) -> None:
    [record], _ = read(file(tmp_path / "a.json", [HOTPOT]), mapping=("answers=type", "id=_id"))
    assert record == {"id": HOTPOT["_id"], "question": HOTPOT["question"], "golden_answers": ["comparison"]}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "hotpot_test.json",
            [{k: HOTPOT[k] for k in ("_id", "question", "context")}],
            ":1: no answer; the test set of HotpotQA",
        ),
        ("wiki.json", [WIKI2, {"_id": "x"}], ":2: not in the layout of 2WikiMultihopQA (no 'question'); give the file as"),
        ("musique.jsonl", [MUSIQUE | {"paragraphs": [1]}], ":1: not in the layout of MuSiQue ("),
        (
            "trivia.json",
            {"Data": [{"Question": "Who?", "QuestionId": "x"}]},
            ":1: no answer; the test set of TriviaQA is published without answers",
        ),
        (
            "nq-test-kilt.jsonl",
            [{"id": "1", "input": "who?"}],
            ":1: no answer; the test set of KILT is published without answers",
        ),
        ("triviaqa-kilt.jsonl", [{"id": "1", "output": KILT["output"]}], ":1: not in the layout of KILT (no 'input': KILT's"),
        ("broken.json", "x", ":1: str where a JSON object is needed"),
    ],
)
def test_another_file_is_refused_in_one_line(tmp_path: Path, name: str, content: Any, said: str) -> None:
    path = file(tmp_path / name, [content] if content == "x" else content)
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}{said}")
    assert "\n" not in str(caught.value)


def test_aliases_of_another_form_are_refused(tmp_path: Path) -> None:
    path = file(tmp_path / "dev.json", [WIKI2])
    (tmp_path / "id_aliases.json").write_text('{"Q1": ["x"]}\n')
    with pytest.raises(
        DataError, match=r"id_aliases.json:1: not Q_id, aliases and demonyms; give id_aliases.json as published"
    ):
        read(path)
