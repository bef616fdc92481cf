import hashlib
from pathlib import Path

import numpy as np
import pytest

from search_e1.errors import DataError, RetrievalError
from search_e1.retrieval.base import Hit
from search_e1.retrieval.passages import Passages
from search_e1.types import Passage

PASSAGES = [
    Passage(id="a", title="Bel", text="A city."),
    Passage(id="ü", title='A "q"\n', text="Zürich\u2028stone \U0001f600"),
    Passage(id="c", title="", text=""),
]


def test_they_come_back_as_they_were(tmp_path: Path) -> None:
    made = Passages.write(iter(PASSAGES), tmp_path)
    for passages in (made, Passages.open(tmp_path)):
        assert len(passages) == 3
        assert list(passages) == PASSAGES
        assert passages[-1] == PASSAGES[2]
        assert passages.hit(1, 0.5) == Hit(**PASSAGES[1].model_dump(), score=0.5)
        assert passages.checksum == hashlib.sha256((tmp_path / "passages.jsonl").read_bytes()).hexdigest()
        with pytest.raises(IndexError):
            passages[3]


def test_texts_are_title_and_text(tmp_path: Path) -> None:
    passages = Passages.write(PASSAGES, tmp_path)
    texts = ["Bel A city.", 'A "q"\n Zürich\u2028stone \U0001f600', " "]
    assert list(passages.texts()) == texts
    assert list(passages.texts(1, 2)) == texts[1:2]
    assert list(passages.texts(2, 2)) == []


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    corpus = [Passage(id=str(i), title="Bel", text="stone") for i in range(1500)]
    Passages.write(corpus, tmp_path, lambda done, total, figure="": told.append((done, total, figure)))
    assert told == [(1000, 1500, "1,000 passages"), (1500, 1500, "1,500 passages")]


def test_an_empty_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the corpus is empty"):
        Passages.write([], tmp_path)


def cut_lines(directory: Path) -> None:
    lines = directory / "passages.jsonl"
    lines.write_bytes(lines.read_bytes()[:-1])


def short_offsets(directory: Path) -> None:
    np.save(directory / "offsets.npy", np.load(directory / "offsets.npy")[:-1])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda directory: (directory / "passages.json").unlink(), "passages.json is missing"),
        (lambda directory: (directory / "passages.json").write_text("{"), "unreadable passages"),
        (cut_lines, "passages.jsonl differs in length from the manifest"),
        (short_offsets, "passages.jsonl differs in length from the manifest"),
        (lambda directory: (directory / "offsets.npy").write_bytes(b"x"), "unreadable passages"),
    ],
)
def test_damage_is_one_line(tmp_path: Path, damage, says: str) -> None:
    Passages.write(PASSAGES, tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError, match=says) as caught:
        Passages.open(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_damaged_line_never_becomes_a_hit(tmp_path: Path) -> None:
    passages = Passages.write(PASSAGES, tmp_path)
    lines = tmp_path / "passages.jsonl"
    with lines.open("r+b") as file:
        file.write(b"x")
    with pytest.raises(RetrievalError, match=r"passages.jsonl:1: damaged"):
        passages.hit(0, 1.0)


def test_half_written_passages_are_not_complete(tmp_path: Path) -> None:
    def broken():
        yield PASSAGES[0]
        raise KeyboardInterrupt

    Passages.write(PASSAGES, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        Passages.write(broken(), tmp_path)
    with pytest.raises(DataError, match="missing"):
        Passages.open(tmp_path)
