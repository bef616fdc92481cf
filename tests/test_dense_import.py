import random
from functools import cache
from pathlib import Path

import faiss
import numpy as np
import pytest

from search_e1.errors import ConfigError, DataError, SearchE1Error
from search_e1.retrieval.dense import DenseIndex
from search_e1.retrieval.encoder import Encoder
from search_e1.retrieval.indexes import open_index
from search_e1.types import Passage
from test_dense import WORDS
from tiny_encoder import make_tiny_encoder

QUERIES = ["the capital of the river", "running mayor", "", "old bridges"]


def passages(n: int = 700) -> list[Passage]:
    """Passages that differ in the few characters that the encoder reads."""
    rng = random.Random(0)
    return [Passage(id=f"p{i}", title="", text=f"{i * 7919} {rng.choice(WORDS)} {rng.choice(WORDS)}") for i in range(n)]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return Encoder.open(make_tiny_encoder(tmp_path_factory.mktemp("models") / "e"), dtype="float32")


@cache
def vectors(encoder: Encoder, texts: tuple[str, ...]) -> np.ndarray:
    return encoder.passages(list(texts))


def made(path: Path, encoder: Encoder, corpus: list[Passage], factory: str, metric: int = faiss.METRIC_INNER_PRODUCT) -> Path:
    """An index as Search-R1's script makes one: position n is line n."""
    index = faiss.index_factory(encoder.dimension, factory, metric)
    rows = vectors(encoder, tuple(p.contents for p in corpus))
    index.train(rows)
    index.add_with_ids(rows, np.arange(len(corpus))) if factory.startswith("IDMap") else index.add(rows)
    faiss.write_index(index, str(path))
    return path


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "HNSW16,Flat", "PQ16x4", "PQ16x4fs", "PCA8,IVF4,SQ8", "SQfp16"])
def test_an_index_of_faiss_is_searched_as_faiss_does(tmp_path: Path, encoder: Encoder, factory: str) -> None:
    corpus = passages()
    file = made(tmp_path / "e5.index", encoder, corpus, factory)
    before = file.read_bytes()
    taken = DenseIndex.take_over(corpus, tmp_path / "index", encoder, file=file)
    assert file.read_bytes() == before
    assert (tmp_path / "index" / "index.faiss").stat().st_ino == file.stat().st_ino  # no second copy
    scores, rows = faiss.read_index(str(file)).search(encoder.queries(QUERIES), 5)
    for index in (taken, open_index(tmp_path / "index")):
        found = index.search(QUERIES, 5)
        assert [[hit.id for hit in hits] for hits in found] == [[corpus[i].id for i in row] for row in rows]
        for hits, expected in zip(found, scores, strict=True):
            assert [hit.score for hit in hits] == pytest.approx(expected.tolist(), abs=1e-6)


def test_parameters_of_an_index_that_is_taken_over(tmp_path: Path, encoder: Encoder) -> None:
    corpus = passages()
    file = made(tmp_path / "ivf.index", encoder, corpus, "IVF8,Flat")
    taken = DenseIndex.take_over(corpus, tmp_path / "index", encoder, file=file, parameters="nprobe=8")
    exact = DenseIndex.build(corpus, tmp_path / "exact", encoder)
    assert [[h.score for h in hits] for hits in taken.search(QUERIES, 3)] == [
        pytest.approx([h.score for h in hits], abs=1e-6) for hits in exact.search(QUERIES, 3)
    ]
    with pytest.raises(ConfigError, match="parameters 'nonsense=1' of "):
        DenseIndex.take_over(corpus, tmp_path / "other", encoder, file=file, parameters="nonsense=1")


def refusal(tmp_path: Path, encoder: Encoder, corpus: list[Passage], file: Path) -> str:
    with pytest.raises(SearchE1Error) as caught:
        DenseIndex.take_over(corpus, tmp_path / "index", encoder, file=file)
    message = str(caught.value)
    assert "\n" not in message
    assert not (tmp_path / "index").exists()
    assert not list(tmp_path.glob(".index.unfinished"))
    return message


def test_an_index_that_does_not_belong_is_refused(tmp_path: Path, encoder: Encoder) -> None:
    corpus = passages()
    file = made(tmp_path / "flat.index", encoder, corpus, "Flat")
    assert refusal(tmp_path, encoder, corpus[:-1], file).startswith(f"{file}: holds 700 vectors, but the corpus 699 passages; ")
    assert "passages by their own text" in refusal(tmp_path, encoder, corpus[350:] + corpus[:350], file)
    other = Encoder.open(make_tiny_encoder(tmp_path / "wide", dimension=32), dtype="float32")
    assert refusal(tmp_path, other, corpus, file).startswith(
        f"{file}: vectors of 16 dimensions, but encoder {other.name} gives 32;"
    )
    stranger = Encoder.open(make_tiny_encoder(tmp_path / "stranger", seed=1), dtype="float32")
    assert "give the encoder and prefixes it was built with" in refusal(tmp_path, stranger, corpus, file)


def test_kinds_that_are_not_read_are_refused(tmp_path: Path, encoder: Encoder) -> None:
    corpus = passages()
    distance = made(tmp_path / "l2.index", encoder, corpus, "Flat", faiss.METRIC_L2)
    assert refusal(tmp_path, encoder, corpus, distance).startswith(f"{distance}: IndexFlatL2 ranks by distance, not by inner")
    mapped = made(tmp_path / "map.index", encoder, corpus, "IDMap,Flat")
    assert refusal(tmp_path, encoder, corpus, mapped).startswith(f"{mapped}: IndexIDMap numbers its vectors itself; take one")
    broken = tmp_path / "broken.index"
    broken.write_bytes(b"no index at all")
    assert refusal(tmp_path, encoder, corpus, broken).startswith(
        f"{broken}: not an index that FAISS {faiss.__version__} reads ("
    )
    with pytest.raises(DataError, match=r"none.index: no such file; give the file of a FAISS index"):
        DenseIndex.take_over(corpus, tmp_path / "index", encoder, file=tmp_path / "none.index")
