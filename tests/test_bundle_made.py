"""Bundles of runs that are made up: their number type, dense indexes, model card and license."""

from pathlib import Path

import pytest
from huggingface_hub.repocard import metadata_load
from safetensors.torch import load_file

from conftest import PASSAGES, make_tiny_policy
from search_e1.agent import card
from search_e1.agent.agent import Agent
from search_e1.agent.make import make_bundle
from search_e1.errors import ModelError
from search_e1.retrieval.convention import EncoderSettings
from search_e1.retrieval.indexes import DenseSettings, build_index, open_indexes
from test_bundle import made_run
from tiny_encoder import make_tiny_encoder
from tiny_gguf import write_gguf


@pytest.mark.parametrize(("gpus", "has", "dtype"), [(0, True, "bfloat16"), (0, False, "float32"), (1, False, "bfloat16")])
def test_auto_is_what_the_run_computed_in(
    gpus: int, has: bool, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search_e1.training.precision._SMALLEST", 0)
    monkeypatch.setattr("search_e1.agent.make.multiplies_bfloat16", lambda _: has)
    run = made_run(tmp_path / "run", {"url": "http://127.0.0.1:9"}, "http://127.0.0.1:9", gpus=gpus)
    assert make_bundle(run, tmp_path / "out").dtype == dtype
    [weights, *_] = load_file(tmp_path / "out" / "model.safetensors").values()
    assert str(weights.dtype) == f"torch.{dtype}"


def test_a_dense_index_is_searched_with_its_own_parameters_and_tells_where_its_encoder_is(tmp_path: Path) -> None:
    encoder = make_tiny_encoder(tmp_path / "encoder")
    dense = DenseSettings(EncoderSettings(model=str(encoder), device="cpu"), "HNSW4,Flat")
    index = build_index(PASSAGES, tmp_path / "dense", dense=dense)
    words = build_index(PASSAGES, tmp_path / "words")
    opened = open_indexes([words.directory, index.directory], parameters="efSearch=99")  # type: ignore[attr-defined]
    retrieval = {"kind": "hybrid", "index": [tmp_path / "words", tmp_path / "dense"], "parameters": "efSearch=99"}
    run = made_run(tmp_path / "run", retrieval, opened.checksum)
    made = make_bundle(run, tmp_path / "out")
    assert (made.index, made.parameters) == (("index/bm25", "index/dense"), "efSearch=99")
    assert "Queries are encoded by `encoder`, which is not in this bundle" in (tmp_path / "out" / "README.md").read_text()
    with Agent.open(tmp_path / "out", device="cpu") as agent:
        assert [p.id for p in agent.search("mayor of Bel")] == [p.id for p in opened.search(["mayor of Bel"], 3)[0]]
    encoder.rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="or give its current directory with --encoder"):
        Agent.open(tmp_path / "out")
    Agent.open(tmp_path / "out", encoder=tmp_path / "elsewhere", device="cpu").close()


def test_what_is_known_of_the_base(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--some--model" / "snapshots" / ("0" * 40)
    make_tiny_policy().save(snapshot)
    (snapshot / "README.md").write_text("---\nlicense: other\nlicense_name: some-terms\nlicense_link: LICENSE\n---\n")
    (snapshot / "LICENSE.txt").write_text("Terms.")
    known = card.base_of_run(str(snapshot))
    assert (known.id, [file.name for file in known.notices]) == ("some/model", ["LICENSE.txt"])
    assert known.license == {"license": "other", "license_name": "some-terms", "license_link": "LICENSE"}
    write_gguf(tmp_path / "tiny.gguf", make_tiny_policy().model, meta=lambda writer: writer.add_license("apache-2.0"))  # type: ignore[arg-type]
    known = card.base_of_run(str(tmp_path / "tiny.gguf"))
    assert (known.described, known.license) == ("The base is `tiny.gguf`, dequantized", {"license": "apache-2.0"})
    assert card.base_of_run("small").license == {"license": "apache-2.0"}
    assert card.base_of_run("new").id is None
    assert card.base_of_run("owner/name") == card.Base("The base is `owner/name`", id="owner/name")
    (snapshot / "README.md").write_text("---\n: : :\n---\n")
    assert card.base_of_run(str(snapshot)).license is None


def test_a_card_without_a_licence_says_so(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", {"url": "http://127.0.0.1:9"}, "http://127.0.0.1:9")
    make_bundle(run, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "The license of the base is unknown: ask its authors before you share the weights." in text
    assert "They are not in this bundle but at http://127.0.0.1:9" in text
    assert "license" not in (metadata_load(tmp_path / "out" / "README.md") or {})
