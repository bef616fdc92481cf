"""What the teacher sees of a reference, by hand: views of it, and how it is cut to fit."""

import pytest

from conftest import TINY_PROMPTS, byte_tokenizer
from search_e1.config import ReferenceConfig, ReplayConfig
from search_e1.stages.replay import replay_samples
from search_e1.text.prompts import (
    observation,
    passages_of,
    plain_prompt,
    privileged_prompt,
    split_passage,
    with_passages,
)
from search_e1.text.protocols import protocol_of
from search_e1.text.reference import RenderedReference, prompt_budget, render_reference, visible_part
from search_e1.training.policy import Policy
from search_e1.types import ActionKind, Group, Passage, Question, StopReason, Trajectory, Turn

TOKENIZER = byte_tokenizer()
TAGS = protocol_of(TOKENIZER, TINY_PROMPTS)
QUESTION = "Mayor of Bel?"
PLENTY = 100_000


def searched(query: str, *passages: tuple[str, str], thought: str = "<think>so</think>\n") -> Turn:
    found = [Passage(id=title, title=title, text=text) for title, text in passages]
    text, ids = observation(TOKENIZER, found, 500)
    action = f"{thought}<search> {query} </search>"
    return Turn(
        action_ids=TOKENIZER.encode(action),
        action_text=action,
        kind=ActionKind.SEARCH,
        argument=query,
        observation_ids=ids,
        observation_text=text,
        passage_ids=[p.id for p in found],
    )


def answered(text: str, end: str = "<|end|>") -> Turn:
    action = f"Hm. <answer>{text}</answer>{end}"
    return Turn(action_ids=TOKENIZER.encode(action), action_text=action, kind=ActionKind.ANSWER, argument=text)


MISTAKE = Turn(
    action_ids=(5,),
    action_text="<search></search>?",
    kind=ActionKind.MALFORMED,
    observation_ids=(6,),
    observation_text="\nNo.\n",
)


def reference(*turns: Turn) -> Trajectory:
    return Trajectory(
        question_id="q",
        prompt_ids=(1,),
        turns=turns,
        stop_reason=StopReason.ANSWERED,
        answer=turns[-1].argument,
        reward=1,
    )


REFERENCE = reference(
    searched("bel", ("Bel", "a city of the north"), ("Arda", "a land")),
    MISTAKE,
    searched("mayor bel", ("Cor Dun", "the mayor of Bel"), ("Fen", "of Eth"), ("Gil", "a man")),
    answered("Cor Dun"),
)


def tokens(text: str) -> int:
    return len(ids_of(text))


def ids_of(text: str) -> tuple[int, ...]:
    return privileged_prompt(TOKENIZER, TINY_PROMPTS, QUESTION, text)


def rendered(text: str, shortened: bool = False) -> RenderedReference:
    """What is rendered where ``text`` is what the teacher sees."""
    return RenderedReference(text, ids_of(text), shortened)


def shown(budget: int, **config) -> RenderedReference | None:
    return render_reference(TOKENIZER, TINY_PROMPTS, QUESTION, REFERENCE, ReferenceConfig(**config), budget)


@pytest.mark.parametrize(
    ("shows", "expected"),
    [
        ("whole", REFERENCE.text),
        ("searches", "<search> bel </search>\n<search> mayor bel </search>"),
        (
            "searches_and_answer",
            "<search> bel </search>\n<search> mayor bel </search>\n<answer>Cor Dun</answer><|end|>",
        ),
        ("answer", "<answer>Cor Dun</answer><|end|>"),
        ("none", ""),
    ],
)
def test_what_is_shown(shows, expected):
    assert visible_part(REFERENCE, ReferenceConfig(shows=shows), TAGS) == expected
    assert shown(PLENTY, shows=shows) == rendered(expected)


def test_a_thought_that_mentions_a_tag_is_no_action():
    turn = searched("bel", thought="<think>I could <search> or not</think> ")
    assert visible_part(reference(turn, answered("x")), ReferenceConfig(shows="searches"), TAGS) == "<search> bel </search>"


def test_nothing_shown_is_the_plain_prompt():
    assert privileged_prompt(TOKENIZER, TINY_PROMPTS, QUESTION, "") == plain_prompt(TOKENIZER, TINY_PROMPTS, QUESTION)


def test_passages_of_an_observation_and_back():
    text = REFERENCE.turns[2].observation_text
    passages = passages_of(text)
    assert passages == [
        "Doc 1(Title: Cor Dun) the mayor of Bel\n",
        "Doc 2(Title: Fen) of Eth\n",
        "Doc 3(Title: Gil) a man\n",
    ]
    assert with_passages(passages) == text
    assert split_passage(passages[0]) == ("Cor Dun", "the mayor of Bel")
    assert split_passage("Doc 1(Title: Alien (film)) of 1979\n") == ("Alien (film)", "of 1979")
    assert split_passage("Doc 1(Tit\n") == ("", "Doc 1(Tit")
    assert passages_of("\nNo.\n") is None
    empty, _ = observation(TOKENIZER, [], 500)
    assert passages_of(empty) == []
    assert with_passages([]) == empty


def test_passages_are_cut_from_the_end_of_the_observation_that_holds_most():
    whole = REFERENCE.text
    by_hand = whole
    for gone in ("Doc 3(Title: Gil) a man\n", "Doc 2(Title: Arda) a land\n", "Doc 2(Title: Fen) of Eth\n"):
        assert shown(tokens(by_hand) - 1) != rendered(by_hand)
        by_hand = by_hand.replace(gone, "")
        assert shown(tokens(by_hand)) == rendered(by_hand, shortened=True)
    # At last no passage is left; the actions, the correction and the tags of the observations are.
    bare = (
        "<think>so</think>\n<search> bel </search>\n\n<information>\n\n</information>\n\n<search></search>?\nNo.\n"
        "<think>so</think>\n<search> mayor bel </search>\n\n<information>\n\n</information>\n\n"
        "Hm. <answer>Cor Dun</answer><|end|>"
    )
    assert shown(tokens(bare)) == rendered(bare, shortened=True)
    assert shown(tokens(bare) - 1) is None


def test_passages_are_cut_evenly_to_as_many_words_as_fit():
    two_words = REFERENCE.text.replace("a city of the north", "a city").replace("the mayor of Bel", "the mayor")
    assert shown(tokens(two_words), shorten="evenly") == rendered(two_words, shortened=True)
    three_words = REFERENCE.text.replace("a city of the north", "a city of").replace("the mayor of Bel", "the mayor of")
    assert shown(tokens(three_words), shorten="evenly") == rendered(three_words, shortened=True)
    assert shown(tokens(three_words) - 1, shorten="evenly") == rendered(two_words, shortened=True)
    headings = shown(tokens(two_words) - 12, shorten="evenly")
    assert headings
    assert "Doc 1(Title: Bel)" in headings.text
    assert shown(60, shorten="evenly") is None


@pytest.mark.parametrize("shorten", ["passages", "evenly"])
@pytest.mark.parametrize("cut", range(1, 56, 6))
def test_what_is_cut_fits_and_keeps_every_action(shorten, cut):
    limit = tokens(REFERENCE.text) - cut
    made = shown(limit, shorten=shorten)
    assert made
    assert made.shortened
    assert made.prompt_ids == ids_of(made.text)
    assert len(made.prompt_ids) <= limit
    at = 0
    for turn in REFERENCE.turns:
        at = made.text.index(turn.action_text, at) + len(turn.action_text)
    assert made.text.endswith(REFERENCE.turns[-1].action_text)
    assert made.text.count("</information>") == 2


def test_what_may_not_be_cut_does_not_fit():
    assert shown(tokens(REFERENCE.text)) == rendered(REFERENCE.text)
    assert shown(tokens(REFERENCE.text) - 1, shorten="never") is None
    answer = visible_part(REFERENCE, ReferenceConfig(shows="answer"), TAGS)
    assert shown(tokens(answer), shows="answer") == rendered(answer)
    assert shown(tokens(answer) - 1, shows="answer") is None


def test_the_budget_is_what_the_context_or_the_limit_leaves():
    assert prompt_budget(ReferenceConfig(), 1024, 100) == 924
    assert prompt_budget(ReferenceConfig(max_tokens=300), 1024, 100) == 200
    assert prompt_budget(ReferenceConfig(max_tokens=3000), 1024, 100) == 924


def test_replay_shows_what_distillation_shows():
    group = Group(question=Question(id="q", text=QUESTION, answers=("Cor Dun",)), trajectories=(REFERENCE,))
    config = ReplayConfig(examples_per_step=1, detours=0)

    def prompts(context_length: int = PLENTY, **shown) -> list[str]:
        made = replay_samples(Policy(None, TOKENIZER, TINY_PROMPTS), [group], config, context_length, ReferenceConfig(**shown))
        assert all(one.response_ids == REFERENCE.response_ids for one in made)
        return [TOKENIZER.decode(one.prompt_ids) for one in made]

    def prompt(text: str) -> str:
        return TOKENIZER.decode(privileged_prompt(TOKENIZER, TINY_PROMPTS, QUESTION, text))

    assert prompts() == [prompt(REFERENCE.text)]
    assert prompts(shows="answer") == [prompt("<answer>Cor Dun</answer><|end|>")]
    assert prompts(shows="none") == []
    length = tokens(REFERENCE.text) + len(REFERENCE.response_ids)
    assert prompts(length - 1) == [prompt(REFERENCE.text.replace("Doc 3(Title: Gil) a man\n", ""))]
    assert prompts(max_tokens=length - 1) == prompts(length - 1)
    assert prompts(length - 1, shorten="never") == []
