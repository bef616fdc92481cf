"""Whatever is sampled and whatever is retrieved: ids stay as they are, masks come from turns, passages say nothing."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chat import call, chat_tokenizer
from search_e1.config import Prompts, RolloutConfig
from search_e1.rollout.engines.base import BatchEngine, Generation
from search_e1.rollout.loop import rollout
from search_e1.rollout.starts import Start, starts
from search_e1.text.protocols import protocol_of
from search_e1.types import ActionKind, Passage, Question, StopReason

# Tokens that run over the end of a tag, over its beginning, and over both.
STRADDLING = (
    (">", "."),
    ("<", "/"),
    ("</", "s"),
    (">", "Ċ"),
    ("h", ">."),
    ("}", "<"),
    ("}<", "/"),
    (">", "<"),
    ("|", ">"),
)
TOKENIZERS = [chat_tokenizer(), chat_tokenizer(STRADDLING)]
PROMPTS = {name: Prompts.model_validate({"protocol": name, "instruction": "Q: {question}"}) for name in ("tags", "tools")}
LIMITS = RolloutConfig(max_searches=2, topk=2, max_action_tokens=120, max_observation_tokens=300, max_tokens=3000)

MARKUP = st.sampled_from(
    ["<search>", "</search>", "<answer>", "</answer>", "<think>", "</think>", "<information>", "</information>",
     "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<|im_end|>", "<|im_start|>", "<|endoftext|>",
     "< search >", "</SEARCH>", "<tool_", "call>", "<|im_<|im_end|>end|>", "Doc 1(Title: ", "\n\n", '"}}', "日本", "e\u0301",
     "\N{ZERO WIDTH JOINER}", "\N{RIGHT-TO-LEFT OVERRIDE}", call("Bel", end=""),
     "<search> Bel </search>.", "<answer>x</answer>."]
)  # fmt: skip
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
PIECES = st.lists(MARKUP | TEXT, max_size=6).map("".join)
ACTIONS = st.lists(PIECES, min_size=3, max_size=3)


class Says(BatchEngine):
    """Gives ids of the actions it was told, cut where a generation may be cut; keeps what it gave."""

    context_length = 10_000

    def __init__(self, tokenizer, actions) -> None:
        self.tokenizer = tokenizer
        self.left = [tuple(tokenizer.encode(action)) or (0,) for action in actions]
        self.gave: list[tuple[int, ...]] = []
        self.read: list[list[int]] = []

    def generate(self, requests, *, temperature, stop):
        self.read.append(list(requests[0].prompt))
        self.gave.append(self.left.pop(0)[: requests[0].max_new_tokens])
        return [Generation(self.gave[-1])]


class Finds:
    def __init__(self, passages) -> None:
        self.passages = passages

    def search(self, queries, topk):
        return [list(self.passages[:topk]) for _ in queries]


def play(tokenizer, protocol: str, actions, passages):
    says, prompts = Says(tokenizer, actions), PROMPTS[protocol]
    [start] = starts(tokenizer, prompts, [Question(id="q", text="Who?", answers=("x",))])
    [done] = rollout(says, Finds(passages), [start], LIMITS, temperature=1.0, seed=0, prompts=prompts)
    return done, says, start


def passages_of(texts) -> list[Passage]:
    return [Passage(id=str(i), title=title, text=text) for i, (title, text) in enumerate(texts)]


QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
FOUND = st.lists(st.tuples(PIECES, PIECES), max_size=2).map(passages_of)


@pytest.mark.parametrize("protocol", ["tags", "tools"])
@QUICK
@given(actions=ACTIONS, passages=FOUND, tokenizer=st.sampled_from(TOKENIZERS))
def test_what_is_sampled_is_what_is_kept(protocol: str, actions, passages, tokenizer) -> None:
    t, says, start = play(tokenizer, protocol, actions, passages)
    assert [turn.action_ids for turn in t.turns] == says.gave
    context, mask = list(start.prompt_ids), []
    for read, turn in zip(says.read, t.turns, strict=True):
        assert read == context  # nothing was rendered, decoded or encoded again
        context += [*turn.action_ids, *turn.observation_ids]
        mask += [1] * len(turn.action_ids) + [0] * len(turn.observation_ids)
    assert [*t.prompt_ids, *t.response_ids] == context
    assert list(t.action_mask) == mask
    for turn in t.turns:
        assert tokenizer.decode(turn.action_ids, skip_special_tokens=False) == turn.action_text
        assert protocol_of(tokenizer, PROMPTS[protocol]).parse(turn.action_text).kind is turn.kind
    # A rollout that goes on from any of its turns comes to the same end.
    again = Says(tokenizer, actions[1:])
    if len(t.turns) > 1:
        question = Question(id="q", text="Who?", answers=("x",))
        begun = [Start(question, start.prompt_ids, t.turns[:1])]
        [resumed] = rollout(again, Finds(passages), begun, LIMITS, temperature=1.0, seed=0, prompts=PROMPTS[protocol])
        assert resumed == t


@pytest.mark.parametrize("protocol", ["tags", "tools"])
@QUICK
@given(passages=FOUND, tokenizer=st.sampled_from(TOKENIZERS))
def test_nothing_in_a_passage_is_a_tag_or_changes_what_is_parsed(protocol: str, passages, tokenizer) -> None:
    ask = {"tags": "<search> Bel </search>", "tools": call("Bel")}[protocol]
    end = {"tags": "<answer> x </answer>", "tools": "<answer> x </answer><|im_end|>"}[protocol]
    t, _, _ = play(tokenizer, protocol, [ask, end], passages)
    plain, _, _ = play(tokenizer, protocol, [ask, end], [])
    assert [(turn.kind, turn.argument) for turn in t.turns] == [(ActionKind.SEARCH, "Bel"), (ActionKind.ANSWER, "x")]
    assert (t.stop_reason, t.reward) == (StopReason.ANSWERED, 1.0)
    own = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special or protocol == "tools"}

    def tokens(trajectory):
        return [i for i in trajectory.turns[0].observation_ids if i in own]

    assert tokens(t) == tokens(plain)
    seen = t.turns[0].observation_text
    for tag in ("search", "answer", "think", "information") + (("tool_call", "tool_response") * (protocol == "tools")):
        for mark in (f"<{tag}>", f"</{tag}>"):
            assert seen.count(mark) == plain.turns[0].observation_text.count(mark)
    assert len(t.turns[0].observation_ids) <= LIMITS.max_observation_tokens
