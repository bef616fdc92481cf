import hashlib
import random
from pathlib import Path

import bm25s
import numpy as np
import pytest
import Stemmer

from search_e1.errors import DataError
from search_e1.retrieval import directory
from search_e1.retrieval.base import Hit, Retriever
from search_e1.retrieval.bm25 import Bm25Index
from search_e1.types import Passage

WORDS = [
    "river",
    "city",
    "mayor",
    "capital",
    "film",
    "director",
    "running",
    "runs",
    "ran",
    "bridges",
    "bridge",
    "old",
    "new",
]


def passages(n: int = 300, seed: int = 0) -> list[Passage]:
    rng = random.Random(seed)
    return [
        Passage(
            id=f"p{i}", title=" ".join(rng.choices(WORDS, k=2)), text=" ".join(rng.choices(WORDS, k=rng.randint(3, 30)))
        )
        for i in range(n)
    ]


def passages_of(hits: list[Hit]) -> list[Passage]:
    return [Passage(**hit.model_dump(exclude={"score"})) for hit in hits]


def test_it_ranks_as_bm25s_does(tmp_path: Path) -> None:
    corpus, stemmer = passages(), Stemmer.Stemmer("english")
    index = Bm25Index.build(corpus, tmp_path / "index")
    direct = bm25s.BM25(k1=0.9, b=0.4)
    texts = [f"{p.title} {p.text}" for p in corpus]
    direct.index(bm25s.tokenize(texts, stopwords="en", stemmer=stemmer, show_progress=False), show_progress=False)
    queries = ["the capital of the river", "running mayor", "director director film", "old bridges"]
    tokens = bm25s.tokenize(queries, stopwords="en", stemmer=stemmer, return_ids=False, show_progress=False)
    for query, words, found in zip(queries, tokens, index.search(queries, 10), strict=True):
        scores = direct.get_scores(words)
        assert len(found) == 10, query
        np.testing.assert_allclose([scores[int(p.id[1:])] for p in found], np.sort(scores)[::-1][:10], rtol=1e-5)
        assert passages_of(found) == [corpus[int(p.id[1:])] for p in found]
        np.testing.assert_allclose([p.score for p in found], np.sort(scores)[::-1][:10], rtol=1e-5)


def test_a_hand_computed_order(tmp_path: Path) -> None:
    corpus = [
        Passage(id="long", title="Bel", text="mayor " + "stone " * 40),
        Passage(id="twice", title="Bel", text="mayor mayor"),
        Passage(id="title", title="Mayor", text="Bel"),
        Passage(id="none", title="Fen", text="river"),
    ]
    index = Bm25Index.build(corpus, tmp_path / "index")
    assert [p.id for p in index.search(["Mayors"], 10)[0]] == ["twice", "title", "long"]
    assert isinstance(index, Retriever)
    assert len(index) == 4


def test_what_shares_no_word_is_never_found(tmp_path: Path) -> None:
    corpus = [*passages(20), Passage(id="empty", title="", text=""), Passage(id="stops", title="The", text="of and")]
    index = Bm25Index.build(corpus, tmp_path / "index")
    assert index.search(["the of and", "", "zzz qqq", "?!"], 5) == [[], [], [], []]
    assert index.search([], 5) == []
    assert {p.id for p in index.search(["the river"], 100)[0]} == {p.id for p in corpus if "river" in p.contents}


def test_ties_keep_the_order_of_the_corpus(tmp_path: Path) -> None:
    corpus = [Passage(id=str(i), title="Bel", text="stone") for i in range(50)]
    index = Bm25Index.build(corpus, tmp_path / "index")
    assert [p.id for p in index.search(["stone"], 3)[0]] == ["0", "1", "2"]


def test_the_same_query_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = Bm25Index.build(passages(20), tmp_path / "index")
    asked: list[str] = []
    search = index._search
    monkeypatch.setattr(index, "_search", lambda query, topk: asked.append(query) or search(query, topk))
    a, b, c = index.search(["river", "mayor", "river"], 3)
    assert asked == ["river", "mayor"]
    assert a == c != b
    assert a is not c


def test_an_opened_index_needs_nothing_but_its_directory(tmp_path: Path) -> None:
    corpus = [*passages(50), Passage(id="ü", title='A "q"\n', text="Zürich\u2028stone \U0001f600")]
    built = Bm25Index.build(iter(corpus), tmp_path / "made")
    queries = ["river city", "zürich"]
    expected = built.search(queries, 4)
    assert passages_of(expected[1]) == [corpus[-1]]
    (tmp_path / "made").rename(tmp_path / "moved")
    assert Bm25Index.open(tmp_path / "moved").search(queries, 4) == expected


def test_building_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    def digests(made: Path) -> dict[str, str]:
        Bm25Index.build(passages(), made)
        files = (f for f in made.rglob("*") if f.is_file() and f.name != "manifest.json")
        return {str(f.relative_to(made)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}

    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_the_manifest_tells_what_was_indexed(tmp_path: Path) -> None:
    index = Bm25Index.build(passages(20), tmp_path / "index")
    manifest = directory.read(tmp_path / "index", "bm25")
    stored = (tmp_path / "index" / "passages.jsonl").read_bytes()
    assert manifest.corpus == hashlib.sha256(stored).hexdigest()
    assert (manifest.kind, manifest.passages) == ("bm25", 20)
    assert manifest.settings == {"k1": 0.9, "b": 0.4, "stopwords": "english", "stemmer": "english"}
    assert {"python", "search-e1", "bm25s", "PyStemmer"} <= set(manifest.versions)
    assert index.checksum == manifest.checksum
    other = Bm25Index.build(passages(20, seed=1), tmp_path / "other")
    assert other.checksum != index.checksum


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    corpus = [Passage(id=str(i), title="Bel", text="stone") for i in range(1500)]
    Bm25Index.build(corpus, tmp_path / "a", lambda done, total, figure="": told.append((done, total, figure)))
    assert told == [(1000, 1500, "1,000 passages"), (1500, 1500, "1,500 passages")]


@pytest.mark.parametrize(
    ("corpus", "says"),
    [([], "the corpus is empty"), ([Passage(id="1", title="The", text="of a")], "not one word to search for")],
)
def test_a_corpus_with_nothing_in_it_leaves_nothing(tmp_path: Path, corpus: list[Passage], says: str) -> None:
    with pytest.raises(DataError, match=says):
        Bm25Index.build(corpus, tmp_path / "index")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_bm25_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not an index"):
        Bm25Index.open(tmp_path)
    made = tmp_path / "index"
    Bm25Index.build(passages(5), made)
    (made / "bm25" / "vocab.index.json").unlink()
    with pytest.raises(DataError, match=r"damaged index \(bm25/vocab.index.json is missing\)"):
        Bm25Index.open(made)
