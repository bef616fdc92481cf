"""A run over corpora of three formats: one index, ids told apart, and answers that say which corpus they are from."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from conftest import PASSAGES
from search_e1 import evolve
from search_e1.agent.agent import Agent
from search_e1.cli.display.answers import origin
from search_e1.config import Config
from search_e1.data.corpus import Corpus
from search_e1.errors import DataError
from search_e1.retrieval.bm25 import Bm25Index
from search_e1.types import Group
from test_evolve import config
from test_evolve import project as project


@pytest.fixture
def corpora(tmp_path: Path) -> list[Path]:
    """The five passages, numbered from 1 in each file."""
    arda, bel, eth, fen, ion = PASSAGES
    lands = [{"id": str(i), "title": p.title, "text": p.text} for i, p in enumerate((arda, eth), 1)]
    (tmp_path / "lands.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lands))
    (tmp_path / "cities.csv").write_text(
        f"id,title,text,file\n1,Bel,{bel.text},cities/bel.md\n2,Fen,{fen.text},cities/fen.md\n"
    )
    (tmp_path / "more").mkdir()
    parquet.write_table(pyarrow.table({"id": [1], "contents": [ion.contents]}), tmp_path / "more" / "rivers.parquet")
    return [tmp_path / "lands.jsonl", tmp_path / "cities.csv", tmp_path / "more"]


def settings(project: Path, run: Path, corpora: list[Path], **data: Any) -> Config:
    """One step of GRPO over all corpora."""
    made = config(project, run)
    changes = {
        "ofsd": "never",
        "data": made.data.model_copy(update={"corpus": tuple(corpora), **data}),
        "grpo": made.grpo.model_copy(update={"steps": 1}),
        "evaluation": made.evaluation.model_copy(update={"samples": 0, "latency": 0}),
    }
    return made.model_copy(update=changes)


def test_a_run_trains_on_them_and_its_agent_says_which(project: Path, corpora: list[Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(DataError, match=r"cities\.csv:2: id '1' was used in .*lands\.jsonl:1; .*data\.prefix_ids") as refused:
        evolve.train(settings(project, run, corpora))
    assert "\n" not in str(refused.value)
    evolve.train(settings(project, run, corpora, prefix_ids=True))
    index = Bm25Index.open(run / "index" / "bm25")
    assert {(p.id, p.metadata["corpus"]) for p in index.passages} == {
        ("lands:1", "lands"), ("lands:2", "lands"), ("cities:1", "cities"), ("cities:2", "cities"), ("more:1", "more"),
    }  # fmt: skip
    recalls = [json.loads(line) for line in (run / "recall" / "recall.jsonl").read_text().splitlines()]
    assert [row["in_corpus"] for row in recalls] == [True, True, True]
    lines = (run / "evaluation-base" / "trajectories.jsonl").read_text().splitlines()
    groups = [Group.model_validate_json(line) for line in lines]
    read = {id for group in groups for t in group.trajectories for turn in t.turns for id in turn.passage_ids}
    assert read <= {"lands:1", "lands:2", "cities:1", "cities:2", "more:1"}
    assert read & {"lands:1", "lands:2"}
    with Agent.open(run / "agent") as agent:
        sources = [source for group in groups for source in agent.ask(group.question.text).sources]
    assert {origin(source) for source in sources} & {"Arda, lands", "Eth, lands"}
    hit = index.search(["mayor of Bel"], 1)[0][0]
    assert (hit.id, hit.metadata) == ("cities:1", {"corpus": "cities", "file": "cities/bel.md"})


def test_corpora_of_one_name_and_a_record_that_names_its_own(tmp_path: Path) -> None:
    places = []
    for folder, more in (("a", {}), ("b", {"metadata": {"corpus": "mine"}})):
        (tmp_path / folder).mkdir()
        places.append(tmp_path / folder / "c.jsonl")
        places[-1].write_text(json.dumps({"id": folder, "text": "x", **more}) + "\n")
    assert [p.metadata for p in Corpus(*places)] == [{"corpus": "a-c"}, {"corpus": "mine"}]
    assert [p.metadata for p in Corpus(places[0])] == [{}]
