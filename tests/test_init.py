"""The first config: what it holds for a machine, and what is said to do next."""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import Qwen2Config

from search_e1.config import load
from search_e1.errors import ConfigError
from search_e1.lab import recipe
from search_e1.lab.plan.constants import Gpu, load_constants
from search_e1.lab.plan.plan import make_plan
from test_cli import run

RECIPE = recipe.Recipe(
    file="m.toml", machine="h100", run="runs/m", model="m", corpus="c", train="t", eval="e", small=False, questions_per_step=32
)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("# Oslo\nThe capital of Norway.\n")
    rows = [{"id": f"q{i}", "question": f"Who is {i}?", "golden_answers": ["Ada"]} for i in range(6)]
    (tmp_path / "faq.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "passages.jsonl").write_text('{"id": "1", "contents": "\\"Oslo\\"\\nA city."}\n')
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    return tmp_path


def commands(out: str) -> list[str]:
    return [line.strip() for line in out.partition("Next:")[2].splitlines() if line.strip()]


def test_a_folder_without_questions_on_a_laptop(here, monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "init", "--documents", "docs")
    assert code == 0
    assert commands(out) == [
        "python scripts/fetch_smollm2.py",
        "search-e1 data ingest docs --out mine-corpus",
        "search-e1 data questions --corpus mine-corpus --out mine-questions --by rule",
        "search-e1 doctor mine.toml",
        "search-e1 train mine.toml",
        "search-e1 serve runs/mine/agent",
    ]
    config = load(here / "mine.toml")
    assert config.policy.model == recipe.SMALL_MODEL
    assert config.data.train == (Path("mine-questions/train.jsonl"),)
    assert config.data.eval == {"mine": Path("mine-questions/eval.jsonl")}
    assert config.coldstart is not None
    assert config.grpo.questions_per_step == 8
    assert config.prompts.instruction.startswith("Question: {question}")


def test_passages_and_questions_are_used_as_they_are(here, monkeypatch, capsys):
    words = ("--documents", "passages.jsonl", "--questions", "faq.jsonl", "--model", "own/model")
    code, out, _ = run(monkeypatch, capsys, "init", "faq.toml", *words)
    assert code == 0
    assert commands(out)[:2] == [
        "search-e1 data prepare --train faq.jsonl --dev-share 0.2 --out faq-questions",
        "search-e1 doctor faq.toml",
    ]
    config = load(here / "faq.toml")
    assert config.policy.model == "own/model"
    assert config.data.train == (Path("faq-questions/faq.train.jsonl"),)
    assert (config.grpo.questions_per_step, config.coldstart.steps) == (4, 10)  # of six questions one or two are set aside
    assert config.grpo.steps == 0  # so few are memorized
    assert (config.distill.teachers, config.distill.merge.strengths, config.distill.merge.questions) == (
        "verified", (0.0, 0.25, 0.5, 0.75, 1.0), 40
    )  # fmt: skip
    prepared = run(monkeypatch, capsys, *commands(out)[0].split()[1:])
    assert prepared[0] == 0
    assert all(path.is_file() for path in (*config.data.train, *config.data.eval.values()))


def test_a_folder_with_tables_is_documents_and_one_of_passages_is_a_corpus(here):
    (here / "docs" / "prices.csv").write_text("item,price\nbox,3\n")
    assert not recipe.is_made(here / "docs")
    (here / "ingested").mkdir()
    (here / "ingested" / "passages.jsonl").write_text("")
    (here / "ingested" / "skipped.txt").write_text("")
    assert recipe.is_made(here / "ingested")
    (here / "a.pdf").write_bytes(b"%PDF")
    with pytest.raises(ConfigError, match="a single document; give the folder that holds it"):
        recipe.is_made(here / "a.pdf")


def test_a_table_of_questions_is_counted_whatever_its_columns_are_called(here, monkeypatch, capsys):
    (here / "faq.csv").write_text("question,answer\n" + "".join(f"Who is {i}?,Ada\n" for i in range(5)))
    (here / "meine fragen.csv").write_text("Frage,Antwort\n" + "".join(f"Wer ist {i}?,Ada\n" for i in range(5)))
    assert run(monkeypatch, capsys, "init", "a.toml", "--documents", "docs", "--questions", "faq.csv")[0] == 0
    assert load(here / "a.toml").grpo.questions_per_step == 4
    words = ("--documents", "docs", "--questions", "meine fragen.csv")
    code, out, err = run(monkeypatch, capsys, "init", "b c.toml", *words)
    assert (code, out) == (2, "")
    assert err == (
        "search-e1: meine fragen.csv:2: no column 'question'; there are 'Frage', 'Antwort' (--column FIELD=COLUMN)\n"
    )
    columns = ("--column", "question=Frage", "--column", "answers=Antwort")
    code, out, _ = run(monkeypatch, capsys, "init", "b c.toml", *words, *columns)
    assert code == 0
    assert load(here / "b c.toml").grpo.questions_per_step == 4
    assert commands(out)[2:5] == [
        "search-e1 data prepare --train 'meine fragen.csv' --column question=Frage --column answers=Antwort --dev-share 0.2 "
        "--out 'b c-questions'",
        "search-e1 doctor 'b c.toml'",
        "search-e1 train 'b c.toml'",
    ]
    assert run(monkeypatch, capsys, *shlex.split(commands(out)[2])[1:])[0] == 0


@pytest.mark.parametrize(("small", "questions", "steps"), [(True, 49, 0), (True, 50, 8), (True, None, 8), (False, 50, 100)])
def test_few_questions_leave_grpo_out(small, questions, steps):
    written = recipe.Recipe("a.toml", "a machine", "runs/a", "own/model", "corpus", "train", "eval", small, 8, questions)
    assert written.config().grpo.steps == steps
    assert ("so few questions" in written.toml()) == (steps == 0)
    assert max(map(len, written.toml().splitlines())) <= 128


def test_an_answer_is_asked_for_where_somebody_is_there(here, monkeypatch, capsys):
    answers = iter(["docs", "none", "this"])
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("typer.prompt", lambda text, default: next(answers))
    assert run(monkeypatch, capsys, "init")[0] == 0
    assert "mine-corpus" in (here / "mine.toml").read_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "--documents is missing, and there is no terminal to ask for it; give it"),
        (("--documents", "empty"), "empty: an empty folder; give one with documents"),
        (("--documents", "docs", "--questions", "gap.csv"), "gap.csv:3: a question without answers"),
        (("--documents", "nowhere/"), "nowhere/: no such folder or file; give --documents"),
        (("--documents", "docs", "--questions", "no.csv"), "no.csv: no such file; give --questions, or --questions none"),
        (("--documents", "docs", "--gpu", "h1000"), "--gpu h1000: unknown (known: b200-180gb"),
        (("there.toml", "--documents", "docs"), "there.toml exists; give another name: search-e1 init other.toml"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(here, monkeypatch, capsys, words, says):
    (here / "there.toml").write_text("mine")
    (here / "empty").mkdir()
    (here / "gap.csv").write_text("question,answer\nWho?,Ada\nWhere?,\n")
    code, _, err = run(monkeypatch, capsys, "init", *words)
    assert code != 0
    assert says in " ".join(err.split())
    assert not (here / "mine.toml").exists()
    assert (here / "there.toml").read_text() == "mine"


def test_the_largest_form_that_the_planner_accepts(monkeypatch):
    asked = []

    def plan(config, gpu, gpus, constants):
        asked.append((config.grpo.lora is not None, config.rollout.max_tokens, config.rollout.batch_size))
        return SimpleNamespace(problems=("too large",) if len(asked) < 3 else ())

    monkeypatch.setattr(recipe, "make_plan", plan)
    form = recipe.fitted(RECIPE, Gpu(name="g", memory_gib=24), load_constants())
    assert asked == [(False, 4096, 256), (True, 4096, 256), (True, 4096, 64)]
    assert (form.lora, form.max_tokens, form.batch_size) == asked[-1]
    monkeypatch.setattr(recipe, "make_plan", lambda *_: SimpleNamespace(problems=("grpo: needs 90 GiB",)))
    with pytest.raises(ConfigError, match="m does not fit g: grpo: needs 90 GiB"):
        recipe.fitted(RECIPE, Gpu(name="g", memory_gib=24), load_constants())


def test_the_planner_itself_accepts_what_is_written(tmp_path):
    sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    tiny = Qwen2Config(**sizes, vocab_size=512)
    tiny.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    constants = load_constants()
    own = replace(RECIPE, model=str(tmp_path))
    form = recipe.fitted(own, constants.gpu("4090"), constants)
    assert not make_plan(form.config(), constants.gpu("4090"), 1, constants).problems


def test_a_model_that_is_not_here_is_said_and_gets_adapters(here, monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "init", "--documents", "docs", "--gpu", "h100", "--model", "own/model")
    assert code == 0
    assert "whether it fits h100-80gb is not known" in out
    assert "search-e1 plan mine.toml --gpu h100" in commands(out)
    assert load(here / "mine.toml").grpo.lora is not None


@pytest.mark.parametrize(
    ("questions", "small", "steps"),
    [(16, True, 10), (40, True, 20), (121, True, 60), (1000, True, 60), (None, True, 60), (200, False, 25), (None, False, 40)],
)
def test_a_cold_start_takes_four_passes_over_few_questions(questions, small, steps):
    """Four passes at 8 (32) a step, from 10 to 60 (40) steps; all of them where the questions cannot be counted."""
    coldstart = replace(RECIPE, questions=questions, small=small).config().coldstart
    assert coldstart is not None
    assert coldstart.steps == steps


@pytest.mark.parametrize(("gpu", "model"), [("h100", "Qwen/Qwen2.5-3B-Instruct"), ("4090", "Qwen/Qwen2.5-1.5B-Instruct")])
def test_the_model_goes_by_the_gpu(gpu, model):
    assert recipe.default_model(load_constants().gpu(gpu)) == model
