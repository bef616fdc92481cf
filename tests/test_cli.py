"""What a user's mistakes look like from outside: one line, status 2, and nothing that was there is touched."""

import json
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

from search_e1.cli import main as cli
from serving import misbehaving


def run(monkeypatch, capsys, *words: object) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of ``search-e1 words``."""
    monkeypatch.setattr(sys, "argv", ["search-e1", *map(str, words)])
    try:
        cli.main()
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


QUESTION = {"id": "q1", "question": "Where does Ann live?", "golden_answers": ["Oslo"]}
PASSAGES = (
    {"id": "0", "contents": '"Ann"\nAnn lives in Oslo.'},
    {"id": "1", "contents": '"Bob"\nBob lives in Rome.'},
)


@pytest.fixture
def project(tmp_path):
    """A config of one training question over two passages, with the package's own policy."""
    jsonl(tmp_path / "corpus.jsonl", *PASSAGES)
    jsonl(tmp_path / "train.jsonl", QUESTION)
    jsonl(tmp_path / "dev.jsonl", QUESTION)
    (tmp_path / "config.toml").write_text(
        f'''
run = "{tmp_path}/run"
rounds = 1
policy.model = "small"
data.corpus = "{tmp_path}/corpus.jsonl"
data.train = ["{tmp_path}/train.jsonl"]
data.eval = {{ dev = "{tmp_path}/dev.jsonl" }}
grpo = {{ steps = 1, questions_per_step = 1, group_size = 2 }}
'''
    )
    return tmp_path


def test_an_interruption_is_one_line(project, monkeypatch, capsys):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("search_e1.config.load", interrupted)
    status, _, told = run(monkeypatch, capsys, "doctor", project / "config.toml")
    assert (status, told) == (130, "search-e1: interrupted; run the same command again to resume\n")


def test_training_says_in_one_line_what_it_computes_in(project, monkeypatch, capsys):
    for flags, trained in (((), "all weights, in float32"), (("--grpo.lora.rank", 2), "adapters, in float32")):
        words = (
            "grpo",
            "--config",
            project / "config.toml",
            "--policy.dtype",
            "bfloat16",
            "--rollout.max_action_tokens",
            16,
            *flags,
        )
        status, _, err = run(monkeypatch, capsys, *words, "--run", project / f"run-{len(flags)}")
        assert (status, err) == (0, f"computes in bfloat16 (policy.dtype = bfloat16); trains {trained}\n")


def test_help_needs_no_torch():
    code = """
import sys
sys.argv = ["search-e1", "--help"]
from search_e1.cli import main as cli
try:
    cli.main()
except SystemExit:
    pass
assert not {"torch", "transformers", "trl"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "Usage" in done.stdout


MISTAKES = {
    "misspelt key": (["--grpo.stepz", "3"], r"unknown key 'grpo.stepz'; did you mean 'grpo.steps'?"),
    "unknown section": (["--gpro.steps", "3"], "unknown key 'gpro'; did you mean 'grpo'?"),
    "impossible value": (["--grpo.group_size", "1"], "grpo.group_size = 1: Input should be greater than or equal to 2"),
    "no value": (["--seed"], "--seed: a value is missing"),
    "a stray word": (["seed"], "two configs: "),
    "model is no directory": (["--policy.model", "./nothing"], "policy.model = './nothing': no such directory"),
    "no corpus file": (["--data.corpus", "nothing.jsonl"], "data.corpus = 'nothing.jsonl': no such file"),
    "no question file": (["--data.train", '["nothing.jsonl"]'], "nothing.jsonl"),
    "dead retriever": (
        ["--retrieval.url", "http://127.0.0.1:9", "--retrieval.attempts", "1", "--retrieval.timeout", "1"],
        "http://127.0.0.1:9",
    ),
    "context too short": (["--rollout.max_tokens", "4"], "raise rollout.max_tokens"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_config_is_one_line(project, monkeypatch, capsys, mistake):
    flags, said = MISTAKES[mistake]
    status, _, err = run(monkeypatch, capsys, "train", "--config", project / "config.toml", *flags)
    assert status == 2
    assert said in err
    assert len(err.splitlines()) == 1, err
    assert not list(project.glob("run/*grpo*"))


FILES = {
    "corpus not JSON": ("corpus.jsonl", "{nonsense", "corpus.jsonl:1"),
    "corpus without contents": ("corpus.jsonl", {"id": "7"}, "corpus.jsonl:1"),
    "empty corpus": ("corpus.jsonl", None, "corpus.jsonl"),
    "question not JSON": ("train.jsonl", "{nonsense", "train.jsonl:1"),
    "question without answers": ("train.jsonl", {**QUESTION, "golden_answers": []}, "train.jsonl:1"),
    "question lacks a field": ("dev.jsonl", {"id": "q", "golden_answers": ["x"]}, "dev.jsonl:1"),
    "no questions": ("dev.jsonl", None, "dev.jsonl"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_mistake_in_a_file_names_file_and_line(project, monkeypatch, capsys, case):
    name, content, said = FILES[case]
    jsonl(project / name, *([] if content is None else [content]))
    status, _, err = run(monkeypatch, capsys, "train", "--config", project / "config.toml")
    assert status == 2
    assert said in err
    assert len(err.splitlines()) == 1, err


def test_a_duplicate_id_names_both_lines(project, monkeypatch, capsys):
    jsonl(project / "train.jsonl", QUESTION, {**QUESTION, "id": "q2"}, QUESTION)
    status, _, err = run(monkeypatch, capsys, "train", "--config", project / "config.toml")
    assert status == 2
    assert "train.jsonl:3" in err
    assert "q1" in err


def test_a_stage_before_its_time_is_refused(project, monkeypatch, capsys):
    for words, missing in (
        (("pairs", "mine"), "grpo-1"),
        (("pairs", "mine", "--policy", "small"), "pool-1"),
        (("lead", "--policy", "small"), "pairs-1"),
        (("distill", "--policy", "small"), "pairs-1"),
    ):
        status, _, err = run(monkeypatch, capsys, *words, "--config", project / "config.toml")
        assert status == 2
        assert f"{missing}: does not exist yet; run its stage first, or name another artifact\n" in err
        assert len(err.splitlines()) == 1
    for words in (("grpo", "--round", 2), ("rollout", "--round", 2, "--grpo.steps", 0)):
        status, _, err = run(monkeypatch, capsys, *words, "--config", project / "config.toml")
        assert status == 2
        assert "round 1 does not exist yet; run its stages first, or give --policy\n" in err
    assert not [path for path in (project / "run").iterdir() if path.is_dir()]


def test_a_missing_config_is_one_line(monkeypatch, capsys):
    for words in (("train", "--config", "none/of.toml"), ("train", "none/of.toml"), ("lead", "--seed", 1, "none/of.toml")):
        status, _, err = run(monkeypatch, capsys, *words)
        assert status == 2
        assert err.startswith("search-e1: none/of.toml: no such file; ")
        assert len(err.splitlines()) == 1
    assert run(monkeypatch, capsys, "grpo", "--seed", 1)[::2] == (
        2,
        "search-e1: no config; give a TOML file: search-e1 grpo mine.toml\n",
    )


CONFIG_FORMS = {
    "an option": ("--config", "{c}", "--seed", "7"),
    "first": ("{c}", "--seed", "7"),
    "last": ("--seed", "7", "{c}"),
    "an option in one word": ("--config={c}", "--retrieval.url=http://x//y", "--seed", "-7"),
    "after an override in one word": ("--seed=7", "{c}"),
    "between": ("--seed", "7", "{c}", "--grpo.steps", "0"),
    "beside an option of the verb": ("--seed", "7", "--gpu", "h100", "{c}"),
}


@pytest.mark.parametrize("form", CONFIG_FORMS)
def test_the_config_may_stand_anywhere(project, monkeypatch, capsys, form):
    """What is loaded: the file, with the overrides in their order and as they were written."""
    seen = []
    monkeypatch.setattr("search_e1.config.load", lambda path, words: seen.append((path, list(words))) or sys.exit(5))
    words = [word.format(c=project / "config.toml") for word in CONFIG_FORMS[form]]
    gpu = () if "--gpu" in words else ("--gpu", "h100")
    assert run(monkeypatch, capsys, "plan", *words, *gpu)[0] == 5
    left = [word for word in words if "config" not in word and word not in ("--gpu", "h100")]
    assert seen == [(project / "config.toml", left)]


def test_two_configs_are_one_line(project, monkeypatch, capsys):
    config = project / "config.toml"
    assert run(monkeypatch, capsys, "evaluate", "mine.toml", "--config", config)[2] == (
        f"search-e1: two configs: mine.toml and {config}; give one, and overrides as --section.key VALUE\n"
    )
    assert run(monkeypatch, capsys, "train", config, "mine.toml")[2].startswith(
        f"search-e1: two configs: {config} and mine.toml; "
    )


@pytest.mark.parametrize(
    "verb", ["train", "coldstart", "grpo", "rollout", "pairs", "pairs mine", "lead", "distill", "evaluate", "doctor"]
)
def test_every_verb_takes_the_config_as_a_word(tmp_path, monkeypatch, capsys, verb):
    (tmp_path / "empty.toml").touch()
    status, _, err = run(monkeypatch, capsys, *verb.split(), tmp_path / "empty.toml")
    assert (status, "empty.toml: key" in err, "is missing" in err) == (2, True, True)
    # Rich breaks lines at the width of the terminal, and colors words.
    monkeypatch.setenv("COLUMNS", "100")
    status, out, _ = run(monkeypatch, capsys, *(verb if verb != "pairs" else "pairs mine").split(), "--help")
    assert (status, "CONFIG" in out, "every key can be set as" in out.lower()) == (0, True, True)


def test_the_version_is_the_package_s(monkeypatch, capsys):
    from importlib.metadata import version

    code = "import sys, search_e1; print(search_e1.__version__); assert not {'torch', 'pydantic', 'numpy'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == f"{version('search-e1')}\n"
    assert run(monkeypatch, capsys, "--version")[:2] == (0, f"search-e1 {version('search-e1')}\n")


def test_a_traceback_only_when_asked_for(project, monkeypatch, capsys):
    from search_e1.errors import ConfigError

    monkeypatch.setattr(sys, "argv", ["search-e1", "--traceback", "train", "--config", "nothing.toml"])
    with pytest.raises(ConfigError) as raised:
        cli.main()
    shown = "".join(traceback.format_exception(raised.value))
    assert "FileNotFoundError" in shown  # what the error was made of, which Python does not show by itself


def test_ask_says_what_is_missing(monkeypatch, capsys):
    assert (
        run(monkeypatch, capsys, "ask", "Who?")[2]
        == "search-e1: no policy; give --agent DIR, --model DIR, --endpoint URL, or --config FILE of a run\n"
    )
    assert "no passages" in run(monkeypatch, capsys, "ask", "Who?", "--model", "small")[2]
    assert "the question is empty" in run(monkeypatch, capsys, "ask", " ", "--model", "small")[2]


def test_index_build_and_search(project, monkeypatch, capsys):
    index = project / "index"
    assert run(monkeypatch, capsys, "index", "build", "--corpus", project / "corpus.jsonl", "--out", index)[0] == 0
    status, out, _ = run(monkeypatch, capsys, "index", "search", "where does Bob live", "--index", index, "--topk", 1)
    assert status == 0
    assert "Bob lives in Rome." in out
    assert "Oslo" not in out
    status, _, err = run(monkeypatch, capsys, "index", "build", "--corpus", project / "corpus.jsonl", "--out", index)
    assert status == 2
    assert "already exists" in err


def test_some_benchmarks_are_evaluated(project, monkeypatch, capsys):
    """With retrieval recall: Oslo is in a passage; nothing says Atlantis."""
    monkeypatch.setenv("COLUMNS", "80")
    jsonl(project / "other.jsonl", QUESTION, {**QUESTION, "id": "q2", "golden_answers": ["Atlantis"]})
    both = f'{{ dev = "{project}/dev.jsonl", other = "{project}/other.jsonl" }}'
    words = ["evaluate", "--config", project / "config.toml", "--data.eval", both, "--rollout.max_action_tokens", 8]
    status, _, err = run(monkeypatch, capsys, *words, "--benchmark", "othr")
    assert (status, err) == (2, "search-e1: no benchmark 'othr' in data.eval; did you mean 'other'?\n")
    status, out, err = run(monkeypatch, capsys, *words, "--benchmark", "other")
    assert status == 0, err
    assert max(map(len, out.splitlines()[:-1])) <= 80
    made = project / "run" / "evaluation-base-other"
    assert out.splitlines()[-1] == str(made)
    rows = [json.loads(line) for line in (made / "questions.jsonl").read_text().splitlines()]
    assert [(row["id"], row["in_topk"], row["in_corpus"]) for row in rows] == [("q1", True, True), ("q2", False, False)]
    assert json.loads((made / "evaluation.json").read_text())["answerable"] == 1
    assert rows[1]["failure"] == "not_in_corpus"
    status, out, _ = run(monkeypatch, capsys, "compare", made, f"again={made}")
    assert status == 0
    assert "other (2 questions)" in out


def test_an_endpoint_is_evaluated_and_marked(project, monkeypatch, capsys):
    monkeypatch.setenv("SEARCH_E1_API_KEY", "sk-secret")
    completion = {"choices": [{"message": {"content": "<answer>Oslo"}, "finish_reason": "stop"}]}
    words = ["evaluate", "--config", project / "config.toml", "--endpoint-model", "org/model"]
    with misbehaving(lambda request, number: (200, json.dumps(completion).encode())) as server:
        status, _, err = run(monkeypatch, capsys, *words, "--endpoint", server.url)
    assert status == 0, err
    made = project / "run" / "evaluation-org-model"
    assert json.loads((made / "evaluation.json").read_text())["em"] == 1.0
    inputs = json.loads((made / "manifest.json").read_text())["inputs"]
    assert inputs["endpoint"] == f"{server.url}/v1/chat/completions"
    assert (inputs["model"], inputs["ids"]) == ("org/model", "words of an endpoint, not trainable")
    assert "policy" not in inputs
    assert not [path for path in (project / "run").rglob("*") if path.is_file() and b"sk-secret" in path.read_bytes()]


def test_tools_that_a_chat_template_does_not_know_are_refused_before_the_work(project, monkeypatch, capsys):
    status, _, err = run(monkeypatch, capsys, "grpo", "--config", project / "config.toml", "--prompts.protocol", "tools")
    assert status == 2
    assert err == (
        'search-e1: prompts.protocol = "tools": the policy\'s chat template does not support tools; use another model, or '
        'protocol = "tags"\n'
    )
    assert not (project / "run" / "index").exists()


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("file", 'coldstart.demonstrations = "file": data.demonstrations is missing; give the path of that file'),
        ("endpoint", 'demonstrations = "endpoint" needs [coldstart.endpoint]; give its url and model'),
    ],
)
def test_a_cold_start_says_what_its_demonstrations_lack(project, monkeypatch, capsys, source, says):
    options = ("--coldstart.demonstrations", source, "--coldstart.steps", 1)
    status, _, err = run(monkeypatch, capsys, "coldstart", "--config", project / "config.toml", *options)
    assert status == 2
    assert err.endswith(f"{says}\n")
    assert err.count("\n") == 1


def test_the_docs_list_every_key(monkeypatch, capsys):
    status, out, _ = run(monkeypatch, capsys, "config")
    assert status == 0
    docs = Path(__file__).parent.parent / "docs" / "configuration.md"
    assert docs.read_text() == out, "run `search-e1 config > docs/configuration.md`"


def test_index_build_leaves_out_bad_lines_when_told_to(project, monkeypatch, capsys):
    corpus, index = project / "corpus.jsonl", project / "index"
    bad = len(corpus.read_text().splitlines()) + 1
    corpus.write_text(corpus.read_text() + "{broken\n")
    build = ("index", "build", "--corpus", corpus, "--out", index)
    status, _, err = run(monkeypatch, capsys, *build)
    assert (status, err.count("\n")) == (2, 1)
    assert f"{corpus}:{bad}: not JSON" in err
    assert not [path for path in project.iterdir() if "index" in path.name]
    status, out, _ = run(monkeypatch, capsys, *build, "--skip-bad-lines")
    assert status == 0
    assert f"1 records left out: 1 not JSON (first {corpus}:{bad})" in out
    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = run(monkeypatch, capsys, "index", "info", index)
    assert status == 0
    assert out.startswith(f"bm25 index, {bad - 1} passages, ")
    assert max(map(len, out.splitlines())) <= 80
    for word in ("k1", "0.9", "english", "passages.jsonl", "checksum"):
        assert word in out
    status, _, err = run(monkeypatch, capsys, "index", "info", project)
    assert (status, err.count("\n")) == (2, 1)
    assert "not an index" in err
