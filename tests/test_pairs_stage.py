"""The pairs stage and those that take its pairs: whose they are, what was cut, and that a refusal leaves the policy alone."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from conftest import TinyRetriever, make_tiny_policy
from made_pairs import make_pair
from search_e1 import runs
from search_e1.config import Config
from search_e1.errors import DataError, NoLeadError, RunError
from search_e1.runs import checksum
from search_e1.selfdistill import files
from search_e1.stages.distill import Distill
from search_e1.stages.inputs import Inputs
from search_e1.stages.lead import MeasureLead
from search_e1.stages.pairs import Pairs
from search_e1.stages.pool import pool_stage
from search_e1.stages.runner import StageRunner
from search_e1.text.prompts import privileged_prompt
from search_e1.training.policy import load_reader
from search_e1.types import Group
from test_evolve import config, project  # noqa: F401

MANY = 8


class Made:
    """A run, its stages one by one."""

    def __init__(self, settings: Config, root: Path) -> None:
        self.config, self.root = settings, root
        self.run = Inputs(settings, root)
        self._runner = StageRunner(self.run)

    def pool(self, policy: str | Path, round: int) -> runs.Artifact:
        return self._runner.make(pool_stage(self.config, policy, round))

    def pairs(self, policy: str | Path, pool: Path, round: int, **other: bool) -> runs.Artifact:
        return self._runner.make(Pairs(policy, pool, round, **other))

    def lead(self, policy: str | Path, pairs: Path, round: int) -> runs.Artifact:
        return self._runner.make(MeasureLead(policy, pairs, round))

    def distill(self, policy: str | Path, pairs: Path, lead: Path, round: int, **other: bool) -> runs.Artifact:
        return self._runner.make(Distill(policy, pairs, lead, round, **other))


@pytest.fixture
def stages(project, tmp_path) -> Made:  # noqa: F811
    return Made(config(project, tmp_path / "run"), tmp_path / "run")


def pool(stages: Made, policy: str | Path, questions: int = MANY) -> Path:
    """A pool of tiny pairs, as ``policy`` would have sampled them."""
    loaded = stages.run.load(policy)
    pairs = [make_pair(loaded) for _ in range(questions)]
    groups = [
        Group(
            question=pair.question.model_copy(update={"id": f"q{i}"}),
            trajectories=[t.model_copy(update={"question_id": f"q{i}"}) for t in (pair.student, pair.reference)],
        )
        for i, pair in enumerate(pairs)
    ]

    def make(out: Path) -> dict:
        (out / "groups.jsonl").write_text("".join(group.model_dump_json() + "\n" for group in groups))
        return {}

    inputs = {"policy": stages.run.checksum(policy)}
    return runs.artifact(stages.root / "pool-1", stage="pool-1", settings={}, inputs=inputs, seed=0, make=make).path


def changed(stages: Made, **sections) -> Made:
    settings = Config.model_validate(stages.config.model_dump() | sections)
    return Made(settings, stages.root / "changed")


def test_pairs_remember_the_policy_that_sampled_them(stages):
    policy = stages.config.policy.model
    made = stages.pairs(policy, pool(stages, policy), 1)
    assert made.manifest.inputs["policy"] == checksum(Path(policy))
    assert made.manifest.result["pairs"] == MANY
    assert len(files.read(made.path / files.TRAIN)) + len(files.read(made.path / files.HELD_OUT)) == MANY


def test_a_changed_gate_mines_and_measures_nothing_again(stages):
    """The gate decides about a measured lead: it is no part of the pairs or the lead, so a branch takes both over."""
    policy = stages.config.policy.model
    pairs, lead = Pairs(policy, stages.root, 1), MeasureLead(policy, stages.root, 1)
    loose = changed(stages, lead=stages.config.lead.model_dump() | {"enforce": False, "minimum": 0.5, "gate": "low"}).config
    fewer = changed(stages, lead=stages.config.lead.model_dump() | {"pairs": 1}).config
    again = changed(stages, lead=stages.config.lead.model_dump() | {"samples": 7}).config
    assert pairs.settings(loose) == pairs.settings(stages.config) != pairs.settings(fewer)
    assert lead.settings(loose) == lead.settings(stages.config) != lead.settings(again)


def test_another_policy_is_refused_and_left_as_it_was(stages, tmp_path):
    policy, other = stages.config.policy.model, tmp_path / "other"
    make_tiny_policy(seed=5).save(other)
    before = checksum(other)
    sampled = pool(stages, policy)
    pairs = stages.pairs(policy, sampled, 1).path
    stages.run.retriever = TinyRetriever([])
    told = rf"sampled by a policy other than {other} \(checksum {checksum(Path(policy))[:12]}, not {before[:12]}\)"
    for refused in (
        lambda: stages.pairs(other, sampled, 2),
        lambda: stages.lead(other, pairs, 1),
        lambda: stages.distill(other, pairs, tmp_path, 1),
    ):
        with pytest.raises(RunError, match=told) as refusal:
            refused()
        assert "\n" not in str(refusal.value)
        assert "--allow-other-policy" in str(refusal.value)
    assert checksum(other) == before
    assert {path.name for path in stages.root.iterdir()} == {"pool-1", "pairs-1"}


def test_another_policy_may_be_allowed(stages, tmp_path):
    policy, other = stages.config.policy.model, tmp_path / "other"
    make_tiny_policy(seed=5).save(other)
    sampled = pool(stages, policy)
    pairs = stages.pairs(other, sampled, 1, other_policy=True)
    assert pairs.manifest.inputs["policy"] == checksum(Path(policy))  # still those of who sampled them
    lead = tmp_path / "lead"
    lead.mkdir()
    with pytest.raises(FileNotFoundError, match=r"lead\.json"):  # past the check
        stages.distill(other, pairs.path, lead, 1, other_policy=True)


def test_another_tokenizer_is_refused_even_then(stages, tmp_path):
    policy = stages.config.policy.model
    sampled = pool(stages, policy)
    pairs = stages.pairs(policy, sampled, 1).path
    with pytest.raises(DataError, match=r"pool-1.*sampled with another tokenizer"):
        stages.pairs("small", sampled, 2, other_policy=True)
    with pytest.raises(DataError, match=r"train.jsonl: sampled with another tokenizer: the ids of question 'q"):
        files.read(pairs / files.TRAIN, load_reader("small", stages.config.policy).tokenizer)


def test_what_does_not_fit_is_counted_and_what_is_cut_too(stages):
    policy = stages.config.policy.model
    sampled = pool(stages, policy)
    tight = changed(stages, reference={"max_tokens": 60}).pairs(policy, sampled, 1)
    result = tight.manifest.result
    assert (result["pairs"], result["none_fits"], result["too_long"], result["usable"]) == (0, MANY, MANY, 0)
    assert (tight.path / files.TRAIN).read_text() == ""


def test_the_choice_of_what_is_shown_is_in_the_pairs(stages):
    policy = stages.config.policy.model
    made = changed(stages, reference={"shows": "none"}).pairs(policy, pool(stages, policy), 1)
    prompts = stages.run.load_reader(policy).prompts
    for pair in files.read(made.path / files.TRAIN):
        assert pair.teacher_prompt_ids == privileged_prompt(make_tiny_policy().tokenizer, prompts, pair.question.text, "")
        assert pair.reference_shown == ""
    assert made.manifest.settings["reference"]["shows"] == "none"


def test_a_pool_of_groups_that_grpo_kept(stages, tmp_path):
    """The newest first, as many as are asked for; and what is refused."""
    policy, directory = tmp_path / "grpo" / "policy", tmp_path / "grpo"
    make_tiny_policy().save(policy)
    grpo = stages.config.grpo.model_dump() | {"keep_groups": True}
    taking = changed(stages, grpo=grpo, pool={"source": "grpo", "questions": 3})
    with pytest.raises(RunError, match=r"grpo/groups\.jsonl: missing; give a policy that GRPO has trained") as refusal:
        taking.pool(policy, 1)
    assert "\n" not in str(refusal.value)
    kept = (pool(stages, policy) / "groups.jsonl").read_text()
    (directory / "groups.jsonl").write_text(kept)
    made = taking.pool(policy, 1)
    assert (made.path / "groups.jsonl").read_text() == "".join(kept.splitlines(keepends=True)[:3])
    result = made.manifest.result
    assert (result["questions"], result["em"], result["stop_reasons"]) == (3, 0.5, {"answered": 6})
    assert taking.pairs(policy, made.path, 1).manifest.inputs["policy"] == checksum(policy)
    assert changed(stages, grpo=grpo, pool={"source": "grpo"}).pool(policy, 2).manifest.result["questions"] == MANY
    (directory / "groups.jsonl").write_text("")
    with pytest.raises(DataError, match="no groups in it"):
        taking.pool(policy, 3)
    for sections in ({}, {"grpo": grpo | {"steps": 0}}):
        with pytest.raises(ValidationError, match=r'pool\.source = "grpo" needs grpo\.keep_groups = true and grpo\.steps'):
            changed(stages, pool={"source": "grpo"}, **sections)


def test_demonstrations_are_part_of_what_pairs_are_made_of(stages, tmp_path):
    policy, path = stages.config.policy.model, tmp_path / "demonstrations.jsonl"
    text = "<answer>Cor Dun</answer>"
    path.write_text("".join(json.dumps({"id": f"q{i}", "text": text}) + "\n" for i in range(3)))
    data = stages.config.data.model_dump() | {"demonstrations": path}
    by_gold = changed(stages, data=data, pairs={"references_by": "gold"})
    made = by_gold.pairs(policy, pool(stages, policy), 1)
    assert made.manifest.inputs["demonstrations"] == checksum(path)
    assert (made.manifest.result["pairs"], made.manifest.result["no_demonstration"]) == (3, MANY - 3)
    path.write_text(path.read_text() + "\n")
    with pytest.raises(RunError, match="was made from other settings or inputs"):
        by_gold.pairs(policy, stages.root / "pool-1", 1)
    path.unlink()
    with pytest.raises(DataError, match=r"demonstrations\.jsonl: cannot be read"):
        by_gold.pairs(policy, stages.root / "pool-1", 1)
    with pytest.raises(DataError, match=r"demonstrations\.jsonl: cannot be read"):
        by_gold.run.check(policy)
    with pytest.raises(ValidationError, match=r'pairs\.references_by = "gold" needs data\.demonstrations'):
        changed(stages, pairs={"references_by": "gold"})


def test_without_pairs_there_is_nothing_to_measure_or_to_distill(stages, tmp_path):
    policy = stages.config.policy.model
    before = checksum(Path(policy))
    pairs = changed(stages, reference={"max_tokens": 60}).pairs(policy, pool(stages, policy), 1).path
    stages.run.retriever = TinyRetriever([])
    stages.run.retrieval_checksum = lambda: "none"
    with pytest.raises(DataError, match="no pair to measure the teacher's lead on: there are none"):
        stages.lead(policy, pairs, 1)
    measured = json.loads(LEAD)
    (tmp_path / "lead").mkdir()
    (tmp_path / "lead" / "lead.json").write_text(json.dumps(measured))
    with pytest.raises(DataError, match="no pairs to distill on"):
        stages.distill(policy, pairs, tmp_path / "lead", 1)
    measured |= {"em_privileged": 0.0}
    (tmp_path / "lead" / "lead.json").write_text(json.dumps(measured))
    enforced = stages.config.lead.model_copy(update={"enforce": True})
    stages.run.config = stages.config.model_copy(update={"lead": enforced})
    with pytest.raises(NoLeadError):
        stages.distill(policy, pairs, tmp_path / "lead", 1)
    assert not (stages.root / "lead-1").exists()
    assert not (stages.root / "ofsd-1").exists()
    assert checksum(Path(policy)) == before


LEAD = """{"pairs": 1, "too_long": 0, "samples": 1, "em_plain": 0, "em_privileged": 1, "low": 0, "high": 1, "searches_plain": 0,
"searches_privileged": 0, "tokens_plain": 0, "tokens_privileged": 0, "pairs_off_track": 0, "em_plain_off_track": null,
"em_privileged_off_track": null, "kl": {}}"""
