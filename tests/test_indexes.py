"""Indexes of every kind from the command line and from a config."""

import json
from pathlib import Path

import pytest

from search_e1 import config as configs
from search_e1.errors import ConfigError
from search_e1.retrieval import dense as module
from search_e1.retrieval.dense import DenseIndex
from search_e1.retrieval.directory import read
from search_e1.retrieval.encoder import Encoder
from search_e1.retrieval.hybrid import HybridIndex
from search_e1.retrieval.indexes import open_indexes
from search_e1.stages.inputs import Inputs
from test_cli import project as project
from test_cli import run
from tiny_encoder import make_tiny_encoder


def test_dense_and_fused_indexes_from_the_command_line(tmp_path, monkeypatch, capsys) -> None:
    corpus = tmp_path / "c.jsonl"
    corpus.write_text("".join(json.dumps({"id": i, "contents": f'"T{i}"\nstone {i}'}) + "\n" for i in range(5)))
    encoder = make_tiny_encoder(tmp_path / "e")
    build = ["index", "build", "--corpus", corpus, "--out"]
    dense = ["--kind", "dense", "--encoder", encoder]
    for name, flags in (("bm25", []), ("dense", [*dense, "--faiss", "graph", "--query-prefix", "q: "])):
        assert run(monkeypatch, capsys, *build, tmp_path / name, *flags)[0] == 0
    assert read(tmp_path / "dense").settings["factory"] == "HNSW32,SQ8,Refine(SQfp16)"
    search = ["index", "search", "stone 3", "--topk", 2, "--index", tmp_path / "dense"]
    status, out, _ = run(monkeypatch, capsys, *search, "--parameters", "efSearch=64")
    assert (status, out.count("stone")) == (0, 2)
    status, out, _ = run(monkeypatch, capsys, *search, "--index", tmp_path / "bm25")
    expected = open_indexes([tmp_path / "dense", tmp_path / "bm25"]).search(["stone 3"], 2)[0]
    assert [line.split()[1] for line in out.splitlines()[::2]] == [hit.title for hit in expected]
    other = make_tiny_encoder(tmp_path / "other", seed=1)
    for flags, says in (
        ([*build, tmp_path / "x", "--kind", "dense"], "--kind dense and --encoder go together"),
        ([*build, tmp_path / "x", "--encoder", encoder], "--kind dense and --encoder go together"),
        ([*build, tmp_path / "x", *dense[:3], tmp_path / "none"], "no such directory"),
        (
            [*build, tmp_path / "x", *dense, "--pooling", "max"],
            "--pooling 'max': Input should be 'mean', 'cls' or 'last'",
        ),
        (
            [*build, tmp_path / "x", *dense, "--faiss", "IVF"],
            "index 'IVF', parameters '': could not parse index string IVF; give exact",
        ),
        ([*build, tmp_path / "x", *dense, "--device", "warp"], "device = 'warp': no such device"),
        ([*search, "--encoder", other], "not by this encoder"),
        ([*search, "--device", "warp"], "device = 'warp': no such device"),
        ([*search, "--parameters", "nprobe=3"], "parameters 'nprobe=3'"),
        ([*search, "--index", tmp_path / "dense"], "two different indexes"),
    ):
        status, _, error = run(monkeypatch, capsys, *flags)
        assert (status, error.count("\n")) == (2, 1), error
        assert says in error
    assert not list(tmp_path.glob("*x*"))


def load(project: Path, *flags: object) -> Inputs:
    config = configs.load(project / "config.toml", [str(flag) for flag in flags])
    config.run.mkdir(exist_ok=True)
    return Inputs(config, config.run)


def test_a_run_builds_what_its_config_says(project, monkeypatch) -> None:
    encoder = make_tiny_encoder(project / "e")
    flags = ("--retrieval.kind", "hybrid", "--retrieval.encoder.model", encoder, "--retrieval.faiss", "graph")
    killed = load(project, *flags)
    monkeypatch.setattr(module, "CHUNK", 1)
    encode, encoded = Encoder.passages, []

    def dies_on_the_second(self, texts):
        encoded.append(texts)
        if len(encoded) == 2:
            raise KeyboardInterrupt
        return encode(self, texts)

    monkeypatch.setattr(Encoder, "passages", dies_on_the_second)
    with pytest.raises(KeyboardInterrupt):
        assert killed.retriever
    inputs = load(project, *flags)
    index = inputs.retriever
    assert encoded == [['"Ann"\nAnn lives in Oslo.'], *[['"Bob"\nBob lives in Rome.']] * 2]  # nothing that was done
    assert isinstance(index, HybridIndex)
    assert [type(part).__name__ for part in index.indexes] == ["Bm25Index", "DenseIndex"]
    assert inputs.retrieval_checksum() == index.checksum
    assert not list(inputs.root.glob(".index*"))
    made = [inputs.root / "index" / kind for kind in ("bm25", "dense")]
    given = load(project, "--retrieval.index", json.dumps([str(path) for path in made]))
    assert given.retrieval_checksum() == index.checksum
    one = load(project, "--retrieval.index", made[1], "--retrieval.parameters", "efSearch=3")
    assert isinstance(one.retriever, DenseIndex)
    assert one.retriever.parameters.endswith(",efSearch=3")


def test_a_dense_index_needs_an_encoder(project) -> None:
    with pytest.raises(ConfigError, match=r"kind = 'dense' needs an encoder; give encoder\.model"):
        load(project, "--retrieval.kind", "dense")
    with pytest.raises(ConfigError, match=r"retrieval\.encoder\.pooling"):
        load(project, "--retrieval.encoder.model", "x", "--retrieval.encoder.pooling", "max")
