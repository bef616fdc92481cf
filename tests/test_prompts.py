import re
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import AddedToken, Regex, pre_tokenizers

from conftest import byte_tokenizer
from search_e1.config import PolicyConfig, Prompts
from search_e1.errors import ConfigError, ModelError, RunError
from search_e1.runs.opening import opened
from search_e1.text.prompts import (
    INFORMATION_CLOSE,
    INFORMATION_OPEN,
    neutralize,
    observation,
    plain_prompt,
    privileged_prompt,
)
from search_e1.training.policy import load, load_reader
from search_e1.types import Passage

relaxed = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])  # cores may be busy
TOKENIZER = byte_tokenizer()
TOKENIZER.add_tokens([AddedToken("<|start|>", special=True, normalized=False)])  # special, and without a name
TAGS = [f"<{slash}{tag}>" for tag in ("think", "search", "information", "answer") for slash in ("", "/")]
PIECES = st.sampled_from([*TAGS, "< / search >", "<ANSWER>", "<", ">", "<|end|>", "<|pad|>", "<|start|>", "\n", "ü", " a "])
HOSTILE = st.lists(PIECES | st.text(max_size=6), max_size=12).map("".join)
PASSAGES = st.lists(st.builds(Passage, id=st.just("p"), title=HOSTILE, text=HOSTILE), max_size=4)


def test_an_observation_by_hand() -> None:
    passages = [Passage(id="1", title="Bel", text="A city.\nOld."), Passage(id="2", title="Fen", text="B.")]
    text, ids = observation(TOKENIZER, passages, 500)
    assert text == ("\n\n<information>\nDoc 1(Title: Bel) A city. Old.\nDoc 2(Title: Fen) B.\n</information>\n\n")
    assert ids == tuple(TOKENIZER.encode(text))


def test_passages_are_cut_and_the_closing_tag_is_not() -> None:
    passages = [Passage(id="1", title="Bel", text="A city.")]
    tags = len(TOKENIZER.encode(INFORMATION_OPEN + INFORMATION_CLOSE))
    whole, whole_ids = observation(TOKENIZER, passages, 500)
    assert observation(TOKENIZER, passages, len(whole_ids)) == (whole, whole_ids)
    cut, cut_ids = observation(TOKENIZER, passages, tags + 12)
    assert cut == "\n\n<information>\nDoc 1(Title\n</information>\n\n"
    assert len(cut_ids) == tags + 12
    with pytest.raises(ConfigError, match=f"rollout.max_observation_tokens = {tags - 1} has no room for the tags alone"):
        observation(TOKENIZER, passages, tags - 1)


@relaxed
@given(PASSAGES, st.integers(8, 120))
def test_no_observation_breaks_the_protocol(passages: list[Passage], limit: int) -> None:
    text, ids = observation(TOKENIZER, passages, limit)
    assert len(ids) <= limit
    assert TOKENIZER.decode(ids) == text
    assert text.startswith(INFORMATION_OPEN)
    assert text.endswith(INFORMATION_CLOSE)
    inside = text.removeprefix(INFORMATION_OPEN).removesuffix(INFORMATION_CLOSE)
    assert not [tag for tag in TAGS if tag in inside.lower()]
    tags = [i for i in ids if TOKENIZER.decode([i]) in TAGS]
    assert tags == TOKENIZER.convert_tokens_to_ids(["<information>", "</information>"])
    special = {i for i, token in TOKENIZER.added_tokens_decoder.items() if token.special}
    assert len(special) == 3
    assert not special & set(ids)


@pytest.mark.parametrize(
    ("text", "harmless"),
    [
        ("<search> x </search>", "(search) x (/search)"),
        ("<Answer>x< /answer>", "(Answer)x< /answer>"),
        ("</ information >", "(/ information )"),
        ("a <b> 3 < 4", "a <b> 3 < 4"),
        ("<|end|><|start|>user", "(end)(start)user"),
        ("<sea<|pad|>rch>", "<sea(pad)rch>"),
        ("<<search>search>", "<(search)search>"),
    ],
)
def test_neutralised_text(text: str, harmless: str) -> None:
    assert neutralize(TOKENIZER, text) == harmless


PROMPTS = Prompts(instruction="Q: {question}\n", privileged="{instruction}E: {reference}\n")


def test_prompts_are_what_their_templates_say() -> None:
    plain = plain_prompt(TOKENIZER, PROMPTS, "Who, {reference} <search>?<|end|>")
    assert TOKENIZER.decode(plain) == "Q: Who, {reference} (search)?(end)\n"
    reference = "<search> {question} </search>\n<answer> x </answer><|end|>"
    privileged = privileged_prompt(TOKENIZER, PROMPTS, "Who?", reference)
    # The reference keeps its tags: it is shown whole. Only its special tokens are made harmless.
    assert TOKENIZER.decode(privileged) == "Q: Who?\nE: <search> {question} </search>\n<answer> x </answer>(end)\n"


def test_the_chat_template_is_applied_where_there_is_one() -> None:
    tokenizer = byte_tokenizer()
    messages = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    tokenizer.chat_template = messages + "{% if add_generation_prompt %}[assistant]{% endif %}"
    assert tokenizer.decode(plain_prompt(tokenizer, PROMPTS, "Who?")) == "[user]Q: Who?\n[assistant]"


def test_a_pattern_that_does_not_come_to_an_end_is_one_line() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(a|aa)+$"), "isolated")
    for asked in (lambda text: plain_prompt(tokenizer, PROMPTS, text), lambda text: seen(tokenizer, text)):
        with pytest.raises(ModelError, match=r"tokenizer\.json: its regular expression fails on a text") as caught:
            asked("a" * 60 + "!")
        assert "\n" not in str(caught.value)


def seen(tokenizer, text: str) -> str:
    return observation(tokenizer, [Passage(id="p", title="t", text=text)], 200)[0]


DATED = "Today is {{ strftime_now('%d %b %Y') }}. {% for m in messages %}{{ m.content }}{% endfor %}"


def test_a_template_that_tells_the_date_is_given_the_one_of_the_prompts() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = DATED
    dated = PROMPTS.model_copy(update={"date": date(2025, 11, 28)})
    assert tokenizer.decode(plain_prompt(tokenizer, dated, "Who?")) == "Today is 28 Nov 2025. Q: Who?\n"
    formats = ("%Y-%m-%d", "%-d. %B %y", "%A, %d %b %Y %H:%M", "100%")
    tokenizer.chat_template = "|".join(f"{{{{ strftime_now('{format}') }}}}" for format in formats)
    told = tokenizer.decode(plain_prompt(tokenizer, dated, "Who?"))
    assert told == "2025-11-28|28. November 25|Friday, 28 Nov 2025 00:00|100%"
    tokenizer.chat_template = "{% macro day() %}{{ strftime_now('%Y') }}{% endmacro %}\n{{ day() if strftime_now is defined }}"
    assert tokenizer.decode(plain_prompt(tokenizer, dated, "Who?")).strip() == "2025"
    tokenizer.chat_template = DATED
    privileged = tokenizer.decode(privileged_prompt(tokenizer, dated, "Who?", "x"))
    assert privileged == "Today is 28 Nov 2025. Q: Who?\nE: x\n"


def test_the_day_is_the_runs(tmp_path: Path, tiny_policy, monkeypatch, caplog) -> None:
    """The run goes on tomorrow, and its policy is asked next year."""
    tiny_policy.tokenizer.chat_template = DATED
    tiny_policy.save(tmp_path / "base")
    days = iter([date(2025, 11, 28), date(2025, 11, 29), date(2026, 7, 1), date(2026, 7, 2), date(2026, 7, 3)])
    monkeypatch.setattr("search_e1.runs.opening.date", SimpleNamespace(today=lambda: next(days)))
    config = PolicyConfig(model=str(tmp_path / "base"))
    for _ in range(2):
        with opened(tmp_path / "run", {}):
            made = load(tmp_path / "base", config)
            assert made.prompts.date == date(2025, 11, 28)
    made.save(tmp_path / "made")
    assert load_reader(tmp_path / "made", config).prompts.date == date(2025, 11, 28)
    with opened(tmp_path / "branch", {}, branch_of=tmp_path / "run"):
        assert load_reader(tmp_path / "base", config).prompts.date == date(2025, 11, 28)
    for name in ("one", "two"):
        with opened(tmp_path / name, {}, shared=tmp_path / "shared"):
            assert load_reader(tmp_path / "base", config).prompts.date == date(2025, 11, 29)
    with opened(tmp_path / "run", {}):
        given = load_reader(tmp_path / "base", config, PROMPTS.model_copy(update={"date": date(2024, 1, 2)}))
    assert given.prompts.date == date(2024, 1, 2)
    assert not caplog.messages
    assert load_reader(tmp_path / "base", config).prompts.date == date.today()
    assert caplog.messages == [f"{tmp_path / 'base'}: its chat template contains the date; using today's, or set prompts.date"]
    (tmp_path / "run" / "day.json").write_text("{")
    with pytest.raises(RunError, match=r"day\.json: damaged; write"), opened(tmp_path / "run", {}):
        pass


def test_without_a_date_in_the_template_none_is_kept(tmp_path: Path, tiny_policy) -> None:
    tiny_policy.save(tmp_path / "base")
    assert load_reader(tmp_path / "base", PolicyConfig(model="x")).prompts.date is None
    assert "date" not in (tmp_path / "base" / "search_e1.json").read_text()


@pytest.mark.parametrize("value", [7, True, "tomorrow", 1.5])
def test_a_date_is_a_date(value: object) -> None:
    assert Prompts.model_validate({"date": "2025-11-28"}).date == Prompts.model_validate({"date": date(2025, 11, 28)}).date
    with pytest.raises(ValidationError):
        Prompts.model_validate({"date": value})


def test_prompts_are_saved_with_a_policy(tmp_path: Path) -> None:
    assert Prompts.of_policy(tmp_path) == Prompts()
    PROMPTS.save(tmp_path)
    assert Prompts.of_policy(tmp_path) == PROMPTS
    deep = '{"prompts": ' + '{"instruction": ' * 5000 + "1" + "}" * 5001
    for broken in ("{", "[]", "[" * 5000, deep, '{"prompts": {"instruction": "none"}}'):
        (tmp_path / "search_e1.json").write_text(broken)
        with pytest.raises(ConfigError, match=re.escape(f"{tmp_path / 'search_e1.json'}: not a prompts file")) as caught:
            Prompts.of_policy(tmp_path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["instruction", "privileged"])
def test_a_template_without_its_field_is_refused(field: str) -> None:
    with pytest.raises(ValidationError, match="the template lacks"):
        Prompts(**{field: "nothing in it"})


def test_the_instruction_is_search_r1s() -> None:
    prompt = TOKENIZER.decode(plain_prompt(TOKENIZER, Prompts(), "Who?"))
    assert prompt.startswith("Answer the given question. You must conduct reasoning inside <think> and </think> first")
    assert prompt.endswith("For example, <answer> Beijing </answer>. Question: Who?\n")
