import gzip
import json
from pathlib import Path

import pytest

from search_e1.data.questions import load_many, load_questions, subset, to_question, to_record
from search_e1.errors import DataError
from search_e1.types import Question

GOOD = {"id": "q1", "question": "Who?", "golden_answers": ["Ann", "Anna"], "metadata": {"hops": 2, "type": "bridge"}}


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def refusal(*paths: Path) -> str:
    with pytest.raises(DataError) as caught:
        load_many(paths)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_question_carries_all_that_its_line_says(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", GOOD, "", {**GOOD, "id": 7, "metadata": None, "other": 1})
    assert load_questions(path, "nq") == [
        Question(
            id="q1",
            text="Who?",
            answers=("Ann", "Anna"),
            benchmark="nq",
            hops=2,
            metadata={"hops": 2, "type": "bridge"},
        ),
        Question(id="7", text="Who?", answers=("Ann", "Anna"), benchmark="nq"),
    ]


@pytest.mark.parametrize("name", ["mine.csv", "mine.csv.gz", "MINE.TSV", "mine.parquet"])
def test_a_file_of_another_kind_is_pointed_to_what_converts_it(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_text("question,answers\nWho?,Oslo\n")
    with pytest.raises(DataError, match=f"{name}: not JSON lines; `search-e1 data prepare --train .*{name} --out DIR`"):
        load_questions(file)


def test_answers_in_other_columns_are_said(tmp_path: Path, caplog) -> None:
    file = tmp_path / "a.jsonl"
    row = {
        "id": "1",
        "question": "Who?",
        "golden_answers": ["Oslo"],
        "answer_aliases": ["Kristiania", "Oslo"],
        "answer": "Oslo",
        "answer_type": "text",
        "alias": None,
    }
    file.write_text(json.dumps(row) + "\n" + json.dumps(row | {"id": "2", "answers": ["Christiania"]}) + "\n")
    assert [q.answers for q in load_questions(file)] == [("Oslo",), ("Oslo",)]
    said = "not read: answer_aliases, answers; only golden_answers counts (`search-e1 data prepare` joins several columns)"
    assert caplog.messages == [f"{file}: {said}"]


def test_golds_that_nothing_matches_are_said(tmp_path: Path, caplog) -> None:
    path = write(tmp_path / "q.jsonl", GOOD, {**GOOD, "id": "q2", "golden_answers": ["!!!", "The"]})
    assert len(load_questions(path)) == 2
    said = f"{path}: 1 questions have only answers of punctuation and articles (q2: '!!!', 'The'), which no answer matches"
    assert caplog.messages == [said]


def test_an_empty_list_marks_what_the_documents_do_not_answer(tmp_path: Path) -> None:
    none, marked = {**GOOD, "golden_answers": []}, {**GOOD, "id": "q2", "metadata": {"unanswerable": True}}
    path = write(tmp_path / "q.jsonl", none, marked, {**GOOD, "id": "q3"})
    [plain, own, other] = load_questions(path)
    assert (plain.unanswerable, plain.answers, plain.hops) == (True, (), 2)
    assert (own.unanswerable, own.answers, other.unanswerable) == (True, ("Ann", "Anna"), False)
    assert to_record(plain) == {**none, "metadata": {**GOOD["metadata"], "unanswerable": True}}
    texts = ("not in the documents", "unknown")
    assert [q.answers for q in load_questions(path, not_found=texts)] == [texts, texts, ("Ann", "Anna")]
    with pytest.raises(DataError) as caught:
        load_questions(path, not_found=())
    assert str(caught.value).startswith(
        f"{path}:1: a question without answers (golden_answers = []); set rollout.rewards.not_f"
    )
    [kept] = load_questions(write(tmp_path / "m.jsonl", marked), not_found=())  # a run that does not know the kind counts EM
    assert kept.answers == ("Ann", "Anna")
    with pytest.raises(DataError, match=r"here: a question without answers \(golden_answers = \[\]\); give at least one"):
        to_question(none, "", "here")  # a benchmark from the Hub
    with pytest.raises(ValueError, match=r"needs an answer, or metadata.unanswerable = true"):
        Question(id="a", text="Who?", answers=())


@pytest.mark.parametrize("hops", [2, 2.0, "2", " 2.0 "])
def test_hops_as_tables_write_them(tmp_path: Path, hops: object) -> None:
    [question] = load_questions(write(tmp_path / "q.jsonl", {**GOOD, "metadata": {"hops": hops}}))
    assert question.hops == 2


def test_gz_and_plain_hold_the_same(tmp_path: Path) -> None:
    plain = write(tmp_path / "q.jsonl", GOOD)
    packed = tmp_path / "q.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert load_questions(packed) == load_questions(plain)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{not json", "not JSON"),
        ("[1]", "list where a JSON object is needed"),
        ({"question": "Who?", "golden_answers": ["x"]}, "field 'id' is missing"),
        ({"id": "a", "golden_answers": ["x"]}, "field 'question' is missing"),
        ({"id": "a", "question": "Who?"}, "field 'golden_answers' is missing"),
        ('{"id": "a", "question": "W\\udc00", "golden_answers": ["x"]}', "half of a surrogate pair"),
        (
            {"id": "a", "question": "Who?", "golden_answers": [], "metadata": {"unanswerable": False}},
            "metadata.unanswerable = false, and golden_answers = []",
        ),
        (
            {"id": "a", "question": "Who?", "golden_answers": ["x"], "metadata": {"unanswerable": 1}},
            "metadata.unanswerable = 1",
        ),
        ({"id": "a", "question": "Who?", "golden_answers": ["", " "]}, "a question without answers"),
        ({"id": "a", "question": "Who?", "golden_answers": ["x", ""]}, "an empty answer (golden_answers = ['x', ''])"),
        ('{"id": "a", "question": "Who?", "golden_answers": [NaN]}', "golden_answers = [nan] is not a list of strings"),
        ({"id": "a", "question": "Who?", "golden_answers": "x"}, "golden_answers = 'x' is not a list of strings"),
        ({"id": "a", "question": "Who?", "golden_answers": [1]}, "golden_answers = [1] is not a list of strings"),
        ({"id": "a", "question": "", "golden_answers": ["x"]}, "question = ''"),
        ({"id": "", "question": "Who?", "golden_answers": ["x"]}, "id = ''"),
        ({"id": "a", "question": 3, "golden_answers": ["x"]}, "question = 3"),
        (
            {"id": "a", "question": "Who?", "golden_answers": ["x"], "metadata": {"hops": "two"}},
            "metadata.hops = 'two'",
        ),
        ({"id": "a", "question": "Who?", "golden_answers": ["x"], "metadata": [1]}, "metadata is list"),
        ({"id": "a", "question": " ", "golden_answers": ["x"]}, "question = ' ': an empty question"),
        ({"id": "a", "question": "Who?", "golden_answers": [True]}, "golden_answers = [True] is not a list of strings"),
        *(
            ({"id": "a", "question": "Who?", "golden_answers": ["x"], "metadata": {"hops": hops}}, f"metadata.hops = {hops!r}")
            for hops in (True, 0, -1, 1.5, float("inf"), float("nan"), [1])
        ),
        (
            '{"id": "a", "question": "Who?", "golden_answers": ["x"], "golden_answers": ["y"]}',
            "key 'golden_answers' appears twice",
        ),
    ],
)
def test_a_bad_line_is_refused_by_file_and_line(tmp_path: Path, line: object, says: str) -> None:
    path = write(tmp_path / "q.jsonl", GOOD, line)
    message = refusal(path)
    assert message.startswith(f"{path}:2: ")
    assert says in message


def test_a_duplicate_id_names_both_places(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", {**GOOD, "id": "x"}, GOOD, GOOD)
    assert refusal(a).startswith(f"{a}:3: id 'q1' was used at {a}:2;")
    b, c = write(tmp_path / "b.jsonl", GOOD), write(tmp_path / "c.jsonl", {**GOOD, "id": "y"}, GOOD)
    assert refusal(b, c).startswith(f"{c}:2: id 'q1' was used at {b}:1;")


def test_files_without_questions_are_refused(tmp_path: Path) -> None:
    empty, blank = write(tmp_path / "empty.jsonl"), write(tmp_path / "blank.jsonl", "", "")
    for path in (empty, blank):
        assert refusal(path).startswith(f"{path}: no questions in it")
        assert refusal(write(tmp_path / "good.jsonl", GOOD), path).startswith(f"{path}: no questions in it")
    missing = tmp_path / "none.jsonl"
    assert refusal(missing).startswith(f"{missing}: cannot be read (No such file or directory)")
    assert "no question files" in refusal()


def test_a_damaged_gz_is_refused(tmp_path: Path) -> None:
    packed = gzip.compress(b"".join(json.dumps({**GOOD, "id": str(i)}).encode() + b"\n" for i in range(5000)))
    short, none = tmp_path / "short.gz", tmp_path / "none.gz"
    short.write_bytes(packed[: len(packed) // 2])
    none.write_text(json.dumps(GOOD))
    assert "cannot be read (Compressed file ended" in refusal(short)
    assert "cannot be read (Not a gzipped file" in refusal(none)


def test_load_many_keeps_the_order_of_files(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.jsonl", {**GOOD, "id": "1"}), write(tmp_path / "b.jsonl", {**GOOD, "id": "0"})
    assert [q.id for q in load_many([a, b])] == ["1", "0"]


def test_a_subset_is_the_same_for_a_seed() -> None:
    questions = [Question(id=str(i), text="?", answers=("x",)) for i in range(100)]
    chosen = [int(q.id) for q in subset(questions, 10, seed=3)]
    assert chosen == sorted(set(chosen))
    assert len(chosen) == 10
    assert chosen == [int(q.id) for q in subset(questions, 10, seed=3)]
    assert chosen != [int(q.id) for q in subset(questions, 10, seed=4)]
    assert subset(questions, 100, seed=0) == questions
    with pytest.raises(DataError, match="101 questions requested, but there are only 100"):
        subset(questions, 101, seed=0)


def test_a_line_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("search_e1.data.lines._MOST_BYTES", 2**20)
    path = tmp_path / "q.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n{" + b" " * 2**21 + b"}\n"))
    with pytest.raises(DataError, match=rf"{path}:2: more than 1 MiB in one line; write one object per line"):
        load_questions(path)
