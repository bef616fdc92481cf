import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import AddedToken

from conftest import byte_tokenizer
from search_e1.config import Prompts
from search_e1.errors import ConfigError
from search_e1.text.prompts import (
    INFORMATION_CLOSE,
    INFORMATION_OPEN,
    neutralize,
    observation,
    plain_prompt,
    privileged_prompt,
)
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


def test_prompts_are_saved_with_a_policy(tmp_path: Path) -> None:
    assert Prompts.of_policy(tmp_path) == Prompts()
    PROMPTS.save(tmp_path)
    assert Prompts.of_policy(tmp_path) == PROMPTS
    for broken in ("{", "[]", '{"prompts": {"instruction": "none"}}'):
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
