"""Preflight: each finding where it is due and where it is not, and runs that it ends, warns and leaves alone."""

import json
import logging
import shutil

import pytest

from conftest import PASSAGES, make_tiny_policy
from search_e1 import evolve
from search_e1.cli import main as cli
from search_e1.config import Config
from search_e1.errors import PreflightError
from search_e1.evaluation import preflight
from search_e1.evaluation.preflight import Level, Observed
from search_e1.evaluation.recall import Recall
from search_e1.stages.inputs import Inputs
from search_e1.stages.preflight import findings
from search_e1.training import policy as policies
from search_e1.types import ActionKind, Group, Question, StopReason, Trajectory, Turn
from test_evolve import config, project
from trained import config_of

assert project  # the fixture: a policy with habits, passages and questions
OK, WARNING, STOP = Level.OK, Level.WARNING, Level.STOP


def trajectory(*, searches=0, answer=None, reward=0.0):
    looks = Turn(action_ids=(1,), action_text="", kind=ActionKind.SEARCH, argument="q", observation_ids=(2,))
    last = (
        Turn(action_ids=(3,), action_text="", kind=ActionKind.MALFORMED)
        if answer is None
        else Turn(action_ids=(3,), action_text="", kind=ActionKind.ANSWER, argument=answer)
    )
    return Trajectory(
        question_id="q", prompt_ids=(1,), turns=(*[looks] * searches, last), answer=answer, reward=reward,
        stop_reason=StopReason.MALFORMED if answer is None else StopReason.ANSWERED,
    )  # fmt: skip


def group(*trajectories):
    return Group(question=Question(id="q", text="?", answers=("a",)), trajectories=trajectories)


def test_what_groups_show():
    mixed = group(trajectory(searches=1, answer="a", reward=1.0), trajectory(answer="b"), trajectory(searches=2))
    seen = preflight.observe([mixed, group(*[trajectory()] * 3), group(trajectory())])
    assert seen == Observed(trajectories=7, malformed=5, searching=2, in_form=3, rewarded=1, groups=2, mixed=1)


@pytest.mark.parametrize(
    ("seen", "level", "text"),
    [
        (Observed(trajectories=64, malformed=64), STOP, "None of 64 trajectories made a search or gave an answer"),
        (Observed(trajectories=63, malformed=63), WARNING, "100% of 63 trajectories are malformed."),
        (Observed(trajectories=500, malformed=499, in_form=1), WARNING, "100% of 500 trajectories are malformed."),
        (Observed(trajectories=100, malformed=21, in_form=79), WARNING, "21% of 100"),
        (Observed(trajectories=100, malformed=20, in_form=80), OK, "20% of 100"),
    ],
)
def test_form(seen, level, text):
    found = preflight.form(seen)
    assert (found.check, found.level) == ("form", level)
    assert found.text.startswith(text)
    assert ("[coldstart]" in found.remedy) is (level is not OK)


def test_search():
    few, enough = (preflight.search(Observed(trajectories=100, searching=n)) for n in (9, 10))
    assert (few.level, few.text) == (WARNING, "9% of 100 trajectories search.")
    assert (enough.level, enough.remedy) == (OK, "")


def test_groups():
    mixed, easy, hard = (preflight.groups(Observed(groups=16, mixed=m, rewarded=r)) for m, r in ((2, 7), (0, 80), (0, 0)))
    assert (mixed.level, mixed.text) == (OK, "2 of 16 groups are mixed, so GRPO has something to learn from.")
    assert (easy.level, hard.level) == (WARNING, WARNING)
    assert "too easy or too hard" in easy.text
    assert "no trajectory is right" in hard.text


def rows(count, in_topk, in_corpus, yes_no=0):
    """``count`` questions, of which the first ``in_topk`` and ``in_corpus`` can be answered; None: unknown."""
    known = [(i < in_topk, None if in_corpus is None else i < in_corpus) for i in range(count)]
    return [
        Recall(benchmark="b", id=str(i), in_topk=t, in_corpus=c) for i, (t, c) in enumerate(known + [(None, None)] * yes_no)
    ]


NOTHING = Observed(trajectories=64, in_form=64)
SOME = Observed(trajectories=64, in_form=64, rewarded=1)


@pytest.mark.parametrize(
    ("found", "seen", "level", "words"),
    [
        (rows(20, 0, 0), NOTHING, STOP, "No passage holds an answer to any of 20 questions, and no trajectory has a reward."),
        (rows(20, 0, 0), SOME, WARNING, "hold an answer to 0% of 20 questions, the corpus to 0%."),
        (rows(19, 0, 0), NOTHING, WARNING, "0% of 19 questions"),
        (rows(20, 0, 1), NOTHING, WARNING, "the corpus to 5%."),
        (rows(20, 0, None), NOTHING, WARNING, "0% of 20 questions."),
        (rows(20, 4, 5), NOTHING, WARNING, "20% of 20 questions, the corpus to 25%."),
        (rows(20, 1, 15), NOTHING, WARNING, "5% of 20 questions, the corpus to 75%."),
        (rows(20, 2, 15, yes_no=3), NOTHING, OK, "10% of 20 questions"),
        (rows(20, 2, None), NOTHING, OK, "10% of 20 questions."),
    ],
)
def test_answers(found, seen, level, words):
    finding = preflight.answers(found, 3, seen)
    assert finding.level is level
    assert words in finding.text
    if level is WARNING:
        assert ("rollout.topk" in finding.remedy) is ("75%" in finding.text or "corpus" not in finding.text)


def test_answers_of_yes_no_questions_are_in_no_corpus():
    assert preflight.answers(rows(0, 0, 0, yes_no=30), 3, NOTHING) is None


def test_a_corpus_with_nothing_to_choose_from():
    one, three = preflight.passages(1, 3), preflight.passages(3, 3)
    assert one.text == "The corpus has 1 passage, and a search shows up to 3: there is nothing to choose from."
    assert three.text.startswith("The corpus has 3 passages")
    assert (one.level, three.level, preflight.passages(4, 3)) == (WARNING, WARNING, None)


def test_a_policy_without_a_chat_template_says_so_unless_it_is_taught(mute, tmp_path):
    shutil.copytree(mute / "policy", tmp_path / "base")
    policy = str(tmp_path / "base")
    settings = settings_of(mute, tmp_path / "run", policy={"model": policy, "device": "cpu"})

    def found(settings):
        run = Inputs(settings, tmp_path / "run")
        made = findings(run, Observed(trajectories=1, in_form=1), [], policy)
        return {finding.check: finding.text for finding in made if finding.level is not OK}

    assert "template" not in found(settings)  # it has prompts of ours
    (tmp_path / "base" / "search_e1.json").unlink()
    assert found(settings)["template"].startswith("The policy's tokenizer has no chat template")
    taught = Config.model_validate(settings.model_dump() | {"coldstart": {}})
    assert "template" not in found(taught)
    reader = policies.load_reader(policy, settings.policy)
    reader.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    reader.tokenizer.save_pretrained(tmp_path / "base")
    assert "template" not in found(settings)


def test_a_corpus_of_one_passage_is_said_before_training(mute, tmp_path):
    corpus = tmp_path / "one.jsonl"
    corpus.write_text((mute / "corpus.jsonl").read_text().splitlines()[0] + "\n")
    settings = settings_of(mute, tmp_path / "run", preflight="warn", grpo={"steps": 1, "questions_per_step": 2})
    data = settings.data.model_copy(update={"corpus": (corpus,)})
    evolve.train(settings.model_copy(update={"data": data}))
    stored = json.loads((tmp_path / "run" / "preflight" / "preflight.json").read_text())
    assert [row["level"] for row in stored if row["check"] == "passages"] == ["warning"]


def test_overlap():
    def question(id, text):
        return Question(id=id, text=text, answers=("a",))

    train = [question("t1", "Who wrote the Iliad?"), question("1", "Who painted it?")]
    apart = preflight.overlap(train, {"nq": [question("1", "Who sang it?"), question("2", "Where?")]})
    assert apart.level is OK
    assert apart.text == ("None of 2 evaluation questions is a training question; shared ids with different texts: 1.")
    both = preflight.overlap(train, {"nq": [question("2", "Where?")], "hop": [question("h", "who wrote Iliad")]})
    assert both.level is WARNING
    assert both.text == "1 of 2 evaluation questions are training questions, e.g. 'h' of hop and 't1' ('who wrote Iliad')."


def test_how_long_it_takes(tmp_path):
    sections = {
        "grpo": {"steps": 10, "questions_per_step": 8, "group_size": 5},
        "pool": {"questions": 30, "group_size": 4},
        "lead": {"pairs": 5, "samples": 2},
    }
    settings = config_of(tmp_path, rounds=2, **sections)
    sampled = preflight.amounts(settings, train_questions=100, eval_questions=50)
    # 5 policies x 50 x 2; 2 rounds x 10 x 40; 2 x 30 x 4; 2 x 4 x 5 x 2
    assert sampled == {"evaluation": 500, "grpo": 800, "pool": 240, "lead": 80}
    harmless = config_of(tmp_path, preset="harmless", rounds=2, **sections)
    more = preflight.amounts(harmless, train_questions=100, eval_questions=50)
    # One distillation: a teacher for each of the pool's 30 questions; 5 strengths x 100 questions.
    assert more == {"evaluation": 400, "grpo": 800, "pool": 120, "lead": 40, "teachers": 30, "merge": 500}
    found = preflight.time(sampled, per_second=0.1, tokens=70)
    assert found.text == (
        "Sampling 1,620 trajectories takes about 4.5 h at the measured 7 tokens/s; training is extra (search-e1 doctor "
        "measures it)."
    )
    timed = preflight.time(sampled, 10.0, 70, trained_per_second=0.1).text
    assert timed.endswith("3 min at the measured 700 tokens/s, GRPO's updates 2.2 h; the other stages' updates are extra.")
    assert [preflight.duration(hours) for hours in (0.001, 0.5, 47.9, 72)] == ["1 min", "30 min", "47.9 h", "3.0 days"]


@pytest.fixture(scope="module")
def mute(tmp_path_factory):
    """A policy from nothing, which never makes a tag, and questions that no passage answers."""
    root = tmp_path_factory.mktemp("mute")
    make_tiny_policy().save(root / "policy")
    rows = [{"id": p.id, "contents": p.contents} for p in PASSAGES]
    (root / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [{"id": f"q{i}", "question": f"capital of Arda {i}?", "golden_answers": ["Bel"]} for i in range(4)]
    (root / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    return root


def settings_of(root, run, **changes):
    made = config(root, run)
    short = {"rollout": made.rollout.model_dump() | {"max_action_tokens": 4, "max_searches": 1}, "ofsd": "never"}
    return Config.model_validate(made.model_dump() | short | changes)


def test_a_run_that_cannot_learn_stops_with_the_remedy(mute, tmp_path):
    settings = settings_of(mute, tmp_path / "run")
    with pytest.raises(
        PreflightError, match=r"cannot learn: None of 68 trajectories made a search .* Add a \[coldstart\]"
    ) as raised:
        evolve.train(settings)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run" / "grpo-1").exists()
    stored = json.loads((tmp_path / "run" / "preflight" / "preflight.json").read_text())
    assert {row["check"]: row["level"] for row in stored} == {
        "form": "stop", "search": "warning", "groups": "warning", "answers": "ok", "overlap": "warning",
    }  # fmt: skip
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["preflight"] == stored


def test_it_goes_on_where_that_is_asked_for(mute, tmp_path, caplog):
    with pytest.raises(PreflightError):
        evolve.train(settings_of(mute, tmp_path / "run"))
    with caplog.at_level(logging.WARNING):
        evolve.train(settings_of(mute, tmp_path / "run", preflight="warn"))
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("preflight, form: None of 68")]
    assert len(said) == 1
    assert (tmp_path / "run" / "grpo-1").exists()
    off = tmp_path / "off"
    evolve.train(settings_of(mute, off, preflight="off"))
    assert not (off / "preflight").exists()
    assert json.loads((off / "summary.json").read_text())["preflight"] == []


def test_its_one_line_and_exit_status(mute, tmp_path, monkeypatch, capsys):
    file = tmp_path / "c.toml"
    file.write_text(
        f'run = "{tmp_path}/run"\npolicy = {{ model = "{mute}/policy", device = "cpu" }}\nofsd = "never"\n'
        f'data.corpus = "{mute}/corpus.jsonl"\ndata.train = ["{mute}/questions.jsonl"]\n'
        f'data.eval.t = "{mute}/questions.jsonl"\n'
        "rollout = { max_action_tokens = 4, max_searches = 1, max_tokens = 300 }\n"
        "grpo = { steps = 1, questions_per_step = 2 }\n"
    )
    monkeypatch.setattr("sys.argv", ["search-e1", "train", "--config", str(file)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("search-e1:")]
    assert "the run cannot learn" in line


def test_a_policy_that_is_rewarded_now_and_then_is_not_probed(project, tmp_path):
    settings = config(project, tmp_path / "run")
    summary = evolve.train(settings.model_copy(update={"ofsd": "never"}))
    assert not (settings.run / "preflight" / "groups.jsonl").exists()
    assert {finding.check: finding.level for finding in summary.preflight}["form"] is not STOP
