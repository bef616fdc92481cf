import hashlib
import itertools
import json
import os
import random
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from forking import end, fork
from search_e1.errors import ConfigError, DataError, ModelError, RunError
from search_e1.retrieval import dense
from search_e1.retrieval.convention import EncoderSettings, Overrides
from search_e1.retrieval.dense import DenseIndex, layout
from search_e1.retrieval.directory import read
from search_e1.retrieval.encoder import Encoder
from search_e1.retrieval.indexes import open_index
from search_e1.types import Passage
from tiny_encoder import make_tiny_encoder

WORDS = ["river", "city", "mayor", "capital", "film", "director", "bridge", "old", "new", "stone", "land", "tower"]
QUERIES = ["the capital of the river", "running mayor", "", "old bridges", "the capital of the river"]


def passages(n: int = 300, seed: int = 0) -> list[Passage]:
    rng = random.Random(seed)
    return [
        Passage(id=f"p{i}", title=rng.choice(WORDS), text=" ".join(rng.choices(WORDS, k=rng.randint(1, 6)))) for i in range(n)
    ]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return Encoder.open(make_tiny_encoder(tmp_path_factory.mktemp("models") / "e"), dtype="float32")


@cache
def vectors(encoder: Encoder) -> np.ndarray:
    """[300, dimension]: of ``passages()``."""
    return encoder.passages([p.contents for p in passages()])


def by_numpy(encoder: Encoder, query: str) -> np.ndarray:
    """The score of each of ``passages()``."""
    return vectors(encoder) @ encoder.queries([query])[0]


def test_exact_search_is_numpy_s(tmp_path: Path, encoder: Encoder) -> None:
    corpus = passages()
    index = DenseIndex.build(corpus, tmp_path / "index", encoder)
    found = index.search(QUERIES, 5)
    assert len(index) == 300
    for query, hits in zip(QUERIES, found, strict=True):
        scores = by_numpy(encoder, query)
        np.testing.assert_allclose([hit.score for hit in hits], np.sort(scores)[::-1][:5], atol=1e-6)
        np.testing.assert_allclose([hit.score for hit in hits], [scores[int(hit.id[1:])] for hit in hits], atol=1e-6)
        assert all(hit.contents == corpus[int(hit.id[1:])].contents for hit in hits)
    assert found[0] == found[4]
    assert index.search([], 3) == []
    assert [len(hits) for hits in index.search(["x"], 1000)] == [300]


@pytest.mark.parametrize(
    ("index", "parameters"),
    [
        ("graph", None),
        ("compressed", "k_factor_rf=100"),
        ("IVF4,SQ8,Refine(SQfp16)", "nprobe=4,k_factor_rf=100"),
        ("IVF4,Flat,RFlat", "nprobe=4"),
        ("SQfp16", None),
        ("HNSW8,SQfp16", "efSearch=300"),
    ],
)
def test_other_indexes_that_look_everywhere_find_the_same(
    tmp_path: Path, encoder: Encoder, index: str, parameters: str | None
) -> None:
    corpus = passages()
    built = DenseIndex.build(corpus, tmp_path / "index", encoder, index=index, parameters=parameters)
    tolerance = 1e-6 if "Flat" in index else 2e-3  # half precision
    for found in (built.search(QUERIES, 3), DenseIndex.open(tmp_path / "index").search(QUERIES, 3)):
        for query, hits in zip(QUERIES, found, strict=True):
            scores = np.sort(by_numpy(encoder, query))[::-1]
            np.testing.assert_allclose([hit.score for hit in hits], scores[:3], atol=tolerance)
    kept = {"HNSW8,SQfp16": {"index.faiss"}, "SQfp16": {"vectors.faiss"}}.get(index, {"index.faiss", "vectors.faiss"})
    assert {file.name for file in (tmp_path / "index").glob("*.faiss")} == kept


def test_presets_by_hand() -> None:
    assert layout("exact", 100, 384) == ("Flat", None, "Flat", "")
    graph = layout("graph", 10**6, 384)
    assert graph == ("HNSW32,SQ8,Refine(SQfp16)", "HNSW32,SQ8", "SQfp16", "efSearch=128,k_factor_rf=10")
    assert layout("compressed", 10**6, 384)[1:] == ("PQ192x4fs", "SQfp16", "k_factor_rf=10")
    assert layout("compressed", 21 * 10**6, 768).base == "PQ384x4fs"
    lists = layout("IVF4096,PQ192x4fs,Refine(SQfp16)", 10**6, 384)
    assert lists[1:] == ("IVF4096,PQ192x4fs", "SQfp16", "nprobe=512,k_factor_rf=10")
    assert layout("compressed", 5000, 384)[1:] == ("PQ192x4fs", "SQfp16", "k_factor_rf=10")
    assert layout("compressed", 500, 384).base == layout("compressed", 10**6, 33).base == "SQ8"


def test_factory_strings_by_hand() -> None:
    assert layout("IVF64,Flat", 10**6, 384, "nprobe=3") == ("IVF64,Flat", "IVF64,Flat", None, "nprobe=3")
    assert layout("PCA64,IVF64,PQ16,RFlat", 10**6, 384)[1:] == ("PCA64,IVF64,PQ16", "Flat", "nprobe=8,k_factor_rf=10")
    assert layout("IVF4,SQ8,Refine(Flat)", 10**6, 384)[2:] == ("Flat", "nprobe=1,k_factor_rf=10")
    assert layout("SQ8", 10**6, 384) == ("SQ8", "SQ8", None, "")


@pytest.mark.parametrize(
    ("index", "parameters"),
    [("nonsense", None), ("", None), ("exact", "nprobe=3"), ("graph", "efSearch"), ("graph", "ef=1"), ("PQ7", None)],
)
def test_what_faiss_does_not_know_is_refused_before_any_work(
    tmp_path: Path, encoder: Encoder, index: str, parameters: str | None
) -> None:
    with pytest.raises(ConfigError, match="give exact, graph, compressed or a FAISS factory string"):
        DenseIndex.build(passages(5), tmp_path / "index", encoder, index=index, parameters=parameters)
    assert list(tmp_path.iterdir()) == []


def test_too_few_passages_for_an_index_keep_the_vectors(tmp_path: Path, encoder: Encoder) -> None:
    corpus = passages(10)
    with pytest.raises(ConfigError, match=r"of 10 passages: .* as large as number of clusters"):
        DenseIndex.build(corpus, tmp_path / "index", encoder, index="IVF64,Flat,Refine(SQfp16)", source="s")
    seen: list[int] = []
    DenseIndex.build(
        iter(()), tmp_path / "index", encoder, lambda done, total, figure="": seen.append(done), source="s",
        index="IVF2,Flat,Refine(SQfp16)",
    )  # fmt: skip
    assert seen == [0, 10]  # trained, indexed; neither read nor encoded again
    assert len(DenseIndex.open(tmp_path / "index")) == 10


def test_a_build_that_was_killed_goes_on_to_the_same_bytes(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "CHUNK", 100)
    encode = Encoder.passages

    def dies(self: Encoder, texts: list[str]) -> np.ndarray:
        with (tmp_path / "encoded").open("a") as file:
            file.write(f"{len(texts)}\n")
        if texts[0] == passages()[200].contents:
            with (tmp_path / ".index.unfinished" / "vectors.faiss").open("ab") as file:
                file.write(b"half a row")
            os._exit(9)
        return encode(self, texts)

    def build() -> None:
        Encoder.passages = dies  # type: ignore[method-assign]  # in this copy alone
        DenseIndex.build(passages(), tmp_path / "index", encoder, source="corpus", index="graph")

    assert end([fork(build)]) == [9]
    assert (tmp_path / "encoded").read_text().split() == ["100", "100", "100"]
    with pytest.raises(DataError, match="not finished; run its `search-e1 index build` again"):
        DenseIndex.open(tmp_path / "index")
    encoded: list[int] = []
    monkeypatch.setattr(Encoder, "passages", lambda self, texts: encoded.append(len(texts)) or encode(self, texts))
    DenseIndex.build(passages(), tmp_path / "index", encoder, source="corpus", index="graph")
    assert encoded == [100]
    DenseIndex.build(passages(), tmp_path / "whole", encoder, source="corpus", index="graph")

    def digests(directory: Path) -> dict[str, str]:
        files = (file for file in directory.iterdir() if not file.name.startswith("manifest"))
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}

    assert digests(tmp_path / "index") == digests(tmp_path / "whole")
    assert read(tmp_path / "index").checksum == read(tmp_path / "whole").checksum


def test_another_encoder_is_refused(tmp_path: Path, encoder: Encoder) -> None:
    DenseIndex.build(passages(20), tmp_path / "index", encoder)
    other = make_tiny_encoder(tmp_path / "other", seed=1)
    with pytest.raises(DataError, match=r"made by .*, not by this encoder \(.*other"):
        DenseIndex.open(tmp_path / "index", EncoderSettings(model=str(other)))
    with pytest.raises(DataError, match="not by this encoder"):
        DenseIndex.open(tmp_path / "index", Encoder.open(encoder.name, Overrides(query_prefix="q: ")))
    moved = make_tiny_encoder(tmp_path / "moved")
    index = DenseIndex.open(tmp_path / "index", EncoderSettings(model=str(moved)))
    assert index.encoder.name == str(moved)
    assert index.search(["mayor"], 3) == DenseIndex.open(tmp_path / "index", encoder).search(["mayor"], 3)


def test_an_encoder_that_is_gone_can_be_named(tmp_path: Path) -> None:
    directory = make_tiny_encoder(tmp_path / "e")
    DenseIndex.build(passages(20), tmp_path / "index", Encoder.open(directory))
    directory.rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match=r"no such directory.* or give its current directory with --encoder"):
        open_index(tmp_path / "index")
    named = EncoderSettings(model=str(tmp_path / "elsewhere"))
    assert len(DenseIndex.open(tmp_path / "index", named)) == 20


def test_an_encoder_s_overrides_are_kept(tmp_path: Path, encoder: Encoder) -> None:
    told = Encoder.open(encoder.name, Overrides(query_prefix="", passage_prefix="doc: ", pooling="cls"))
    DenseIndex.build(passages(20), tmp_path / "index", told)
    assert DenseIndex.open(tmp_path / "index").encoder.convention == told.convention


def test_the_checksum_is_of_all_that_answers_depend_on(tmp_path: Path, encoder: Encoder) -> None:
    def checksum(name: str, corpus: list[Passage], encoder: Encoder = encoder, **settings: str) -> str:
        return DenseIndex.build(corpus, tmp_path / name, encoder, **settings).checksum

    elsewhere = Encoder.open(make_tiny_encoder(tmp_path / "copy"), dtype="float32")
    assert checksum("a", passages(20)) == checksum("b", passages(20)) == checksum("c", passages(20), elsewhere)
    other = Encoder.open(make_tiny_encoder(tmp_path / "seed-1", seed=1), dtype="float32")
    found = [
        checksum("a2", passages(20)[::-1]),
        checksum("a3", passages(20), other),
        checksum("a4", passages(20), index="graph"),
        checksum("a5", passages(20), index="graph", parameters="efSearch=64,k_factor_rf=10"),
        DenseIndex.open(tmp_path / "a4", encoder, parameters="efSearch=16").checksum,
    ]
    assert all(a != b for a, b in itertools.combinations([*found, read(tmp_path / "a").checksum], 2))
    assert DenseIndex.open(tmp_path / "a4", encoder).checksum == found[2]


def test_parameters_for_searching(tmp_path: Path, encoder: Encoder) -> None:
    DenseIndex.build(passages(), tmp_path / "index", encoder, index="IVF16,Flat", parameters="nprobe=1")
    few, all_of_them = (
        DenseIndex.open(tmp_path / "index", encoder, parameters=parameters).search(["stone"], 300)
        for parameters in (None, "nprobe=16")
    )
    assert len(few[0]) < 300 == len(all_of_them[0])
    with pytest.raises(ConfigError, match="parameters 'efSearch=3'"):
        DenseIndex.open(tmp_path / "index", encoder, parameters="efSearch=3")


def test_what_is_damaged_is_refused(tmp_path: Path, encoder: Encoder) -> None:
    directory = tmp_path / "index"
    DenseIndex.build(passages(20), directory, encoder)
    with pytest.raises(RunError, match="already exists"):
        DenseIndex.build(passages(20), directory, encoder)
    stored = (directory / "vectors.faiss").read_bytes()
    (directory / "vectors.faiss").write_bytes(b"\0" * len(stored))
    with pytest.raises(DataError, match="a damaged index"):
        DenseIndex.open(directory, encoder)
    (directory / "vectors.faiss").write_bytes(stored[:-1])
    with pytest.raises(DataError, match=r"a damaged index \(vectors\.faiss is"):
        DenseIndex.open(directory, encoder)
    (directory / "vectors.faiss").write_bytes(stored)
    about = json.loads((directory / "encoder.json").read_text())
    (directory / "encoder.json").write_text(json.dumps(about)[::-1][: (directory / "encoder.json").stat().st_size].ljust(
        (directory / "encoder.json").stat().st_size
    ))  # fmt: skip
    with pytest.raises(DataError, match=r"encoder\.json: damaged"):
        DenseIndex.open(directory)


def test_an_empty_corpus_leaves_nothing(tmp_path: Path, encoder: Encoder) -> None:
    with pytest.raises(DataError, match="the corpus is empty"):
        DenseIndex.build([], tmp_path / "index", encoder, source="s")
    assert list(tmp_path.iterdir()) == []


def test_progress_is_told(tmp_path: Path, encoder: Encoder) -> None:
    told: list[tuple[int, int, str]] = []
    DenseIndex.build(
        passages(20), tmp_path / "index", encoder, lambda done, total, figure="": told.append((done, total, figure)),
        index="IVF2,Flat",
    )  # fmt: skip
    assert told == [
        (20, 20, "20 passages"), (20, 20, "20 encoded"), (0, 20, "training on 20"), (20, 20, "20 indexed"),
    ]  # fmt: skip
