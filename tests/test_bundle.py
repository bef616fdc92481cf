"""A run as one directory: the ids of its evaluation, wherever it lies; what it tells; what is refused; the Hub."""

import errno
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.repocard import metadata_load
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import fake_hub
from conftest import PASSAGES, TINY_PROMPTS, make_tiny_policy
from search_e1 import evolve, runs
from search_e1.agent import publish
from search_e1.agent.agent import Agent
from search_e1.agent.bundle import Bundle
from search_e1.agent.make import Searched, make_bundle
from search_e1.cli import main as cli
from search_e1.config import Config, PolicyConfig, Prompts
from search_e1.errors import DataError, RunError, SearchE1Error
from search_e1.retrieval.indexes import build_index, open_indexes
from search_e1.rollout.engines.torch import TorchEngine
from search_e1.rollout.loop import rollout
from search_e1.rollout.starts import starts
from search_e1.runs.opening import CONFIG
from search_e1.training import policy as policies
from search_e1.types import Group, Passage, Trajectory
from serving import serving
from test_cli import run as command
from test_evolve import config
from test_evolve import project as project


def settings(project: Path, root: Path, **changes: Any) -> Config:
    """One step of GRPO, evaluated on more questions than it is trained on."""
    made = config(project, root)
    quick = {
        "ofsd": "never",
        "grpo": made.grpo.model_copy(update={"steps": 1}),
        "data": made.data.model_copy(update={"eval": {"tiny": project / "dev.jsonl"}}),
        "evaluation": made.evaluation.model_copy(update={"samples": 0, "latency": 0}),
    }
    return made.model_copy(update=quick | changes)


@pytest.fixture(scope="module")
def run(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [json.loads(line) for line in (project / "questions.jsonl").read_text().splitlines()]
    more = [{**row, "id": f"{row['id']}-{w}", "question": f"{w} {row['question']}"} for row in rows for w in ("The", "Say")]
    (project / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *more]))
    (project / "policy" / "README.md").write_text("---\nlicense: mit\nbase_model: someone/base\n---\nx")
    (project / "policy" / "NOTICE").write_text("As is.")
    root = tmp_path_factory.mktemp("bundles") / "run"
    evolve.train(settings(project, root))
    return root


@pytest.fixture
def bundle(run: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(run / "agent", tmp_path / "copy"))


def evaluated(run: Path, stage: str) -> list[Group]:
    file = run / f"evaluation-{stage}" / "trajectories.jsonl"
    return [Group.model_validate_json(line) for line in file.read_text().splitlines()]


def asked(directory: Path | str, groups: list[Group], **options: Any) -> list[Trajectory]:
    with Agent.open(directory, **options) as agent:
        jobs = [agent.submit(group.question) for group in groups]
        return [job.answer.result(60).trajectory for job in jobs]


def ids(trajectories: list[Trajectory]) -> list[tuple[int, ...]]:
    return [(*trajectory.prompt_ids, *trajectory.response_ids) for trajectory in trajectories]


def listing(directory: Path) -> list[str]:
    return sorted(str(file.relative_to(directory)) for file in directory.rglob("*"))


def test_the_agent_answers_with_the_ids_of_the_evaluation_also_moved_and_without_its_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = evaluated(run, "grpo-1")
    expected = ids([group.trajectories[0] for group in groups])
    assert len(expected) == 9
    assert sum(trajectory.searches for group in groups for trajectory in group.trajectories) > 0
    assert ids(asked(run / "agent", groups)) == expected
    copied = Path(shutil.copytree(run, tmp_path / "copy of a run"))
    make_bundle(copied, tmp_path / "made")
    shutil.rmtree(copied)
    (tmp_path / "made").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert ids(asked("moved", groups)) == expected


def test_another_policy_and_another_dtype(run: Path, tmp_path: Path, project: Path) -> None:
    groups = evaluated(run, "base")
    make_bundle(run, tmp_path / "base", stage="base")
    assert ids(asked(tmp_path / "base", groups)) == ids([group.trajectories[0] for group in groups])
    made = make_bundle(run, tmp_path / "half", dtype="bfloat16")
    assert {str(weight.dtype) for weight in load_file(tmp_path / "half" / "model.safetensors").values()} == {"torch.bfloat16"}
    trained = policies.load(run / "grpo-1" / "policy", PolicyConfig(model="x", dtype="bfloat16", device="cpu"))
    begin = starts(trained.tokenizer, trained.prompts, [group.question for group in groups], 1)
    engine, index = TorchEngine(trained.model, trained.tokenizer, batch_size=2), open_indexes([run / "index" / "bm25"])
    expected = rollout(engine, index, begin, made.limits, temperature=0.0, seed=0, prompts=trained.prompts)
    assert ids(asked(tmp_path / "half", groups)) == ids(expected)


def test_it_tells_what_was_measured_and_nothing_of_the_machine(run: Path) -> None:
    made = Bundle.read(run / "agent")
    summary = json.loads((run / "summary.json").read_text())
    assert [row["stage"] for row in made.trained["policies"]] == ["base", "grpo-1"]
    for told, row in zip(made.trained["policies"], summary["policies"], strict=True):
        assert told == {key: row[key] for key in told}
        assert {"n", "em", "em_interval", "searches", "tokens"} <= told.keys()
    assert (made.name, made.trained["stage"], made.dtype) == ("run", "grpo-1", "float32")
    assert made.checksum == runs.read(run / "evaluation-grpo-1").manifest.inputs["retrieval"]
    assert made.policy == runs.checksum(run / "grpo-1" / "policy")
    assert (made.passages, made.trained["config"]["data"]["eval"]) == (len(PASSAGES), {"tiny": "dev.jsonl"})
    written = "".join((run / "agent" / name).read_text() for name in ("agent.json", "README.md"))
    assert str(run.parent.parent) not in written
    last = summary["policies"][-1]
    low, high = last["em_interval"]
    row = f"| grpo-1 | 9 | {last['em']:.3f} | {low:.3f} to {high:.3f} | {last['searches']:.2f} | {last['tokens']:.1f} |"
    assert row in written
    assert made.checksum in written
    front = metadata_load(run / "agent" / "README.md")
    assert front
    assert (front["license"], front["base_model"], front["pipeline_tag"]) == ("mit", "someone/base", "text-generation")
    assert (run / "agent" / "NOTICE").read_text() == "As is."


def test_the_root_is_a_plain_directory_of_transformers_and_the_index_is_linked(run: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(run / "agent").state_dict()
    weights = load_file(run / "grpo-1" / "policy" / "model.safetensors")
    assert all(loaded[name].equal(weight) for name, weight in weights.items())
    assert Prompts.of_policy(run / "agent") == TINY_PROMPTS
    assert (run / "agent" / "model.safetensors").stat().st_mode & 0o44 == (run / "agent" / "agent.json").stat().st_mode & 0o44
    files = [name for name in listing(run / "index" / "bm25") if (run / "index" / "bm25" / name).is_file()]
    assert files == [n for n in listing(run / "agent" / "index" / "bm25") if (run / "agent" / "index" / "bm25" / n).is_file()]
    assert all((run / "agent" / "index" / "bm25" / n).samefile(run / "index" / "bm25" / n) for n in files)


def test_train_makes_it_again_only_if_the_last_policy_is_another(run: Path, project: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    before = (copied / "agent" / "agent.json").stat().st_ino
    evolve.train(settings(project, copied))
    assert (copied / "agent" / "agent.json").stat().st_ino == before
    make_bundle(copied, copied / "agent", stage="base", renew=True)
    evolve.train(settings(project, copied))
    assert Bundle.read(copied / "agent").trained["stage"] == "grpo-1"
    (copied / "agent" / "model.safetensors").write_bytes(b"")  # damaged
    evolve.train(settings(project, copied))
    assert Bundle.read(copied / "agent").weights == Bundle.read(run / "agent").weights
    assert not list(copied.glob(".agent*"))


def test_train_without_a_bundle_is_the_same_run(run: Path, project: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    shutil.rmtree(copied / "agent")
    evolve.train(settings(project, copied, bundle=False))
    assert not (copied / "agent").exists()


@pytest.mark.parametrize("problem", ["disk", "interrupt"])
def test_what_fails_leaves_nothing(problem: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device") if problem == "disk" else KeyboardInterrupt

    monkeypatch.setattr(Bundle, "write", fail)
    with pytest.raises(RunError if problem == "disk" else KeyboardInterrupt, match="disk is full" if problem == "disk" else ""):
        make_bundle(run, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_index_on_another_file_system_is_copied(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(Path, "hardlink_to", fail)
    make_bundle(run, tmp_path / "out")
    there, made = run / "index" / "bm25" / "passages.jsonl", tmp_path / "out" / "index" / "bm25" / "passages.jsonl"
    assert made.read_bytes() == there.read_bytes()
    assert not made.samefile(there)


# What it searches


def test_without_an_index_it_asks_for_one_and_takes_none_of_other_passages(run: Path, tmp_path: Path) -> None:
    made = make_bundle(run, tmp_path / "out", searched=Searched(copied=False))
    assert not (tmp_path / "out" / "index").exists()
    with pytest.raises(DataError, match="has no passages; give --index DIR or --url URL"):
        Agent.open(tmp_path / "out")
    groups = evaluated(run, "grpo-1")
    expected = ids([group.trajectories[0] for group in groups])
    assert ids(asked(tmp_path / "out", groups, index=[run / "index" / "bm25"])) == expected
    with serving(open_indexes([run / "index" / "bm25"])) as url:
        assert ids(asked(tmp_path / "out", groups, url=url)) == expected
        make_bundle(run, tmp_path / "by-address", searched=Searched(copied=False, url=url))
        assert ids(asked(tmp_path / "by-address", groups)) == expected
    build_index([Passage(id="x", title="X", text="Other.")], tmp_path / "other")
    with pytest.raises(DataError, match=f"an index of other passages .* not {made.checksum[:12]}"):
        Agent.open(tmp_path / "out", index=[tmp_path / "other"])
    with pytest.raises(DataError, match="not the index that the run searched"):
        make_bundle(run, tmp_path / "no", searched=Searched([tmp_path / "other"]))
    assert not (tmp_path / "no").exists()


def made_run(root: Path, retrieval: dict[str, Any], checksum: str, gpus: int = 0) -> Path:
    """A run that evaluated the policy it was given, over ``retrieval``."""
    make_tiny_policy().save(root / "policy")
    needed = {"model": str(root / "policy")}, {"train": ["t.jsonl"], "eval": {"dev": "d.jsonl"}}
    made = Config.model_validate({"run": root, "policy": needed[0], "data": needed[1], "retrieval": retrieval})
    (root / CONFIG).write_text(json.dumps(made.fingerprint(), default=str))
    row = {"stage": "base", "n": 1, "em": 1.0, "em_interval": [0.2, 1.0], "searches": 1.0, "tokens": 9.0}
    (root / "summary.json").write_text(json.dumps({"policies": [row]}))
    runs.artifact(
        root / "evaluation-base",
        stage="evaluation-base",
        settings={},
        inputs={"retrieval": checksum},
        seed=0,
        make=lambda _: {},
        gpus=gpus,
    )
    return root


def test_a_server_is_searched_at_its_address_unless_that_holds_a_key(run: Path, tmp_path: Path) -> None:
    with serving(open_indexes([run / "index" / "bm25"])) as url:
        checksum = Bundle.read(run / "agent").checksum or ""
        made_run(tmp_path / "run", {"url": url}, checksum)
        assert make_bundle(tmp_path / "run", tmp_path / "out").url == url
        with Agent.open(tmp_path / "out") as agent:
            assert agent.search("mayor of Bel")[0].id == "p2"
    made_run(tmp_path / "secret", {"url": "https://host/?key=0123456789abcdef"}, "https://host/?key=***")
    made = make_bundle(tmp_path / "secret", tmp_path / "no-key")
    assert (made.url, made.checksum) == (None, None)
    assert "0123456789abcdef" not in "".join((tmp_path / "no-key" / n).read_text() for n in ("agent.json", "README.md"))


# Bad input


def spoil(**changes: Any) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        told = json.loads((directory / "agent.json").read_text())
        (directory / "agent.json").write_text(json.dumps(told | changes))

    return write


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda d: (d / "agent.json").unlink(), r"copy: not a bundle \(no agent.json\); make one with `search-e1 bundle"),
        (lambda d: (d / "agent.json").write_text("{"), "agent.json: not the description of a bundle"),
        (lambda d: (d / "agent.json").write_text("[" * 10**5), "agent.json: not the description of a bundle"),
        (lambda d: (d / "agent.json").write_bytes(b"\xff\xfe"), "agent.json: not the description of a bundle"),
        (lambda d: (d / "agent.json").write_text("[]"), "agent.json: not the description of a bundle"),
        (spoil(format=2), "agent.json: a bundle of format 2, but this version reads 1"),
        (spoil(limits={"topk": 0}), "agent.json: limits.topk: Input should be greater than 0"),
        (spoil(weights={}), "agent.json: names no weights"),
        (spoil(weights={"../x": 1}), "agent.json: names '../x', which is not in the bundle; do not use this bundle"),
        (spoil(index=["../../run/index/bm25"]), "names '../../run/index/bm25', which is not in the bundle"),
        (spoil(index=["/etc"]), "names '/etc', which is not in the bundle"),
        (spoil(index=["index/none"]), "its index 'index/none' is missing; give --index DIR"),
        (spoil(checksum="0" * 64), r"copy/index: an index of other passages or settings than the bundle's"),
        (spoil(dtype="int8"), "agent.json: dtype: Input should be"),
        (lambda d: (d / "model.safetensors").unlink(), "model.safetensors: missing; copy or download the whole bundle"),
        (lambda d: (d / "model.safetensors").write_bytes(b"version https://git-lfs"), "23 bytes long, not "),
        (lambda d: (d / "tokenizer_config.json").unlink(), "no tokenizer_config.json in it"),
        (lambda d: (d / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda d: (d / "index" / "bm25" / "passages.jsonl").unlink(), "a damaged index .passages.jsonl is missing"),
    ],
)
def test_a_damaged_bundle_is_one_line(damage: Callable[[Path], Any], said: str, bundle: Path) -> None:
    damage(bundle)
    with pytest.raises(SearchE1Error, match=said) as error:
        Agent.open(bundle)
    assert "\n" not in str(error.value)


def test_a_reward_that_a_bundle_names_is_not_imported(bundle: Path) -> None:
    told = json.loads((bundle / "agent.json").read_text())
    spoil(limits=told["limits"] | {"reward": "no_such_module:run"})(bundle)
    with Agent.open(bundle) as agent:
        assert agent.ask("capital of Arda?").trajectory.turns


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("RUN",), "no directory for the bundle; give --out DIR"),
        (("RUN", "--out", "RUN/agent"), "already exists; remove it, or give another directory"),
        (("RUN", "--out", "OUT", "--policy", "grpo-9"), "no policy 'grpo-9'; known: base, grpo-1"),
        (("RUN", "--out", "OUT", "--policy", "../grpo-1"), "no policy '../grpo-1'; known: base, grpo-1"),
        (("RUN", "--out", "OUT", "--private"), "--private needs --push OWNER/NAME; give both"),
        (("RUN", "--out", "OUT", "--url", "http://x"), "give --no-index with it"),
        (("RUN", "--out", "OUT", "--no-index", "--index", "x"), "--index and --no-index exclude each other; give one of them"),
        (
            ("RUN", "--out", "OUT", "--index", "none"),
            "none: the index that the run searched is gone; give its current directory",
        ),
        (("RUN/agent", "--out", "OUT"), "is a bundle; it can only be pushed: --push"),
        (("OUT", "--out", "OUT/agent"), "no run with an evaluated policy (no summary.json)"),
        (("RUN", "--out", "OUT", "--push", "a/b/c"), "'a/b/c' cannot be the name of a repository; give OWNER/NAME"),
        (("RUN", "--out", "OUT", "--push", "name"), "'name' is not a valid name on the Hub; give OWNER/NAME"),
        (("RUN", "--out", "OUT", "--push", "me/agent"), "no Hub token found; run `hf auth login`, or set HF_TOKEN"),
    ],
)
def test_the_verb_refuses_in_one_line(
    words: tuple[str, ...], said: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(publish, "get_token", lambda: None)
    given = [word.replace("RUN", str(run)).replace("OUT", str(tmp_path / "out")) for word in words]
    monkeypatch.setattr(sys, "argv", ["search-e1", "bundle", *given])
    with pytest.raises(SystemExit) as left:
        cli.main()
    err = capsys.readouterr().err
    assert (left.value.code, len(err.splitlines())) == (2, 1)
    assert said in err
    assert not list(tmp_path.iterdir())


def test_damaged_runs_are_one_line(run: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    weights = copied / "grpo-1" / "policy" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(RunError, match=r"model.safetensors: damaged; remove .*grpo-1 and run the stage again"):
        make_bundle(copied, tmp_path / "out")
    (copied / "summary.json").write_text("{")
    with pytest.raises(RunError, match=r"config.json or summary.json cannot be read"):
        make_bundle(copied, tmp_path / "out")
    shutil.rmtree(copied / "index")
    (copied / "summary.json").write_text((run / "summary.json").read_text())
    with pytest.raises(RunError, match="the index that the run searched is gone; give its current directory with --index DIR"):
        make_bundle(copied, tmp_path / "out", stage="base")


def test_a_modelfile_has_the_prompt_of_training_and_says_what_is_lost(run: Path, tmp_path: Path) -> None:
    make_bundle(run, tmp_path / "out", modelfile=True)
    lines = (tmp_path / "out" / "Modelfile").read_text().splitlines()
    assert "has no retrieval: the model writes a search, and nothing answers it" in lines[0]
    assert [line for line in lines if not line.startswith("#")] == [
        "FROM .", "PARAMETER temperature 0", "PARAMETER num_ctx 300", "PARAMETER num_predict 24", 'PARAMETER stop "</search>"',
        'PARAMETER stop "</answer>"', 'TEMPLATE """Question: {{ .Prompt }}', '"""',
    ]  # fmt: skip


# The Hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory of a Hub on the loopback, which everything here goes to."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with fake_hub.serve(tmp_path / "hub") as address:
        told = {
            "ENDPOINT": address, "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False, "HF_HUB_CACHE": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": True,
        }  # fmt: skip
        for name, value in told.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        yield tmp_path / "hub"


def test_a_bundle_is_pushed_to_the_hub_and_opened_from_there(run: Path, hub: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    question, agent = "capital of Arda?", str(run / "agent")
    bare = str(make_bundle(run, tmp_path / "bare", searched=Searched(copied=False)).directory)
    push, ask = ("--push", "me/agent"), ("ask", question, "--agent", "me/agent", "--json")
    commands = [
        ("hf_nobody", ("bundle", agent, *push)),
        (fake_hub.READER, ("bundle", agent, *push)),
        (None, ask),
        (fake_hub.WRITER, ("bundle", agent, *push, "--private")),
        (None, ask),
        (fake_hub.READER, ask),
        (fake_hub.WRITER, ("bundle", bare, *push)),
    ]
    said = []
    for token, words in commands:
        monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN", raising=False)
        said.append(command(monkeypatch, capsys, *words))
    unknown, no_right, missing, pushed, closed, opened, again = said
    for (status, _, err), line in (
        (unknown, "me/agent: your token is not valid (401)"),
        (no_right, "me/agent: your token does not permit this (403)"),
        (missing, "me/agent: neither a directory nor found on the Hub, or not accessible to you"),
        (closed, "me/agent: not found, or your token is not valid (401)"),
    ):
        assert (status, len(err.splitlines())) == (2, 1)
        assert line in err
    assert (pushed[0], opened[0], again[0]) == (0, 0, 0)
    assert "pushes the texts of 5 passages too" in pushed[1]
    with Agent.open(agent) as local:
        assert json.loads(opened[1]) == json.loads(json.dumps(local.ask(question).as_json()))
    files = [name for name in listing(Path(bare)) if (Path(bare) / name).is_file()]
    assert [name for name in listing(hub) if (hub / name).is_file()] == files  # no passages are left


def test_a_dead_hub_is_one_line(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(publish, "get_token", lambda: "hf_x")
    with pytest.raises(DataError, match=r"me/agent: not here, and the Hub cannot be reached; give the directory") as error:
        Agent.open("me/agent")
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=r"me/agent: the Hub cannot be reached \(.*\); push it again") as error:
        publish.push(Bundle.read(run / "agent"), "me/agent")
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="nothing: no such directory; give a bundle's"):
        Agent.open("nothing")
