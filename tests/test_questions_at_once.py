"""Two calls of ``data questions`` with one output: the second is refused, and the first is not disturbed."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from search_e1.cli.main import app
from search_e1.errors import RunError
from search_e1.runs import locks


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    rows = [
        {
            "id": str(i),
            "title": f"Film {i}",
            "text": f"Film {i} is a film directed by Ann Day{i}. It was released in {1940 + i}.",
        }
        for i in range(40)
    ]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(*arguments: object) -> None:
    result = CliRunner().invoke(app, ["data", "questions", *map(str, arguments)])
    if result.exception:
        raise result.exception


def test_a_second_call_is_refused_while_the_first_works(corpus: Path, tmp_path: Path, monkeypatch):
    from search_e1.questions.rules import RuleWriter

    out, again = tmp_path / "out", []
    arguments = ("--corpus", corpus, "--by", "rule", "--number", 8, "--two-hop", 0, "--out", out)
    write = RuleWriter.write

    def writing(self, candidates):
        if not again:
            again.append("")
            with pytest.raises(RunError) as caught:
                run(*arguments)
            again.append(str(caught.value))
        return write(self, candidates)

    monkeypatch.setattr(RuleWriter, "write", writing)
    run(*arguments)
    assert again[1].startswith(f"{out}: process ")
    assert "wait for it, or use another" in again[1]
    alone = tmp_path / "alone"
    run(*arguments[:-1], alone)
    for name in ("train.jsonl", "eval.jsonl", "review.csv", "dropped.jsonl"):
        assert (out / name).read_bytes() == (alone / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "corpus.jsonl", "out"]


def test_a_review_is_applied_by_one_at_a_time(corpus: Path, tmp_path: Path):
    made, out = tmp_path / "made", tmp_path / "out"
    run("--corpus", corpus, "--by", "rule", "--number", 8, "--out", made)
    with locks.making(out), pytest.raises(RunError, match=r"/out: process \d+ on "):
        run("--review", made / "review.csv", "--out", out)
    assert not out.exists()
    run("--review", made / "review.csv", "--out", out)
    with pytest.raises(RunError, match=r"out exists; give another directory, or remove it"), locks.making(out):
        pass
    assert (out / "train.jsonl").exists()
