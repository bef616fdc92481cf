from pathlib import Path

import pytest

from search_e1.errors import ConfigError
from search_e1.retrieval.base import Hit, Retriever
from search_e1.retrieval.bm25 import Bm25Index
from search_e1.retrieval.dense import DenseIndex
from search_e1.retrieval.encoder import Encoder
from search_e1.retrieval.hybrid import HybridIndex, fuse
from search_e1.types import Passage
from tiny_encoder import make_tiny_encoder

CORPUS = [Passage(id=f"p{i}", title=f"Bel {i}", text=text) for i, text in enumerate(["stone", "river", "old stone"])]


def ranking(ids: str) -> list[Hit]:
    return [Hit(id=id, title="", text=id, score=100.0 - i) for i, id in enumerate(ids)]


def test_fusion_by_hand() -> None:
    fused = fuse([ranking("abc"), ranking("cad")], 10)
    assert [hit.id for hit in fused] == ["a", "c", "b", "d"]
    expected = [1 / 61 + 1 / 62, 1 / 63 + 1 / 61, 1 / 62, 1 / 63]
    assert [hit.score for hit in fused] == pytest.approx(expected, rel=1e-15)
    assert fuse([ranking("abc"), ranking("cad")], 2) == fused[:2]
    assert [hit.score for hit in fuse([ranking("a"), ranking("a")], 1, k=0)] == [2.0]


def test_equal_scores_follow_the_first_ranking() -> None:
    assert [hit.id for hit in fuse([ranking("ab"), ranking("ba")], 2)] == ["a", "b"]
    assert [hit.id for hit in fuse([ranking("ba"), ranking("ab")], 2)] == ["b", "a"]
    assert [hit.id for hit in fuse([ranking("ab"), ranking("cd")], 4)] == ["a", "c", "b", "d"]
    assert fuse([ranking("ab"), []], 1)[0].id == "a"
    assert fuse([[], []], 3) == []


@pytest.fixture
def indexes(tmp_path: Path) -> tuple[Bm25Index, DenseIndex]:
    encoder = Encoder.open(make_tiny_encoder(tmp_path / "e"), dtype="float32")
    return Bm25Index.build(CORPUS, tmp_path / "bm25"), DenseIndex.build(CORPUS, tmp_path / "dense", encoder)


def test_it_fuses_what_its_indexes_find(indexes: tuple[Bm25Index, DenseIndex]) -> None:
    hybrid = HybridIndex(indexes)
    queries = ["stone", "nothing of it", "stone"]
    found = hybrid.search(queries, 2)
    rankings = [index.search(queries, 100) for index in indexes]
    assert found == [fuse(pair, 2) for pair in zip(*rankings, strict=True)]
    assert found[1] == [hit.model_copy(update={"score": 1 / (60 + i)}) for i, hit in enumerate(rankings[1][1][:2], 1)]
    assert hybrid.search([], 3) == []
    assert isinstance(hybrid, Retriever)
    assert len(hybrid) == 3
    assert len(HybridIndex(indexes, depth=1).search(["stone"], 3)[0]) == 3


def test_its_checksum_is_of_both_and_the_settings(indexes: tuple[Bm25Index, DenseIndex]) -> None:
    checksum = HybridIndex(indexes).checksum
    assert HybridIndex(indexes).checksum == checksum
    others = (HybridIndex(indexes[::-1]), HybridIndex(indexes, depth=50), HybridIndex(indexes, k=10))
    assert len({checksum, *(other.checksum for other in others), *(index.checksum for index in indexes)}) == 6


def test_what_cannot_be_fused_is_refused(tmp_path: Path, indexes: tuple[Bm25Index, DenseIndex]) -> None:
    other = Bm25Index.build(CORPUS[:2], tmp_path / "other")
    with pytest.raises(
        ConfigError, match=r"different corpora .*\(3 passages, .* and 2 passages, .*build them from the same corpus"
    ):
        HybridIndex([indexes[1], other])
    for same in ([indexes[0]], [indexes[0], Bm25Index.open(tmp_path / "bm25")]):
        with pytest.raises(ConfigError, match="two different indexes"):
            HybridIndex(same)
