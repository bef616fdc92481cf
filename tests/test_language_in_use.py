"""The language of answers reaches every place where they are compared: stages, evaluation, the agent; and a run's index."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import search_e1
from search_e1.data.answers import language_in_force
from search_e1.errors import ConfigError, RunError
from search_e1.retrieval import directory
from search_e1.runs.context import StageContext
from search_e1.runs.stage_id import StageId
from search_e1.stages.inputs import Inputs
from search_e1.stages.runner import StageRunner
from search_e1.stages.stage import Stage
from trained import config_of


class _Told(Stage):
    """Tells the language in force."""

    id = StageId("recall")
    parallel = uses_device = False

    def settings(self, config: Any) -> Mapping[str, Any]:
        return {"asked": language_in_force()}

    def inputs(self, run: Inputs) -> Mapping[str, str]:
        return {}

    def work(self, run: Inputs, context: StageContext) -> Mapping[str, Any]:
        return {"language": language_in_force()}


def test_a_stage_works_in_the_language_of_its_run(tmp_path: Path) -> None:
    config = config_of(tmp_path, rollout={"answer_language": "de+zh"})
    made = StageRunner(Inputs(config, tmp_path / "run")).make(_Told())
    assert made.manifest.result == {"language": "de+zh"}
    assert made.manifest.settings["asked"] == "de+zh"
    assert language_in_force() == "en"


def test_an_evaluation_by_the_rule_of_a_language(tmp_path: Path) -> None:
    text = "Talu Womgorn is a film with director Fuki Zixtim and studio Buta Monvok."
    index = search_e1.Bm25Index.build([search_e1.Passage(id="1", title="Talu Womgorn", text=text)], tmp_path / "index")
    question = search_e1.Question(id="q", text="What is the studio of the film Talu Womgorn?", answers=("Die Buta Monvok",))
    policy = search_e1.load_policy("small", search_e1.PolicyConfig(model="small"))
    limits = {code: search_e1.RolloutConfig(topk=1, answer_language=code) for code in ("en", "de")}
    results = {code: search_e1.evaluate(policy, index, [question], limits[code], out=tmp_path / code) for code in limits}
    assert {code: (r.em, r.results[0].cover_em, r.results[0].read) for code, r in results.items()} == {
        "en": (0.0, 0.0, False),
        "de": (1.0, 1.0, True),
    }
    stored = json.loads((tmp_path / "de" / "manifest.json").read_text())
    assert stored["settings"]["rollout"]["answer_language"] == "de"
    with pytest.raises(ConfigError, match=r"rollout.answer_language \(en for en, de for de\)"):
        search_e1.compare(tmp_path / "en", tmp_path / "de")


def test_a_runs_index_is_in_the_language_of_the_config(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"id": "1", "title": "Rhein", "text": "Er ist ein Fluss und lang."}))
    run = tmp_path / "run"
    found = Inputs(config_of(tmp_path, retrieval={"language": "fr"}), run).index
    assert directory.read(found.path / "bm25").settings["language"] == "fr"
    with pytest.raises(RunError, match="language"):
        assert Inputs(config_of(tmp_path), run).index
    assert directory.read(Inputs(config_of(tmp_path), tmp_path / "auto").index.path / "bm25").settings["language"] == "de"
    with pytest.raises(ValueError, match="language is only for building a bm25 index"):
        config_of(tmp_path, retrieval={"language": "fr", "index": [str(tmp_path)]})
    for key, value in (("encoder", {"model": "e5"}), ("faiss", "graph"), ("parameters", "nprobe=9")):
        for place in ({}, {"url": "http://127.0.0.1:8000"}):
            with pytest.raises(ValueError, match=f"{key} is only for a dense index; set kind = 'dense' or 'hybrid'"):
                config_of(tmp_path, retrieval={key: value, **place})
        config_of(tmp_path, retrieval={key: value, "index": [str(tmp_path)]})
    with pytest.raises(ValueError, match="language = 'french': no such language; did you mean 'fr'"):
        config_of(tmp_path, retrieval={"language": "french"})
