"""The audit of questions and passages: figures by hand, ranks beside the index's own, what is refused, and the verb."""

import csv
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search_e1.cli import main as cli
from search_e1.data.answers import in_language
from search_e1.data.corpus import Corpus
from search_e1.data.world import make_world, write
from search_e1.errors import DataError
from search_e1.evaluation.audit import Source, audit, read_source
from search_e1.evaluation.preflight import Level
from search_e1.evaluation.reach import Reach, measure
from search_e1.evaluation.recall import in_corpus, patterns
from search_e1.retrieval.bm25 import Bm25Index
from search_e1.types import Passage, Question

PASSAGES = [
    Passage(id="1", title="Arda", text="Arda is a land. Its capital is Bel."),
    Passage(id="2", title="Bel", text="The mayors of Bel, the capital of Arda: Cor-Dun, then Gil the Hor."),
    Passage(id="3", title="Eth", text="Eth is a land with a river."),
    Passage(id="4", title="Fen", text="Fen is a town in Eth, and its mayor is Gil."),
]


def question(id, text, *answers):
    return Question(id=id, text=text, answers=answers)


def texts(passages=PASSAGES):
    return [f"{passage.title} {passage.text}" for passage in passages]


def test_reach_by_hand():
    asked = [
        question("a", "What is the capital of Arda?", "Bel"),
        question("b", "Who is mayor of Fen?", "Gil Hor", "Gil"),  # articles do not part the words of an answer
        question("c", "Is Eth a land?", "yes"),
        question("d", "Who rules Eth?", "Dor"),
        question("e", "Quand?", "Cor Dun"),  # no word in common with any passage
    ]
    found = measure(texts(), asked)
    assert found.passages == 4
    assert found.by_question == [Reach(2, 1), Reach(2, 1), None, Reach(0, None), Reach(1, None)]
    assert measure([*texts(), texts()[0]], asked).repeated == 1


def test_ranks_are_those_of_the_index(tmp_path):
    write(make_world(), tmp_path / "world", train=30, dev=10, test=10, seed=0)
    source = read_source(tmp_path / "world" / "train.jsonl", "train", "train")
    passages = list(Corpus(tmp_path / "world" / "corpus.jsonl"))
    index = Bm25Index.build(passages, tmp_path / "index")
    asked = [q for _, q in source.rows]
    found = measure(texts(passages), asked)
    held = in_corpus(texts(passages), [patterns(q) for q in asked])
    compared = 0
    for own, q, somewhere in zip(found.by_question, asked, held, strict=True):
        assert (own and own.passages > 0) == somewhere
        if own is None:
            continue
        hits = index.search([q.text], len(passages))[0]
        holds = (i for i, hit in enumerate(hits, 1) if in_corpus([f"{hit.title} {hit.text}"], [patterns(q)]) == [True])
        assert own.rank == next(holds, None)
        compared += own.rank is not None
    assert compared > 10


UNSPACED = {
    "zh": (
        [
            ("北京", "北京是中华人民共和国的首都。"), ("上海", "上海是中国的城市,不是首都。"),
            ("东京", "东京。东京是日本的首都。"), ("购物", "京东是一家很大的公司,总部在亦庄,经营网上购物和物流。"),
            ("长江", "长江是中国最长的河。"), ("京都", "京都曾是日本的首都。"),
        ],
        [("日本的首都是哪里?", "东京"), ("中国最长的河是什么?", "长江"), ("首都中国", "城市"), ("京东", "公司")],
    ),
    "th": (
        [("กรุงเทพ", "กรุงเทพเป็นเมืองหลวงของไทย"), ("เชียงใหม่", "เชียงใหม่เป็นเมืองในไทย"), ("โตเกียว", "โตเกียวเป็นเมืองหลวงของญี่ปุ่น")],
        [("เมืองหลวงของญี่ปุ่น", "โตเกียว"), ("เมืองหลวงของไทย", "กรุงเทพ"), ("ไทยเมือง", "เชียงใหม่")],
    ),
    "de": (
        [("Arda", "Die Flüsse von Arda sind lang."), ("Bel", "Ein Fluss fließt durch Bel."), ("Cor", "Städte am Flusse: Dun.")],
        [("Welche Stadt liegt am Fluss?", "Dun"), ("Was fließt?", "Bel"), ("Die Flüsse?", "lang")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("language", UNSPACED)
def test_ranks_are_those_of_an_index_of_the_language(language, tmp_path):
    rows, pairs = UNSPACED[language]
    passages = [Passage(id=str(i), title=title, text=text) for i, (title, text) in enumerate(rows)]
    asked = [question(str(i), text, answer) for i, (text, answer) in enumerate(pairs)]
    index = Bm25Index.build(passages, tmp_path / "index", language=language)
    with in_language(language):
        for own, q in zip(measure(texts(passages), asked).by_question, asked, strict=True):
            holding = {p.id for p in passages if in_corpus(texts([p]), [patterns(q)]) == [True]}
            [hits] = index.search([q.text], len(passages))
            assert own == Reach(len(holding), next((i for i, hit in enumerate(hits, 1) if hit.id in holding), None))
            assert holding


def test_questions_of_the_same_characters_are_not_the_same():
    asked = [question("1", "京东在哪里?", "京"), question("2", "东京在哪里?", "东"), question("3", "东京 在哪里 ?", "东")]
    with in_language("zh"):
        found, _ = audit([source("dev", "eval", *asked)], ["东京"], topk=1)
    assert (found.totals[0].repeats, found.totals[0].near_repeats) == (1, 0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("ab .'é-1", max_size=12), max_size=6), st.lists(st.text("ab é1", min_size=1, max_size=6), min_size=1))
def test_as_many_passages_hold_an_answer_as_one_by_one(passages, answers):
    asked = [question(str(i), "a b?", answer) for i, answer in enumerate(answers)]
    for own, q in zip(measure(passages, asked).by_question, asked, strict=True):
        one_by_one = [in_corpus([text], [patterns(q)])[0] for text in passages]
        assert (own.passages if own else None) == (sum(map(bool, one_by_one)) if patterns(q) else None)


def source(name, role, *questions):
    return Source(name, role, [(f"{name}:{i}", q) for i, q in enumerate(questions, 1)])


def test_an_audit_by_hand():
    train = source(
        "train", "train",
        question("1", "Who is the mayor of Fen?", "Gil"),
        question("2", "who is mayor of fen", "Dor"),  # repeats 1, with another answer
        question("3", "What is Arda's capital?", "Bel"),
        question("4", "Is Eth a land?", "yes"),
        question("5", "What stands at the end?", "..."),
    )  # fmt: skip
    dev = source(
        "dev", "eval",
        question("6", "Who is the mayor of Fen?", "Gil"),  # leaked
        question("7", "What are the rivers of Eth?", "Long"),
        question("8", "What is the river of Eth?", "Long"),  # as 7 but for an ending and a stop word
    )  # fmt: skip
    found, examples = audit([train, dev], texts(), topk=1)
    trained, evaluated = found.totals
    assert (trained.questions, trained.yes_no, trained.repeats, trained.conflicts, trained.leaks) == (5, 1, 1, 2, 2)
    assert (trained.unsayable, trained.out_of_reach) == (1, 2)  # "Dor" and "..."
    assert trained.in_corpus == pytest.approx(2 / 3)  # of 1, 2, 3
    assert trained.in_top == {1: pytest.approx(2 / 3), 10: pytest.approx(2 / 3), 100: pytest.approx(2 / 3)}
    assert (evaluated.leaks, evaluated.near_leaks, evaluated.repeats, evaluated.near_repeats) == (1, 0, 0, 1)
    assert evaluated.most == pytest.approx(1 / 3)
    assert found.verdict.startswith(
        "Of 3 evaluation questions 67% have no passage that holds an answer: EM can be at most 0.33, unless the policy"
    )
    problems = [(e.problem, e.id) for e in examples if e.problem not in ("common", "far")]
    assert problems == [
        ("unsayable", "5"), ("conflict", "1"), ("conflict", "2"), ("conflict", "6"),
        ("leak", "1"), ("leak", "2"), ("leak", "6"), ("repeat", "2"), ("near repeat", "8"),
        ("out of reach", "2"), ("out of reach", "7"), ("out of reach", "8"),
    ]  # fmt: skip


def test_what_the_documents_are_not_to_hold_is_not_out_of_reach():
    asked = question("1", "Who rules Eth?", "not in the documents").model_copy(update={"metadata": {"unanswerable": True}})
    found, examples = audit([source("dev", "eval", asked, question("2", "Capital?", "Bel"))], texts(), topk=3)
    assert (found.totals[0].unanswerable, found.totals[0].in_corpus, found.totals[0].out_of_reach) == (1, 1.0, 0)
    assert [e.problem for e in examples if e.id == "1"] == []


def test_an_answer_that_is_everywhere_is_no_evidence():
    everywhere = [f"Arda {i}" for i in range(19)] + ["Bel"]
    found, examples = audit(
        [source("dev", "eval", question("1", "Bel?", "Arda"), question("2", "Where?", "Bel"))], everywhere, topk=3
    )
    assert found.totals[0].common == 1
    assert [(e.id, e.detail) for e in examples if e.problem == "common"] == [("1", "19 of 20 passages")]


def test_answers_that_the_tokenizer_cannot_write(tiny_policy):
    asked = source("dev", "eval", question("1", "Where?", "x" * 40, "y" * 60), question("2", "Who?", "x" * 40, "Bel"))
    found, [example] = audit([asked], None, topk=3, tokenizer=tiny_policy.tokenizer, max_action_tokens=32)
    assert (found.passages, found.totals[0].in_corpus, found.totals[0].unsayable) == (None, None, 1)
    assert example.detail == f"{'x' * 40!r} takes 40 tokens, and max_action_tokens is 32"

    class Deaf:
        def __call__(self, texts, **_):
            return {"input_ids": [[0]] * len(texts)}

        def decode(self, ids, **_):
            return "?"

    _, examples = audit([asked], None, topk=3, tokenizer=Deaf(), max_action_tokens=32)
    assert {e.detail.rpartition("' ")[2] for e in examples} == {"has characters that the tokenizer cannot write"}


def lines(path, *rows):
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def row(id, text, *answers):
    return {"id": id, "question": text, "golden_answers": list(answers)}


def test_lines_that_no_run_reads_are_collected(tmp_path):
    path = lines(tmp_path / "q.jsonl", row("1", "Who?", "Gil"), "{", row("1", "Where?", "Bel"), row("2", "When?", ""))
    found = read_source(path, "q", "eval")
    assert [q.id for _, q in found.rows] == ["1"]
    assert [where.rpartition(":")[2] for where, _ in found.refused] == ["2", "3", "4"]
    assert "id '1' was used at" in found.refused[1][1]
    with pytest.raises(DataError, match=r"empty\.jsonl: no question in it"):
        read_source(lines(tmp_path / "empty.jsonl"), "q", "eval")


def run(monkeypatch, capsys, *words):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.argv", ["search-e1", "data", "audit", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return left.value.code, capsys.readouterr()


def test_the_verb(tmp_path, monkeypatch, capsys):
    corpus = lines(
        tmp_path / "c.jsonl", *(p.model_dump(exclude={"metadata"}) for p in PASSAGES), {"id": "5", "title": "", "text": ""}
    )
    train = lines(tmp_path / "train.jsonl", row("1", "Who is the mayor of Fen?", "Gil"), row("2", "Is Eth a land?", "yes"))
    dev = lines(tmp_path / "dev.jsonl", row("3", "Who rules Eth?", "Dor"), row("4", "What is the capital of Arda?", "Bel"))
    words = ("--corpus", corpus, "--train", train, "--eval", f"lands={dev}", "--topk", 2)
    status, said = run(monkeypatch, capsys, *words, "--json", tmp_path / "a.json", "--out", tmp_path / "a.csv")
    assert status == 0
    assert max(map(len, said.out.splitlines())) <= 80
    shown = " ".join(said.out.split())
    assert "Of 2 evaluation questions 50% have no passage that holds an answer: EM can be at most 0.50" in shown
    assert "invalid passages: 1 without text" in shown
    found = json.loads((tmp_path / "a.json").read_text())
    assert [(f["name"], f["in_corpus"]) for f in found["files"]] == [("train", 1.0), ("lands", 0.5)]
    with (tmp_path / "a.csv").open() as file:
        assert ("out of reach", "3") in [(e["problem"], e["id"]) for e in csv.DictReader(file)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "nothing to audit; give --config FILE, or question files with --train and --eval"),
        (("--eval", "no.jsonl", "--corpus", "c.jsonl"), "no.jsonl: cannot be read (No such file or directory)"),
        (("--eval", "a=x.jsonl", "--eval", "a=y.jsonl"), "two files are called 'a'"),
    ],
)
def test_what_is_refused(words, message, monkeypatch, capsys):
    status, said = run(monkeypatch, capsys, *words)
    assert status == 2
    assert message in said.err
    assert said.err.count("\n") == 1


def test_level_follows_what_is_lost():
    held, lost = question("1", "Capital of Arda?", "Bel"), question("2", "Who?", "Dor")

    def level(*asked):
        return audit([source("dev", "eval", *asked)], texts(), topk=1)[0].findings[0].level

    assert level(held, lost) is Level.WARNING
    assert level(held, held.model_copy(update={"id": "3"})) is Level.OK


@pytest.mark.parametrize(
    "words",
    [
        ["data", "audit", "--train", "q.jsonl", "--json", "nodir/x.json"],
        ["data", "audit", "--train", "q.jsonl", "--out", "nodir/x.csv"],
        ["init", "nodir/mine.toml"],
        ["world", "/proc/nope"],
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["search-e1", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "no directory nodir; make it first" in said or "/proc/nope: No such file or directory; give a directory" in said
