import hashlib
import os
import random
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bm25s
import numpy as np
import pytest
import Stemmer
from bm25s.tokenization import Tokenizer

from forking import end, fork
from search_e1.errors import DataError
from search_e1.retrieval import bm25, bm25_build, directory
from search_e1.retrieval.base import Hit, Retriever
from search_e1.retrieval.bm25 import Bm25Index
from search_e1.retrieval.passages import Passages
from search_e1.runs.progress import silent
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
        Passage(id=f"p{i}", title=" ".join(rng.choices(WORDS, k=2)), text=" ".join(rng.choices(WORDS, k=rng.randint(3, 30))))
        for i in range(n)
    ]


def files_of(made: Path) -> dict[str, bytes]:
    files = (f for f in made.rglob("*") if f.is_file() and not f.name.startswith("manifest"))
    return {str(f.relative_to(made)): f.read_bytes() for f in files}


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


def test_an_accent_is_found_however_it_is_encoded(tmp_path: Path) -> None:
    corpus = [Passage(id="nfc", title="K\u00f6ln", text="Rhein"), Passage(id="nfd", title="Mu\u0308nchen", text="Isar")]
    index = Bm25Index.build(corpus, tmp_path / "index")
    found = index.search(["Ko\u0308ln", "K\u00f6ln", "M\u00fcnchen", "Mu\u0308nchen"], 1)
    assert [hit.id for hits in found for hit in hits] == ["nfc", "nfc", "nfd", "nfd"]


def test_ties_keep_the_order_of_the_corpus(tmp_path: Path) -> None:
    corpus = [Passage(id=str(i), title="Bel", text="stone") for i in range(50)]
    index = Bm25Index.build(corpus, tmp_path / "index")
    assert [p.id for p in index.search(["stone"], 3)[0]] == ["0", "1", "2"]


def test_the_same_query_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = Bm25Index.build(passages(20), tmp_path / "index")
    asked: list[str] = []
    search = index._search
    monkeypatch.setattr(index, "_search", lambda queries, topk: asked.extend(queries) or search(queries, topk))
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
    Bm25Index.build(passages(), tmp_path / "a")
    Bm25Index.build(passages(), tmp_path / "b")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_the_manifest_tells_what_was_indexed(tmp_path: Path) -> None:
    index = Bm25Index.build(passages(20), tmp_path / "index")
    manifest = directory.read(tmp_path / "index", "bm25")
    stored = (tmp_path / "index" / "passages.jsonl").read_bytes()
    assert manifest.corpus == hashlib.sha256(stored).hexdigest()
    assert (manifest.kind, manifest.passages) == ("bm25", 20)
    assert manifest.settings == {"k1": 0.9, "b": 0.4, "language": "en", "stopwords": "english", "stemmer": "english"}
    assert {"python", "search-e1", "bm25s", "PyStemmer"} <= set(manifest.versions)
    assert index.checksum == manifest.checksum
    other = Bm25Index.build(passages(20, seed=1), tmp_path / "other")
    assert other.checksum != index.checksum


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    corpus = [Passage(id=str(i), title="Bel", text="stone") for i in range(1500)]
    Bm25Index.build(corpus, tmp_path / "a", lambda done, total, figure="": told.append((done, total, figure)))
    assert told == [
        (1000, 1500, "1,000 passages"), (1500, 1500, "1,500 passages"),
        (1500, 1500, "2 words"), (1500, 1500, "3,000 postings"), (1, 1, "sorted"),
    ]  # fmt: skip


def test_it_goes_on_after_a_kill_and_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bm25_build, "CHUNK_BYTES", 4000)
    monkeypatch.setattr(bm25_build, "_SYNC_EVERY", 2)
    corpus = passages(300)

    def killed_at(word: str) -> None:
        def progress(done: int, total: int, figure: str = "") -> None:
            if word in figure and done >= 150:
                os.kill(os.getpid(), signal.SIGKILL)

        process = fork(lambda: Bm25Index.build(corpus, tmp_path / "index", progress, source="c"))
        assert end([process]) == [-signal.SIGKILL]
        assert not (tmp_path / "index").exists()

    counted: list[tuple[int, int]] = []
    count = bm25_build.count
    monkeypatch.setattr(bm25_build, "count", lambda at, start, stop, _: counted.append((start, stop)) or count(at, start, stop))
    killed_at("passages")
    killed_at("words")
    killed_at("postings")
    index = Bm25Index.build([], tmp_path / "index", source="c")
    assert counted == []  # all of it was done by those that were killed
    Bm25Index.build(corpus, tmp_path / "undisturbed")
    assert files_of(tmp_path / "index") == files_of(tmp_path / "undisturbed")
    assert {path.name for path in tmp_path.iterdir()} == {"index", "undisturbed"}
    assert index.search(["river"], 3) == Bm25Index.open(tmp_path / "undisturbed").search(["river"], 3)


def test_a_kill_costs_the_last_chunks_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bm25_build, "CHUNK_BYTES", 4000)
    monkeypatch.setattr(bm25_build, "_SYNC_EVERY", 2)
    stored = Passages.write(passages(300), tmp_path)
    (tmp_path / "scratch").mkdir()
    (tmp_path / "bm25").mkdir()
    done: list[int] = []

    def progress(at: int, total: int, figure: str = "") -> None:
        done.append(at)
        if len(done) == 5:  # the fourth chunk was the last to be made durable
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bm25_build.build(stored, tmp_path / "bm25", tmp_path / "scratch", progress)
    again: list[tuple[int, str]] = []
    bm25_build.build(
        stored,
        tmp_path / "bm25",
        tmp_path / "scratch",
        lambda at, total, figure="": again.append((at, figure)),
    )
    assert again[0][0] == done[4]
    Bm25Index.build(passages(300), tmp_path / "undisturbed")
    assert files_of(tmp_path / "bm25") == files_of(tmp_path / "undisturbed" / "bm25")


@pytest.mark.parametrize(("most", "chunk", "processes"), [(2**24, 2**23, 1), (50, 1000, 1), (1, 1, 1), (500, 8000, 2)])
def test_the_files_are_bm25s_own_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int, chunk: int, processes: int
) -> None:
    """In blocks and chunks of any size, by several processes, with empty passages, stop words, repetitions, ï, ß, 漢字."""
    monkeypatch.setattr(bm25_build, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(bm25_build, "POSTINGS", 8 * most)
    corpus = [
        *passages(200),
        Passage(id="e", title="", text=""),
        Passage(id="s", title="The", text="of A naïve Straße 漢字 x"),
    ]
    (tmp_path / "bm25").mkdir()
    (tmp_path / "scratch").mkdir()
    bm25_build.build(
        Passages.write(corpus, tmp_path), tmp_path / "bm25", tmp_path / "scratch", silent,
        processes=processes, postings=most,
    )  # fmt: skip
    tokenizer = Tokenizer(stopwords="english", stemmer=Stemmer.Stemmer("english"))
    ids = list(tokenizer.streaming_tokenize([f"{p.title} {p.text}" for p in corpus], allow_empty=False))
    direct = bm25s.BM25(k1=0.9, b=0.4)
    direct.index((ids, tokenizer.get_vocab_dict()), show_progress=False)
    direct.save(tmp_path / "direct", show_progress=False)
    expected = files_of(tmp_path / "direct")
    assert len(expected) == 5
    assert {name: found for name, found in files_of(tmp_path / "bm25").items() if name in expected} == expected


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("lookup", [0, 16, 10**6])
def test_scores_are_bm25s_own_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, lookup: int) -> None:
    """Whatever is looked up or added up, rare and common words, repeated words, ties, more asked for than there is."""
    monkeypatch.setattr(bm25, "_LOOKUP", lookup)
    rng = np.random.default_rng(seed)
    words = np.array([f"w{i}" for i in range(60)])
    chances = 1 / np.arange(1, 61) ** 1.5
    draw = lambda n: " ".join(rng.choice(words, n, p=chances / chances.sum()))  # noqa: E731
    corpus = [Passage(id=str(i), title="", text=draw(rng.integers(1, 12))) for i in range(400)]
    index = Bm25Index.build(corpus, tmp_path / "index")
    direct = bm25s.BM25.load(tmp_path / "index" / "bm25")
    queries = [draw(rng.integers(1, 8)) for _ in range(60)]
    every = [direct.get_scores(query.split()) for query in queries]
    for k in (1, 3, 50, 1000):
        for scores, found in zip(every, index.search(queries, k), strict=True):
            best = [i for i in np.argsort(-scores, kind="stable")[:k] if scores[i] > 0]
            assert [int(hit.id) for hit in found] == best
            assert np.array_equal(np.float32([hit.score for hit in found]), scores[best])
    assert not index._postings._sums().any()


def test_threads_search_at_the_same_time(tmp_path: Path) -> None:
    index = Bm25Index.build(passages(), tmp_path / "index")
    queries = [" ".join(random.Random(i).sample(WORDS, 3)) for i in range(40)]
    expected = index.search(queries, 5)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda query: index.search([query], 5)[0], queries * 5))
    assert found == expected * 5


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
