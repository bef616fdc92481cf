"""An index follows its corpus; who has the old one open keeps it; what belongs to a run stays as it was measured."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from search_e1.agent import card
from search_e1.agent.bundle import Bundle, open_retriever
from search_e1.agent.update import update_indexes
from search_e1.cli.main import app
from search_e1.config import Config, RolloutConfig
from search_e1.data.corpus import Corpus
from search_e1.errors import ConfigError, DataError, RunError
from search_e1.retrieval.convention import EncoderSettings
from search_e1.retrieval.indexes import DenseSettings, build_index, open_index, open_indexes
from search_e1.retrieval.update import Change
from search_e1.stages.evaluate import Recall
from search_e1.stages.inputs import Inputs
from search_e1.stages.runner import StageRunner
from tiny_encoder import make_tiny_encoder

QUERIES = ["green river", "seven hills", "purple mountain"]


def corpus(directory: Path, changed: bool = False) -> Corpus:
    """Forty passages; changed: the first one is gone, one is new, one has another text."""
    texts = {f"p{i}": f"The river {i} flows past {i} hills and is green in the spring of {1900 + i}." for i in range(40)}
    if changed:
        del texts["p0"]
        texts |= {"p7": "Seven purple hills stand here.", "new": "A purple mountain without any river."}
    directory.mkdir(exist_ok=True)
    lines = (json.dumps({"id": id, "title": f"Title {id}", "text": text}) for id, text in texts.items())
    (directory / "passages.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return Corpus(directory)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> EncoderSettings:
    return EncoderSettings(model=str(make_tiny_encoder(tmp_path_factory.mktemp("encoder"))), device="cpu", dtype="float32")


@pytest.mark.parametrize("kind", ["bm25", "exact", "graph", "SQ8"])
def test_the_updated_index_is_the_one_that_a_new_build_makes(tmp_path: Path, encoder: EncoderSettings, kind: str) -> None:
    dense = None if kind == "bm25" else DenseSettings(encoder, kind)
    index = tmp_path / "index"
    build_index(corpus(tmp_path / "c"), index, dense=dense)
    changed = corpus(tmp_path / "c", changed=True)
    [(where, change, encoded)] = update_indexes([index], changed, device="cpu")
    assert (where, change) == (index, Change(before=40, passages=40, added=1, changed=1, removed=1, same=False))
    assert encoded == {"bm25": 0, "SQ8": 40}.get(kind, 2)  # SQ8 keeps no vectors to take over
    updated = open_index(index, device="cpu")
    fresh = build_index(changed, tmp_path / "fresh", dense=dense)
    assert updated.checksum == fresh.checksum
    found, expected = (
        [[(hit.id, pytest.approx(hit.score, abs=1e-5)) for hit in hits] for hits in i.search(QUERIES, 3)]
        for i in (updated, fresh)
    )
    assert [[id for id, _ in hits] for hits in found] == [[id for id, _ in hits] for hits in expected]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "fresh", "index"]


def vectors(index: Path) -> np.ndarray:
    """FAISS's flat format ends in the rows."""
    return np.frombuffer((index / "vectors.faiss").read_bytes()[-4 * 40 * 16 :], dtype=np.float32).reshape(40, 16)


def test_vectors_of_passages_that_stayed_are_the_old_ones_to_the_bit(tmp_path: Path, encoder: EncoderSettings) -> None:
    index = tmp_path / "index"
    build_index(corpus(tmp_path / "c"), index, dense=DenseSettings(encoder))
    before = vectors(index)
    update_indexes([index], corpus(tmp_path / "c", changed=True), device="cpu")
    after = vectors(index)
    kept = [i for i in range(1, 40) if i != 7]
    np.testing.assert_array_equal(after[[i - 1 for i in kept]], before[kept])
    assert not np.array_equal(after[6], before[7])


def test_who_has_the_old_index_open_is_not_harmed(tmp_path: Path) -> None:
    index = tmp_path / "index"
    build_index(corpus(tmp_path / "c"), index)
    opened = open_index(index)
    before = opened.search(QUERIES, 3)
    update_indexes([index], corpus(tmp_path / "c", changed=True))
    assert opened.search(QUERIES, 3) == before
    first = opened.passage("p0")  # looked up for the first time now
    assert first is not None
    assert first.text.startswith("The river 0 flows")
    assert opened.passage("new") is None
    assert open_index(index).passage("p0") is None


def test_an_index_of_the_same_corpus_is_left_alone(tmp_path: Path) -> None:
    index = tmp_path / "index"
    build_index(corpus(tmp_path / "c"), index)
    written = (index / "manifest.json").stat().st_mtime_ns
    [(_, change, _)] = update_indexes([index], corpus(tmp_path / "c"))
    assert change.same
    assert (index / "manifest.json").stat().st_mtime_ns == written
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "index"]


def test_an_update_that_was_killed_between_its_renames_is_mended(tmp_path: Path) -> None:
    index = tmp_path / "index"
    build_index(corpus(tmp_path / "c"), index)
    index.rename(tmp_path / ".index.old")
    update_indexes([index], corpus(tmp_path / "c", changed=True))
    assert open_index(index).passage("new") is not None


def make_agent(place: Path, indexes: list[Path]) -> Bundle:
    """A bundle without a policy that would load: its weights are a few bytes."""
    for index in indexes:
        shutil.copytree(index, place / "index" / index.name, copy_function=lambda a, b: Path(b).hardlink_to(a))
    opened = open_indexes(indexes, device="cpu")
    (place / "model.safetensors").write_bytes(b"weights")
    bundle = Bundle(
        name="agent", dtype="float32", limits=RolloutConfig(), policy="p", weights={"model.safetensors": 7},
        index=tuple(f"index/{index.name}" for index in indexes), passages=len(opened), checksum=opened.checksum,
        made_by="0", trained={},
    )  # fmt: skip
    bundle.write(place)
    (place / card.FILE).write_text(f"40 passages by bm25 and dense, checksum `{bundle.checksum}`.")
    return Bundle.read(place)


def test_an_agent_searches_the_new_index_and_says_what_it_was_measured_on(tmp_path: Path, encoder: EncoderSettings) -> None:
    old = corpus(tmp_path / "c")
    build_index(old, tmp_path / "bm25")
    build_index(old, tmp_path / "dense", dense=DenseSettings(encoder))
    before = make_agent(tmp_path / "agent", [tmp_path / "bm25", tmp_path / "dense"])
    done = update_indexes([tmp_path / "agent"], corpus(tmp_path / "c", changed=True), device="cpu")
    assert [encoded for _, _, encoded in done] == [0, 2]
    after = Bundle.read(tmp_path / "agent")
    retriever = open_retriever(after, device="cpu")  # which compares the checksum
    assert [hit.id for hit in retriever.search(["purple mountain"], 1)[0]] == ["new"]
    assert (after.passages, after.measured_on) == (40, before.checksum)
    assert after.checksum != before.checksum
    assert sorted(p.as_posix() for p in (tmp_path / "agent" / "index").iterdir()) == sorted(
        str(tmp_path / "agent" / name) for name in after.index
    )
    text = (tmp_path / "agent" / card.FILE).read_text()
    assert text.startswith(f"40 passages by bm25 and dense, checksum `{after.checksum}` (updated on ")
    assert f"the figures of this card were measured with checksum `{before.checksum}`)" in text
    assert open_index(tmp_path / "bm25").passage("p0") is not None  # the run's own, hard-linked, is as it was
    update_indexes([tmp_path / "agent"], corpus(tmp_path / "c"), device="cpu")
    back = Bundle.read(tmp_path / "agent")
    assert (back.checksum, back.measured_on) == (before.checksum, before.checksum)


def test_what_figures_or_a_bundle_are_bound_to_is_refused(tmp_path: Path) -> None:
    build_index(corpus(tmp_path / "c"), tmp_path / "run" / "index" / "bm25")
    (tmp_path / "run" / "index" / "manifest.json").write_text("{}")
    changed = corpus(tmp_path / "c", changed=True)
    with pytest.raises(ConfigError, match=r"this run's figures were measured with; update its agent instead \(.*run/agent\)"):
        update_indexes([tmp_path / "run" / "index" / "bm25"], changed)
    make_agent(tmp_path / "agent", [tmp_path / "run" / "index" / "bm25"])
    with pytest.raises(ConfigError, match="the index of a bundle; give the bundle"):
        update_indexes([tmp_path / "agent" / "index" / "bm25"], changed)
    with pytest.raises(ConfigError, match="a bundle is updated on its own"):
        update_indexes([tmp_path / "agent", tmp_path / "run"], changed)
    with pytest.raises(DataError, match="not an index"):
        update_indexes([tmp_path / "c"], changed)


def test_figures_made_with_the_old_index_are_not_taken_for_those_of_the_new_one(tmp_path: Path) -> None:
    index, run = tmp_path / "index", tmp_path / "run"
    build_index(corpus(tmp_path / "c"), index)
    (tmp_path / "q.jsonl").write_text('{"id": "q", "question": "What hills?", "golden_answers": ["purple"]}\n')
    data = {"train": tmp_path / "q.jsonl", "eval": {"tiny": tmp_path / "q.jsonl"}}
    config = Config.model_validate({"run": run, "policy": {"model": "small"}, "data": data, "retrieval": {"index": index}})
    StageRunner(Inputs(config, run)).make(Recall())
    update_indexes([index], corpus(tmp_path / "c", changed=True))
    later = Inputs(config, run)
    with pytest.raises(RunError, match=r"recall was made from other settings or inputs[\s\S]*inputs\.retrieval"):
        StageRunner(later).make(Recall())
    assert [hit.id for hit in later.retriever.search(["purple mountain"], 1)[0]] == ["new"]  # which `ask --config` searches


def test_the_command_says_what_changed(tmp_path: Path) -> None:
    build_index(corpus(tmp_path / "c"), tmp_path / "index")
    corpus(tmp_path / "c", changed=True)
    arguments = ["index", "update", str(tmp_path / "index"), "--corpus", str(tmp_path / "c"), "--processes", "1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1] == f"{tmp_path / 'index'}: 40 passages: 1 new, 1 changed, 1 gone"
    assert CliRunner().invoke(app, arguments).output.splitlines()[-1] == f"{tmp_path / 'index'}: 40 passages: unchanged"


def test_a_corpus_that_is_read_otherwise_is_refused_and_can_be_read_as_for_the_build(tmp_path: Path) -> None:
    (tmp_path / "docs.jsonl").write_text('{"docid": 1, "body": "A green river."}\n{"docid": 2, "body": "Seven hills."}\n')
    columns = ["--column", "id=docid", "--column", "text=body", "--prefix-ids"]
    where, index = ["--corpus", str(tmp_path / "docs.jsonl")], str(tmp_path / "index")
    assert CliRunner().invoke(app, ["index", "build", *where, "--out", index, *columns]).exit_code == 0
    updated = CliRunner().invoke(app, ["index", "update", index, *where, *columns])
    assert updated.exit_code == 0
    assert updated.output.endswith(f"{index}: 2 passages: unchanged\n")
    with pytest.raises(DataError, match="no passage of the corpus has an id of the index; read the corpus as for the build"):
        CliRunner().invoke(app, ["index", "update", index, *where, *columns[:-1]], catch_exceptions=False)
