"""What a stage depends on, and what its runner does with several ranks."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ranked import in_ranks
from search_e1.config import RetrievalConfig
from search_e1.errors import NoLeadError
from search_e1.runs.stage_id import StageId
from search_e1.stages.coldstart import Coldstart
from search_e1.stages.lead import MeasureLead
from search_e1.stages.runner import StageRunner
from search_e1.stages.stage import Stage
from test_evolve import config, project

assert project  # the fixture: a tiny policy, passages and questions


class _Refused(Stage):
    id = StageId("ofsd", 1)

    def settings(self, config: Any) -> dict[str, Any]:
        return {}

    def inputs(self, run: Any) -> dict[str, str]:
        raise NoLeadError("the teacher does not lead")

    def work(self, run: Any, context: Any) -> dict[str, Any]:
        raise AssertionError


def test_a_refusal_that_rank_0_finds_is_raised_on_all_ranks(tmp_path: Path) -> None:
    """``evolve`` goes on after it: a rank that waited in the refused stage would take the next stage's messages for its own."""

    def refused() -> str:
        try:
            StageRunner(None)._inputs(_Refused())  # type: ignore[arg-type]
        except NoLeadError as error:
            return str(error)
        return "none"

    assert in_ranks(2, refused, tmp_path) == ["the teacher does not lead"] * 2


def test_a_lead_depends_on_the_temperature_at_which_it_is_sampled(project: Path, tmp_path: Path) -> None:
    base = config(project, tmp_path)
    other = base.model_copy(update={"pool": base.pool.model_copy(update={"temperature": 0.5})})
    stage = MeasureLead("policy", tmp_path, 1)
    assert stage.settings(base) != stage.settings(other)


@pytest.mark.parametrize(
    ("retrieval", "apart"),
    [({}, False), ({"url": "http://x"}, True), ({"index": ["i"]}, True), ({"kind": "json:JSONDecoder"}, True)],
)
def test_a_cold_start_depends_on_a_corpus_that_no_index_of_the_run_stands_for(retrieval: dict, apart: bool) -> None:
    settings = SimpleNamespace(
        policy=SimpleNamespace(model="small"),
        retrieval=RetrievalConfig.model_validate(retrieval),
        data=SimpleNamespace(corpus=("c",), demonstrations=None),
    )
    run = SimpleNamespace(config=settings, corpus_checksum="sum", sampled_on=lambda policy: {"policy": policy})
    assert ("corpus" in Coldstart().inputs(run)) is apart  # type: ignore[arg-type]
