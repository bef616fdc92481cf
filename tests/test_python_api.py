"""``evaluate``, ``compare`` and ``report`` as a Python user calls them, on the package's own small policy."""

import json
import traceback
from pathlib import Path

import pytest

import search_e1
from conftest import PASSAGES, TinyRetriever
from search_e1.errors import ConfigError, DataError, RunError
from search_e1.evaluation.statistics import wilson
from search_e1.runs.progress import silent

FILMS = {"Talu Womgorn": ("Fuki Zixtim", "Buta Monvok"), "Togi Bex": ("Tira Tertim", "Buta Monvok")}
LIMITS = search_e1.RolloutConfig(topk=1)


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> search_e1.Retriever:
    place = tmp_path_factory.mktemp("index") / "bm25"
    passages = [
        search_e1.Passage(id=str(i), title=name, text=f"{name} is a film with director {director} and studio {studio}.")
        for i, (name, (director, studio)) in enumerate(FILMS.items())
    ]
    search_e1.Bm25Index.build(passages, place)
    return search_e1.Bm25Index.open(place)


@pytest.fixture(scope="module")
def policy() -> search_e1.Policy:
    return search_e1.load_policy("small", search_e1.PolicyConfig(model="small"))


def questions(benchmark: str = "") -> list[search_e1.Question]:
    """Two that the passages answer, and one whose answer is none of theirs."""
    asked = [(f"What is the studio of the film {name}?", studio) for name, (_, studio) in FILMS.items()]
    asked.append(("What is the studio of the film Talu Womgorn?", "Nobody"))
    return [
        search_e1.Question(id=f"q{i}", text=text, answers=(gold,), benchmark=benchmark) for i, (text, gold) in enumerate(asked)
    ]


def test_a_policy_is_evaluated_in_one_call(policy, index):
    told = []
    result = search_e1.evaluate(policy, index, questions(), LIMITS, samples=2, progress=lambda *args: told.append(args[:2]))
    assert (result.n, result.em, result.interval) == (3, pytest.approx(2 / 3), wilson(2, 3))
    assert [(r.id, r.answer, r.em) for r in result.results] == [
        ("q0", "Buta Monvok", 1.0),
        ("q1", "Buta Monvok", 1.0),
        ("q2", "Buta Monvok", 0.0),
    ]
    assert list(result.evaluation.by_benchmark) == ["questions"]
    assert result.evaluation.searches >= 1
    assert 0 < result.em_sampled <= 2 / 3
    assert repr(result).startswith("EvaluationResult(n=3, em=0.667, interval=(0.208, 0.939), em_sampled=0.")
    assert told[-1] == (9, 9)
    assert result.path is None


def test_kept_evaluations_are_compared(policy, index, tmp_path):
    short = LIMITS.model_copy(update={"max_searches": 1})
    lines = [{"id": q.id, "question": q.text, "golden_answers": q.answers} for q in questions()]
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    first = search_e1.evaluate("small", index, tmp_path / "dev.jsonl", LIMITS, out=tmp_path / "a")
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()}
    again = search_e1.evaluate("small", index, str(tmp_path / "dev.jsonl"), LIMITS, out=str(tmp_path / "a"))
    assert (again.em, {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()}) == (first.em, files)
    second = search_e1.evaluate(policy, index, questions(), LIMITS, out=tmp_path / "b")
    compared = search_e1.compare(first, f"other={tmp_path / 'b'}")
    assert compared.policies == ("a", "other")
    [row] = [row for row in compared.rows if row.difference]
    assert (row.n, row.em.mean, row.difference.em.mean, row.difference.won, row.difference.lost) == (3, first.em, 0.0, 0, 0)
    assert row.difference.em.interval == pytest.approx((-wilson(0, 3)[1], wilson(0, 3)[1]))  # three questions prove nothing
    assert second.path == tmp_path / "b"
    search_e1.evaluate(policy, index, questions(), short, out=tmp_path / "c")
    with pytest.raises(ConfigError, match=r"rollout\.max_searches"):
        search_e1.compare(first, tmp_path / "c")
    with pytest.raises(ConfigError, match="exists; give another directory"):
        search_e1.evaluate(policy, index, questions(), LIMITS, out=tmp_path / "b")
    with pytest.raises(RunError, match="made from other settings or inputs"):
        search_e1.evaluate("small", index, questions("nq"), LIMITS, out=tmp_path / "a")


def test_an_evaluation_over_another_server_is_another(tmp_path):
    class Serving(TinyRetriever):
        """As an HTTP client: its checksum, if the server has one, is known after the first response."""

        url: str | None = None
        checksum: str | None = None
        sent: str | None = None

        def probe(self, topk: int) -> None:
            self.checksum = self.sent

    def over(out: str, **sent: str) -> search_e1.EvaluationResult:
        retriever = Serving(PASSAGES)
        for name, value in sent.items():
            setattr(retriever, name, value)
        return search_e1.evaluate("small", retriever, questions(), LIMITS, out=tmp_path / out)

    for out, name, here, there in (("a", "sent", "x", "y"), ("b", "url", "http://a", "http://b")):
        first = over(out, **{name: here})
        assert over(out, **{name: here}).em == first.em
        with pytest.raises(RunError, match="made from other settings or inputs"):
            over(out, **{name: there})
    over("c")
    with pytest.raises(ConfigError, match="c: already exists, and a retriever without a checksum"):
        over("c")


def test_mistakes_are_short(policy, index, tmp_path):
    with pytest.raises(DataError, match="no questions to evaluate on"):
        search_e1.evaluate(policy, index, [])
    with pytest.raises(ConfigError, match="no evaluations; give another"):
        search_e1.compare()
    kept = search_e1.EvaluationResult.__new__(search_e1.EvaluationResult)
    object.__setattr__(kept, "path", None)
    with pytest.raises(ConfigError, match="not kept; give evaluate"):
        search_e1.compare(kept)
    with pytest.raises(RunError, match="no such directory"):
        search_e1.report(tmp_path / "nothing")


def test_a_report_is_written_beside_its_run(policy, index, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    search_e1.evaluate(policy, index, questions(), LIMITS, out=run / "evaluation-base", progress=silent)
    assert search_e1.report(run) == run / "report.html"
    assert "<html" in (run / "report.html").read_text()
    assert search_e1.report(str(run), tmp_path / "mine.html", most=1) == Path(tmp_path / "mine.html")


def test_every_public_name_is_there():
    for name in search_e1.__all__:
        assert getattr(search_e1, name).__name__.rpartition(".")[2] in (name, name.removeprefix("load_"), "load")
    assert sorted(search_e1.__all__) == search_e1.__all__
    assert set(search_e1.__all__) < set(dir(search_e1))
    with pytest.raises(AttributeError, match="no attribute 'evalute'"):
        search_e1.evalute  # noqa: B018


HEADER = "Traceback (most recent call last):"
MISTAKES = {
    "a key": lambda place: search_e1.load_config(written(place / "c.toml", 'run = "x"\n[grpo]\nstep = 1\n')),
    "TOML": lambda place: search_e1.load_config(written(place / "c.toml", "run = ")),
    "a config that is missing": lambda place: search_e1.load_config(place / "none.toml"),
    "a question": lambda place: search_e1.load_questions(written(place / "q.jsonl", "{nonsense")),
    "a question file that is missing": lambda place: search_e1.load_questions(place / "none.jsonl"),
    "an index": lambda place: search_e1.Bm25Index.open(place / "none"),
    "a policy that is missing": lambda place: search_e1.load_policy("./none", search_e1.PolicyConfig(model="./none")),
    "a damaged policy": lambda place: search_e1.load_policy(
        written(place / "config.json", "{nonsense").parent, search_e1.PolicyConfig(model="x")
    ),
    "an evaluation": lambda place: search_e1.compare(place / "none", place / "none"),
}


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("mistake", MISTAKES)
def test_an_error_ends_with_one_traceback(mistake, tmp_path):
    """A message that says what, where and how to mend it is not preceded by a page of a library's own troubles."""
    with pytest.raises(search_e1.errors.SearchE1Error) as raised:
        MISTAKES[mistake](tmp_path)
    shown = "".join(traceback.format_exception(raised.value))
    assert shown.count(HEADER) == 1
    assert len(str(raised.value).splitlines()) == 1
