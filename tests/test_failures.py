"""Every class of failure by hand, the order of decision, and retrieval recall."""

import pytest

from search_e1.errors import DataError, RetrievalError
from search_e1.evaluation import recall as recalls
from search_e1.evaluation.evaluate import judge
from search_e1.evaluation.failures import Failure
from search_e1.evaluation.recall import Recall, holds, in_corpus, is_yes_no, measure, patterns
from search_e1.types import ActionKind, Group, Question, StopReason, Trajectory, Turn

OSLO = ("Norway", "Norway is a land with capital Oslo.")
ROME = ("Italy", "Italy is a land with capital Rome.")


def search(query: str, *passages: tuple[str, str]) -> Turn:
    lines = "".join(f"Doc {i}(Title: {title}) {text}\n" for i, (title, text) in enumerate(passages, 1))
    served = {"observation_ids": (1,), "observation_text": f"\n\n<information>\n{lines}</information>\n\n"}
    return Turn(action_ids=(1,), action_text="", kind=ActionKind.SEARCH, argument=query, **(served if passages else {}))


def answer(text: str) -> Turn:
    return Turn(action_ids=(1, 2), action_text="", kind=ActionKind.ANSWER, argument=text)


BAD = Turn(action_ids=(1,), action_text="hm", kind=ActionKind.MALFORMED, observation_ids=(3,), observation_text="No.")
LAST_BAD = Turn(action_ids=(1,), action_text="hm", kind=ActionKind.MALFORMED)
STOPS = {
    "tokens": StopReason.MAX_TOKENS,
    "turns": StopReason.MAX_TURNS,
    "bad": StopReason.MALFORMED,
    "refused": StopReason.REFUSED,
}


def judged(*turns: Turn, gold=("Oslo",), stop: str | None = None, corpus: bool | None = True, **metadata: bool):
    question = Question(id="q", text="?", answers=gold, metadata=metadata)
    said = turns[-1].argument if stop is None else None
    trajectory = Trajectory(
        question_id="q",
        prompt_ids=(1,),
        turns=turns,
        stop_reason=STOPS[stop] if stop else StopReason.ANSWERED,
        answer=said,
        reward=float(said == gold[0]),
    )
    known = Recall(benchmark="b", id="q", in_topk=False, in_corpus=corpus)
    return judge("b", Group(question=question, trajectories=(trajectory,)), known)


CASES = {
    "right": (judged(search("a", OSLO), answer("Oslo")), None),
    "right, though it is nowhere": (judged(answer("Oslo"), corpus=False), None),
    "nowhere": (judged(search("a", ROME), answer("Rome"), corpus=False), Failure.NOT_IN_CORPUS),
    "nowhere comes before format": (judged(LAST_BAD, stop="bad", corpus=False), Failure.NOT_IN_CORPUS),
    "nowhere comes before wording": (judged(answer("in Oslo"), corpus=False), Failure.NOT_IN_CORPUS),
    "read, so it is somewhere": (judged(search("a", OSLO), answer("Rome"), corpus=False), Failure.NOT_READ_OUT),
    "refused by an endpoint": (judged(search("a", OSLO), LAST_BAD, stop="refused"), Failure.REFUSED),
    "no action at the end": (judged(search("a", OSLO), LAST_BAD, stop="bad"), Failure.FORMAT),
    "format comes before repeated": (
        judged(search("a", ROME), search("a", ROME), LAST_BAD, stop="bad"),
        Failure.FORMAT,
    ),
    "a bad action that was mended": (judged(BAD, search("a", ROME), answer("Rome")), Failure.NOT_RETRIEVED),
    "asked twice": (judged(search("the land", ROME), search("Land!", ROME), answer("Rome")), Failure.REPEATED_SEARCH),
    "asked twice until the end": (
        judged(search("a", OSLO), search("a", OSLO), search("a"), stop="turns"),
        Failure.REPEATED_SEARCH,
    ),
    "asked again where it was not served": (
        judged(search("a", ROME), search("a"), stop="turns"),
        Failure.REPEATED_SEARCH,
    ),
    "asked twice, and read": (judged(search("x", OSLO), search("x", OSLO), answer("Rome")), Failure.NOT_READ_OUT),
    "out of searches": (judged(search("x", OSLO), search("y", ROME), search("z"), stop="turns"), Failure.BUDGET),
    "out of tokens": (judged(search("x", OSLO), LAST_BAD, stop="tokens"), Failure.BUDGET),
    "wrong verdict": (judged(search("x", OSLO), answer("no"), gold=("yes",), corpus=None), Failure.YES_NO),
    "no verdict": (judged(search("x", OSLO), answer("Oslo"), gold=("No.", "no"), corpus=None), Failure.YES_NO),
    "yes comes before wording": (judged(answer("yes, it is"), gold=("yes",), corpus=None), Failure.YES_NO),
    "more than the answer": (judged(search("x", OSLO), answer("the city of Oslo")), Failure.WORDING),
    "more than the answer, not read": (judged(answer("Oslo, Norway")), Failure.WORDING),
    "answered, and there is none": (
        judged(search("a", OSLO), answer("Oslo"), gold=("none",), corpus=None, unanswerable=True),
        Failure.INVENTED,
    ),
    "read and not said": (judged(search("x", OSLO), answer("Norway")), Failure.NOT_READ_OUT),
    "from memory": (judged(answer("Rome")), Failure.NO_SEARCH),
    "from memory, corpus unknown": (judged(answer("Rome"), corpus=None), Failure.NO_SEARCH),
    "not found": (judged(search("x", ROME), search("y", ROME), answer("Rome")), Failure.NOT_RETRIEVED),
}


@pytest.mark.parametrize("case", CASES)
def test_the_class_of_a_wrong_answer(case):
    result, failure = CASES[case]
    assert result.failure is failure


def test_every_class_has_a_case():
    assert {failure for _, failure in CASES.values()} == {None, *Failure}


def test_what_was_read_is_what_was_left_of_the_passages():
    assert judged(search("x", OSLO), answer("Rome")).read is True
    assert judged(search("x", ("Oslo", "A city.")), answer("Rome")).read is True  # in a title
    cut = ("Norway", OSLO[1][: OSLO[1].index("slo")])
    assert judged(search("x", cut), answer("Rome")).read is False
    assert judged(search("Oslo", ROME), answer("Rome")).read is False  # what the policy wrote does not count
    assert judged(search("x", ROME), answer("Rome"), gold=("1", "Doc")).read is False  # nor does the numbering
    assert judged(search("x", OSLO), answer("no"), gold=("yes",)).read is None
    # An answer does not reach from one passage into the next.
    assert judged(search("x", ("a", "New"), ("York", "b")), answer("Rome"), gold=("New York",)).read is False


@pytest.mark.parametrize(
    ("text", "gold", "found"),
    [
        ("Oslo is the capital of Norway.", "oslo", True),
        ("Oslofjord", "Oslo", False),
        ("the Oslo-based firm", "Oslo", True),
        ("born in 1961/1963", "1963", True),
        ("J. L. Young's Institution", "J.L. Young's institution", True),
        ("a man of the world", "Man of a World", True),  # articles do not count
        ("the capital city", "Capital of the city", False),
        ("ŁÓDŹ, Poland", "Łódź", True),
        ("Lodz", "Łódź", False),
        ("Ko\u0308ln", "K\u00f6ln", True),  # composed or not
        ("K\u00f6ln", "Ko\u0308ln", True),
        ("U.S.", "US", False),
        ("snake_case", "case", True),
    ],
)
def test_whole_words_are_looked_for(text, gold, found):
    wanted = patterns(Question(id="q", text="?", answers=(gold,)))
    assert holds([text], wanted) is found
    assert in_corpus(["nothing", text, "more"], [wanted]) == [found]


def test_what_is_looked_for():
    question = Question(id="q", text="?", answers=("The Oslo", "oslo!", "Yes", "the", "...", "Kristiania"))
    assert patterns(question) == ("oslo", "kristiania")
    assert not is_yes_no(question)
    assert is_yes_no(Question(id="q", text="?", answers=("Yes.", "no")))
    assert not is_yes_no(Question(id="q", text="?", answers=("The",)))
    assert holds(["the"], ()) is None


def test_many_answers_in_one_pass(tiny_retriever):
    """Against looking for each answer in each passage, one after the other."""
    texts = [f"{p.title} {p.text}" for p in tiny_retriever.passages]
    golds = [
        "Bel",
        "bel is",
        "Bel Arda",
        "capital bel",
        "Cor Dun",
        "Dun Cor",
        "city with mayor",
        "12",
        "length",
        "Hor",
        "x",
        "1",
    ]
    wanted = [patterns(Question(id="q", text="?", answers=(gold, f"{gold} zzz"))) for gold in golds]
    expected = [any(holds([text], some) for text in texts) for some in wanted]
    assert in_corpus(iter(texts), wanted) == expected
    assert sum(map(bool, expected)) == 8
    assert in_corpus(texts, [()]) == [None]
    assert in_corpus([], wanted) == [False] * len(golds)


def test_recall_of_every_question(tiny_retriever):
    def question(text, *gold):
        return Question(id=text, text=text, answers=gold)

    asked = {
        "a": [question("arda", "Bel"), question("arda land?", "Cor Dun"), question("eth", "yes")],
        "b": [question("mayor", "Oslo")],
    }
    texts = [f"{p.title} {p.text}" for p in tiny_retriever.passages]
    rows = measure(tiny_retriever, texts, asked, 1)
    assert [(row.benchmark, row.id, row.in_topk, row.in_corpus) for row in rows] == [
        ("a", "arda", True, True),
        ("a", "arda land?", False, True),
        ("a", "eth", None, None),
        ("b", "mayor", False, False),
    ]
    assert recalls.figures(rows) == {"in_topk": pytest.approx(1 / 3), "in_corpus": pytest.approx(2 / 3)}
    unknown = measure(tiny_retriever, None, asked, 1)
    assert [row.in_corpus for row in unknown] == [None] * 4
    assert recalls.figures(unknown)["in_corpus"] is None


def test_a_retriever_that_fails_stops_it():
    class Dead:
        def search(self, queries, topk):
            raise RetrievalError("down")

    with pytest.raises(RetrievalError, match="down"):
        measure(Dead(), [], {"a": [Question(id="q", text="?", answers=("x",))]}, 1)


def test_a_damaged_recall_file_names_its_line(tmp_path):
    path = tmp_path / recalls.FILE
    good = Recall(benchmark="a", id="q", in_topk=None, in_corpus=None)
    path.write_text(good.model_dump_json() + "\n{}\n")
    with pytest.raises(DataError, match=rf"{recalls.FILE}:2"):
        list(recalls.read(path))
    with pytest.raises(DataError, match="evaluate again"):
        list(recalls.read(tmp_path / "nothing"))
