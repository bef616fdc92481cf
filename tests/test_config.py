import sys
from pathlib import Path

import pytest

from search_e1.cli import main as cli
from search_e1.config import Config, TrainingConfig, load, migrate_fingerprint, parse_overrides
from search_e1.errors import ConfigError

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.toml"))
MINIMAL = """
run = "runs/x"
[policy]
model = "small"
[data]
corpus = "corpus.jsonl"
train = ["train.jsonl"]
eval = { nq = "nq.jsonl" }
"""


def written(tmp_path: Path, text: str = MINIMAL) -> Path:
    path = tmp_path / "c.toml"
    path.write_text(text)
    return path


def refusal(tmp_path: Path, *overrides: str, text: str = MINIMAL) -> str:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_checked_in_config_loads(path: Path) -> None:
    assert isinstance(load(path), Config)


def test_there_are_configs_to_load() -> None:
    assert "quickstart.toml" in [path.name for path in CONFIGS]


def test_defaults_are_those_of_the_paper(tmp_path: Path) -> None:
    config = load(written(tmp_path))
    assert config.rounds == 2
    assert (config.rollout.max_searches, config.rollout.topk) == (4, 3)
    assert (config.rollout.max_action_tokens, config.rollout.max_observation_tokens, config.rollout.max_tokens) == (
        500,
        500,
        4096,
    )
    assert (config.grpo.group_size, config.grpo.learning_rate) == (5, 1e-6)
    assert (config.distill.tau, config.distill.clip, config.distill.teacher_temperature) == (10.0, "entry", 1.0)
    assert config.data.eval == {"nq": Path("nq.jsonl")}


@pytest.mark.parametrize(("ofsd", "rounds"), [("every_round", [1, 2, 3]), ("last_round", [3]), ("never", [])])
def test_rounds_that_distill(tmp_path: Path, ofsd: str, rounds: list[int]) -> None:
    config = load(written(tmp_path), ["--ofsd", ofsd, "--rounds", "3"])
    assert [round for round in (1, 2, 3) if config.distills(round)] == rounds
    assert config.distillations == len(rounds)


def test_a_run_that_would_do_nothing_is_refused(tmp_path: Path) -> None:
    assert "leave nothing to do" in refusal(tmp_path, "--ofsd", "never", "--grpo.steps", "0")


def test_a_preset_lies_under_the_file_and_the_flags(tmp_path: Path) -> None:
    plain = load(written(tmp_path))
    assert (plain.ofsd, plain.pairs.students, plain.pairs.students_by) == ("every_round", 1, "wrong_first")
    path = written(tmp_path, f'preset = "concise"\n{MINIMAL}[pool]\ngroup_size = 2\n')
    config = load(path, ["--pairs.students", "3"])
    assert (config.ofsd, config.pairs.students, config.pairs.students_by) == ("first_round", 3, "any")
    assert config.pool.group_size == 2
    assert Config.model_validate_json(config.model_dump_json()) == config
    assert load(path, ["--preset", "search-e1", "--pool.group_size", "8"]) == plain
    assert load(written(tmp_path), ["--preset", "concise"]).fingerprint() != plain.fingerprint()
    harmless = load(written(tmp_path), ["--preset", "harmless", "--distill.merge.questions", "50"])
    assert (harmless.distill.teachers, harmless.distill.merge.strengths[0], harmless.distill.merge.questions) == (
        "verified",
        0.0,
        50,
    )
    with pytest.raises(ConfigError, match=r"preset = 'fast': Input should be 'search-e1', 'concise' or 'harmless'"):
        load(path, ["--preset", "fast"])
    with pytest.raises(ConfigError, match=r"preset = \['concise'\]: "):
        load(path, ["--preset", '["concise"]'])


def test_flags_lie_over_the_file(tmp_path: Path) -> None:
    config = load(
        written(tmp_path),
        [
            "--grpo.steps",
            "8",
            "--grpo.lora.rank=4",
            "--data.eval.popqa=p.jsonl",
            "--policy.model",
            "org/name",
            "--lead.enforce=false",
        ],
    )
    assert config.grpo.steps == 8
    assert config.grpo.lora is not None
    assert config.grpo.lora.rank == 4
    assert config.data.eval == {"nq": Path("nq.jsonl"), "popqa": Path("p.jsonl")}
    assert config.policy.model == "org/name"
    assert config.lead.enforce is False
    assert load(written(tmp_path)).grpo.lora is None


@pytest.mark.parametrize(
    ("flags", "parsed"),
    [
        ([], []),
        (["--a.b", "1"], [(["a", "b"], 1)]),
        (["--a=1e-3"], [(["a"], 1e-3)]),
        (["--a", "true", "--b", "[1, 2]"], [(["a"], True), (["b"], [1, 2])]),
        (["--a=x=y"], [(["a"], "x=y")]),
        (["--a="], [(["a"], "")]),
        (["--a", "-1"], [(["a"], -1)]),
        (["--a", "nq.jsonl"], [(["a"], "nq.jsonl")]),
        (["--a", '"1"'], [(["a"], "1")]),
        (["--a=--b"], [(["a"], "--b")]),
    ],
)
def test_flags_are_read_as_toml_or_text(flags: list[str], parsed: list[tuple[list[str], object]]) -> None:
    assert parse_overrides(flags) == parsed


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["steps", "8"], "unexpected argument 'steps'; overrides are written --section.key value"),
        (["--a"], "--a: a value is missing; write --a VALUE"),
        (["--a", "--b", "1"], "--a: a value is missing"),
    ],
)
def test_broken_flags_are_refused(flags: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_overrides(flags)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("--grpo.stepz=8", "unknown key 'grpo.stepz'; did you mean 'grpo.steps'?"),
        ("--gropo.steps=8", "unknown key 'gropo'; did you mean 'grpo'?"),
        ("--grpo.lora.rnk=8", "unknown key 'grpo.lora.rnk'; did you mean 'grpo.lora.rank'?"),
        ("--rollout.zzz=8", "unknown key 'rollout.zzz'; known: ['max_searches', "),
        ("--grpo.steps=many", "grpo.steps = 'many': Input should be a valid integer"),
        ("--grpo.steps=-1", "grpo.steps = -1: Input should be greater than or equal to 0"),
        ("--grpo.group_size=1", "grpo.group_size = 1: Input should be greater than or equal to 2"),
        ("--distill.clip=some", "distill.clip = 'some': Input should be 'entry', 'token' or 'none'"),
        ("--distill.training.logits_mib=0", "distill.training.logits_mib = 0: Input should be greater than 0"),
        (
            "--distill.class_weights.tag=-1",
            "distill.class_weights.tag = -1: Input should be greater than or equal to 0",
        ),
        ("--distill.beta=1", "distill.beta = 1: Input should be less than 1"),
        ("--data.train=[]", "data.train = []: "),
        ("--lead.max_share=2", "lead.max_share = 2: Input should be less than or equal to 1"),
        ("--grpo.steps=true", "grpo.steps = True: true or false, where something else is needed"),
        ("--retrieval.encoder={model = 'e', max_length = true}", "retrieval.encoder.max_length = True: true or false"),
        ("--run=", "run = '': an empty path, which would be the working directory"),
        ("--data.eval.nq.x=1", "--data.eval.nq.x: data.eval.nq is a value, not a section"),
        ("--data.eval={a = {b = 1}}", "data.eval.a = {'b': 1}: "),
        (
            "--coldstart.training.optimiser=adamw",
            "unknown key 'coldstart.training.optimiser'; did you mean 'coldstart.training.",
        ),
        ("--grpo.trainer.steps=1", "unknown key 'grpo.trainer'; "),
        ("--run.x=2", "--run.x: run is a value, not a section"),
        ('--prompts.instruction="no field"', "prompts.instruction = 'no field': the template lacks {question}"),
    ],
)
def test_a_bad_key_or_value_is_named(tmp_path: Path, override: str, says: str) -> None:
    assert refusal(tmp_path, override).removeprefix("command line: ").startswith(says)


@pytest.mark.parametrize("key", ["grpo.training.optimiser", "grpo.trainer.adam_beta2", "distill.training.warmpu"])
@pytest.mark.parametrize("verb", ["train", "grpo", "evaluate", "doctor"])
def test_a_misspelt_key_is_refused_before_any_work(tmp_path: Path, monkeypatch, capsys, verb: str, key: str) -> None:
    path = written(tmp_path, MINIMAL.replace("runs/x", str(tmp_path / "run")))
    monkeypatch.setattr(sys, "argv", ["search-e1", verb, "--config", str(path), f"--{key}", "1"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    [line] = capsys.readouterr().err.splitlines()
    assert (left.value.code, line.startswith(f"search-e1: command line: unknown key '{key.rpartition('.')[0]}")) == (2, True)
    assert not (tmp_path / "run").exists()


def test_some_class_has_a_weight(tmp_path: Path) -> None:
    flags = [f"--distill.class_weights.{name}=0" for name in ("thought", "search", "answer", "tag")]
    assert "all weights are 0, so nothing would be distilled" in refusal(tmp_path, *flags)


def test_beta_belongs_to_js(tmp_path: Path) -> None:
    assert load(written(tmp_path), ["--distill.divergence=js", "--distill.beta=0.2"]).distill.beta == 0.2
    assert 'beta = 0.2 belongs to divergence = "js", not to "forward_kl"' in refusal(tmp_path, "--distill.beta=0.2")


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    assert refusal(tmp_path, text=MINIMAL.replace('model = "small"', "")) == "key 'policy.model' is missing"
    assert refusal(tmp_path, text=MINIMAL.replace('run = "runs/x"', "")) == "key 'run' is missing"
    assert refusal(tmp_path, "--rundir=x", text=MINIMAL.replace('run = "runs/x"', "")).endswith("(and 1 more)")


def test_passages_come_from_somewhere_and_from_one_place(tmp_path: Path) -> None:
    without = MINIMAL.replace('corpus = "corpus.jsonl"', "")
    assert refusal(tmp_path, text=without).startswith("no passages: give data.corpus, retrieval.index or retrieval.url")
    assert load(written(tmp_path, without), ["--retrieval.url=http://x"]).retrieval.url == "http://x"
    both = refusal(tmp_path, "--retrieval.url=http://x", "--retrieval.index=i")
    assert "give index or url, not both" in both


def test_what_is_no_toml_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, text="run = ").startswith("not TOML: ")
    (tmp_path / "c.toml").write_bytes(b"run = '\xff'")
    with pytest.raises(ConfigError, match="not TOML"):
        load(tmp_path / "c.toml")
    assert refusal(tmp_path, text="a = " + "[" * 5000) == "not TOML: nested too deeply"
    assert refusal(tmp_path, text="a = " + "1" * 5000).startswith("not TOML: ")
    with pytest.raises(ConfigError, match="give the path of a TOML file with --config"):
        load(tmp_path)


def test_a_file_that_is_missing_is_looked_for_nearby(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def said(path: str) -> str:
        with pytest.raises(ConfigError) as error:
            load(path)
        assert error.value.__cause__ is None
        assert error.value.__suppress_context__
        return str(error.value)

    assert said("mine.toml") == "mine.toml: no such file; give the path of a TOML file with --config"
    (tmp_path / "configs").mkdir()
    for name in ("mine", "qwen", "real", "small", "world", "large"):
        (tmp_path / "configs" / f"{name}.toml").touch()
    assert said("mine.toml") == "mine.toml: no such file; did you mean configs/mine.toml?"
    assert said("configs/smal.toml").endswith("did you mean configs/small.toml?")
    assert said("x").endswith(
        "TOML files here: configs/large.toml, configs/mine.toml, configs/qwen.toml, configs/real.toml and 2 more"
    )


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path) -> None:
    assert load(written(tmp_path, f"\ufeff{MINIMAL}")) == load(written(tmp_path))


def test_a_bad_value_is_blamed_on_its_source(tmp_path: Path) -> None:
    text, path = MINIMAL + "[pairs]\nstudents = 0\n", str(tmp_path / "c.toml")
    for source, overrides in ((path, ["--grpo.steps", "8"]), ("command line", ["--pairs.students", "0"])):
        with pytest.raises(ConfigError) as caught:
            load(written(tmp_path, text), overrides)
        assert str(caught.value) == f"{source}: pairs.students = 0: Input should be greater than 0"
    assert refusal(tmp_path, "--grpo.lora", "{rank = 0}").startswith("command line: grpo.lora.rank = 0: ")


@pytest.mark.parametrize("text", ["2025-11-28", "2025-11-28T10:00:00", "10:00:00", "1e5", "0x10", "7", "true", "nan", "1 # 2"])
def test_a_flag_is_text_where_its_key_takes_texts(tmp_path: Path, text: str) -> None:
    flags = ["--run", text, f"--policy.model={text}", f"--data.eval.nq={text}", f"--data.train={text}"]
    config = load(written(tmp_path), [*flags, "--grpo.steps", "0x10"])
    assert (config.run, config.policy.model, config.data.eval["nq"]) == (Path(text), text, Path(text))
    assert config.data.train == (Path(text),)
    assert config.grpo.steps == 16


def test_text_of_several_lines_is_one_value(tmp_path: Path) -> None:
    assert load(written(tmp_path), ["--policy.model", "1\nrun = 2"]).policy.model == "1\nrun = 2"


def test_in_a_file_a_text_has_quotes(tmp_path: Path) -> None:
    said = refusal(tmp_path, text=MINIMAL.replace('"runs/x"', "2025-11-28"))
    assert said == "run = datetime.date(2025, 11, 28): Input is not a valid path for <class 'pathlib.Path'>; write it in quotes"


def test_training_has_the_same_keys_in_every_stage_and_defaults_of_its_own(tmp_path: Path) -> None:
    text = MINIMAL + "[grpo.training]\nbetas = [0.9, 0.95]\n[distill.training]\nwarmup = 0.1\n[coldstart]\n"
    config = load(written(tmp_path, text), ["--grpo.training.micro_batch_tokens", "512"])
    assert config.coldstart
    sections = (config.grpo.training, config.distill.training, config.coldstart.training)
    assert [set(type(section).model_fields) for section in sections] == [set(TrainingConfig.model_fields)] * 3
    assert [section.schedule for section in sections] == ["constant", "linear", "linear"]
    assert [section.optimizer for section in sections] == ["adamw", "adamw", "adamw"]
    assert [section.warmup for section in sections] == [0.0, 0.1, 0.05]
    assert [section.betas for section in sections] == [(0.9, 0.95), (0.9, 0.999), (0.9, 0.95)]
    assert [section.micro_batch_tokens for section in sections] == [512, None, None]
    assert "grpo.training.max_grad_norm = 0.0: Input" in refusal(tmp_path, "--grpo.training.max_grad_norm=0.0")
    assert load(written(tmp_path), ["--grpo.training.max_grad_norm=inf"]).grpo.training.max_grad_norm == float("inf")


def test_what_changes_nothing_in_a_run_does_not_bind_it(tmp_path: Path) -> None:
    path = written(tmp_path)
    plain = load(path).fingerprint()
    flags = ["--run=other", "--tracking.project=x", "--checkpoints.share=1", "--parallel.sharding=fsdp2"]
    assert load(path, flags).fingerprint() == plain
    assert load(path, ["--distill.training.micro_batch_tokens=64"]).fingerprint() != plain
    assert migrate_fingerprint(plain) == plain
    assert migrate_fingerprint({**plain, "parallel": {"sharding": "none"}}) == plain
    assert migrate_fingerprint({"unknown": 1}) == {"unknown": 1}


def test_a_config_does_not_change_and_survives_json(tmp_path: Path) -> None:
    config = load(written(tmp_path))
    with pytest.raises(ValueError, match="frozen"):
        config.rounds = 3
    assert Config.model_validate_json(config.model_dump_json()) == config


def test_one_training_file_needs_no_list(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        'run = "r"\n[policy]\nmodel = "small"\n[data]\ncorpus = "c"\ntrain = "a.jsonl"\n[data.eval]\nb = "b.jsonl"\n'
    )
    assert load(path).data.train == (Path("a.jsonl"),)
    assert load(path, ["--data.train", "x.jsonl"]).data.train == (Path("x.jsonl"),)
    with pytest.raises(ConfigError, match=r"data\.train"):
        load(path, ["--data.train", "[]"])
