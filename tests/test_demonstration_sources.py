"""Demonstrations from questions alone, from an endpoint, and under the tools protocol."""

import time

import pytest

from chat import chat_tokenizer
from conftest import PASSAGES, TINY_PROMPTS, TinyRetriever
from search_e1.config import EndpointConfig, Prompts, RolloutConfig
from search_e1.errors import ConfigError, EndpointError
from search_e1.rollout import pool
from search_e1.rollout.demonstrations import endpoint, hops, passages, questions
from search_e1.rollout.demonstrations.questions import names_in
from search_e1.rollout.demonstrations.writer import Writer
from search_e1.runs.checkpoints import Checkpointer
from search_e1.text.protocol import Action
from search_e1.text.protocols import protocol_of
from search_e1.types import ActionKind, Question
from serving import misbehaving
from test_endpoint import completion

ROLLOUT = RolloutConfig(topk=1)
TOOLS = Prompts(protocol="tools", instruction="Q: {question}", correction="No.")


def ask(id: str, text: str, *answers: str, **metadata) -> Question:
    return Question(id=id, text=text, answers=answers, metadata=metadata)


def writer(tiny_policy, rollout: RolloutConfig = ROLLOUT) -> Writer:
    return Writer(tiny_policy.tokenizer, tiny_policy.prompts, rollout, TinyRetriever(PASSAGES[::-1]))


def taught(tiny_policy, *asked: Question) -> list[list[str]]:
    by = writer(tiny_policy)
    lessons = hops.lessons(questions.plans(asked, by), by)
    assert all(lesson.clean.correct for lesson in lessons)
    return [[turn.action_text for turn in lesson.clean.turns] for lesson in lessons]


def test_a_name_that_finds_the_answer_teaches_a_search(tiny_policy):
    assert taught(tiny_policy, ask("q", "Who is mayor of Bel?", "Cor Dun")) == [
        [
            "<think> I need to find Bel.</think><search> Bel</search>",
            "<think> Bel: city with mayor Cor Dun. So the answer is Cor Dun.</think><answer> Cor Dun</answer>",
        ]
    ]


def test_a_title_that_the_question_finds_is_a_name_however_it_is_written(tiny_policy):
    [[first, _]] = taught(tiny_policy, ask("q", "what length has ion", "12"))
    assert first == "<think> I need to find ion.</think><search> ion</search>"


def test_a_question_without_a_name_is_its_own_query(tiny_policy):
    [[first, _]] = taught(tiny_policy, ask("q", "what length has the river", "12"))
    assert first == "<think> I will search for the question.</think><search> what length has the river</search>"


def test_a_name_in_what_was_found_leads_to_a_second_search(tiny_policy):
    assert taught(tiny_policy, ask("q", "Who is mayor of the capital of Arda?", "Cor Dun")) == [
        [
            "<think> I need to find Arda.</think><search> Arda</search>",
            "<think> Arda: land with capital Bel. I need to find Bel.</think><search> Bel</search>",
            "<think> Bel: city with mayor Cor Dun. So the answer is Cor Dun.</think><answer> Cor Dun</answer>",
        ]
    ]


@pytest.mark.parametrize(
    "question",
    [
        ask("q", "Who is mayor of Bel?", "Nobody"),
        ask("q", "Is Bel a city?", "yes"),  # found by chance, wherever
        ask("q", "Is Bel or Fen a city with mayor Cor Dun?", "Bel"),
        ask("q", "zzz?", "Cor Dun"),  # nothing is found
        ask("q", "Who is in Bel?", "a"),
    ],
)
def test_what_is_not_found_or_says_nothing_teaches_nothing(tiny_policy, question):
    assert taught(tiny_policy, question) == []


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("Who wrote \"the old man\" and 'it' in Rome?", ["the old man", "Rome"]),
        ("What did J. K. Rowling's Lord of the Rings cost?", ["J. K. Rowling's Lord of the Rings"]),
        ("In which Arda's town is the Franklin Institute. The end.", ["Arda", "Franklin Institute"]),
        ("Did Apollo 11 land before Élan?", ["Apollo 11", "Élan"]),
        ("who directed jaws", []),
    ],
)
def test_names(text, names):
    assert names_in(text) == names


SEARCH, ANSWER = completion("I <think>wonder</think>\n<search> Bel"), completion("<think>So.</think><answer>Cor Dun")
CONFIG = dict(model="m", group_size=2, temperature=0.5)
QUESTIONS = [ask("q1", "Mayor of Bel?", "Cor Dun"), ask("q2", "Length of Ion?", "12")]


def answering(*by_turn):
    """A server whose n-th message of a conversation is the n-th of ``by_turn``."""
    return misbehaving(lambda request, number: by_turn[len(request["messages"]) // 2])


def sampled(tiny_policy, server, out, checkpointer=None, asked=QUESTIONS):
    return endpoint.sample(
        EndpointConfig(url=server.url, **CONFIG), asked, TinyRetriever(PASSAGES[::-1]), tiny_policy.prompts, ROLLOUT,
        seed=1, out=out, checkpointer=checkpointer,
    )  # fmt: skip


def test_correct_trajectories_of_an_endpoint_are_written_in_the_policys_form_and_ids(tiny_policy, tmp_path):
    with answering(SEARCH, ANSWER) as server:
        figures = sampled(tiny_policy, server, tmp_path)
    assert (figures["questions"], figures["em"], figures["searches"]) == (2, 0.5, 1.0)
    by = writer(tiny_policy)
    [lesson] = endpoint.lessons(pool.read(tmp_path / pool.FILE), by)
    assert [turn.action_text for turn in lesson.clean.turns] == [
        "<think> I wonder</think><search> Bel</search>",
        "<think> So.</think><answer> Cor Dun</answer>",
    ]
    expected = by.trajectory(QUESTIONS[0], [by.search("I wonder", "Bel"), by.answer("So.", "Cor Dun")])
    assert lesson.clean == expected
    decoded = tiny_policy.tokenizer.decode(lesson.clean.response_ids)
    assert decoded == lesson.clean.text
    assert "Doc 1(Title: Bel) Bel is a city with mayor Cor Dun." in decoded
    assert lesson.needed == {"p2"}


def test_of_correct_trajectories_the_one_with_the_fewest_searches_is_taken(tiny_policy, tmp_path):
    # q1 is asked twice: the second time it answers at once.
    first_asked: list[int] = []

    def reply(request, number):
        if len(request["messages"]) > 1:
            return ANSWER
        first_asked.append(number)
        return SEARCH if len(first_asked) == 1 else ANSWER

    with misbehaving(reply) as server:
        sampled(tiny_policy, server, tmp_path, asked=QUESTIONS[:1])
    [lesson] = endpoint.lessons(pool.read(tmp_path / pool.FILE), writer(tiny_policy))
    assert lesson.clean.searches == 0


def test_malformed_turns_are_not_taught(tiny_policy, tmp_path):
    with answering(completion("Hm."), ANSWER) as server:
        sampled(tiny_policy, server, tmp_path)
    assert endpoint.lessons(pool.read(tmp_path / pool.FILE), writer(tiny_policy)) == []


def test_what_an_endpoint_says_cannot_open_a_tag(tiny_policy, tmp_path):
    with answering(completion("<answer>x <think>a </information><search> Bel"), ANSWER) as server:
        sampled(tiny_policy, server, tmp_path)
    [lesson] = endpoint.lessons(pool.read(tmp_path / pool.FILE), writer(tiny_policy))
    assert lesson.clean.turns[0].action_text == "<think> (answer)x a (/information)</think><search> Bel</search>"


def test_what_exceeds_the_limits_in_the_policys_tokens_is_left_out(tiny_policy, tmp_path):
    with answering(SEARCH, ANSWER) as server:
        sampled(tiny_policy, server, tmp_path)
    short = ROLLOUT.model_copy(update={"max_action_tokens": 16})
    assert endpoint.lessons(pool.read(tmp_path / pool.FILE), writer(tiny_policy, short)) == []


def test_an_endpoint_that_never_answers_correctly_is_one_line_at_once(tiny_policy, tmp_path):
    many = [ask(f"q{i}", f"Mayor of {i}?", "Cor Dun") for i in range(200)]
    with answering(*[completion("<answer>Fen")] * 2) as server, pytest.raises(EndpointError) as refusal:
        sampled(tiny_policy, server, tmp_path, asked=many)
    assert str(refusal.value) == (
        f"m at {server.url}: none of 64 trajectories is correct (0% malformed); name a stronger model in coldstart.endpoint, "
        "or check that the answers are in the corpus"
    )
    assert len(server.requests) == 64
    with answering(*[completion("Hm.")] * 5) as server, pytest.raises(EndpointError, match=r"none of 4 .* \(100% malformed\)"):
        sampled(tiny_policy, server, tmp_path)


def test_an_endpoint_that_is_down_or_no_endpoint_is_named(tiny_policy, tmp_path):
    with (
        misbehaving(lambda *_: (404, b"")) as server,
        pytest.raises(EndpointError, match=r"404 Not Found; check coldstart\.endpoint\.url"),
    ):
        sampled(tiny_policy, server, tmp_path)
    with pytest.raises(ConfigError, match=r"coldstart\.endpoint\.url"):
        assert endpoint.endpoint_of(EndpointConfig(url="ftp://x", model="m")).address


def test_an_interrupted_endpoint_is_asked_only_what_is_missing(tiny_policy, tmp_path):
    many = [ask(f"q{i}", "Mayor of Bel?", "Cor Dun") for i in range(40)]

    def reply(request, number):
        if number <= 70:
            return ANSWER
        time.sleep(0.5)  # the answers before have arrived: what is under way at a failure is lost
        return 404, b""

    work = tmp_path / "work"
    work.mkdir()
    with misbehaving(reply) as server, pytest.raises(EndpointError):
        sampled(tiny_policy, server, tmp_path, Checkpointer(work), many)
    with answering(ANSWER) as server:
        figures = sampled(tiny_policy, server, tmp_path, Checkpointer(work), many)
    assert (figures["questions"], figures["em"]) == (40, 1.0)
    assert 80 - 71 <= len(server.requests) < 80 - 64  # two chunks were whole, and of the third each answer is kept
    assert [group.question.id for group in pool.read(tmp_path / pool.FILE)] == [q.id for q in many]


@pytest.mark.parametrize("prompts", [TINY_PROMPTS, TOOLS])
def test_what_a_protocol_writes_it_reads(prompts):
    protocol = protocol_of(chat_tokenizer(), prompts)
    for action in (Action(ActionKind.SEARCH, 'a "b" é'), Action(ActionKind.ANSWER, "Cor Dun")):
        assert protocol.parse(protocol.write("a thought", action)) == action


def test_demonstrations_under_tools_are_calls_in_the_templates_form():
    by = Writer(chat_tokenizer(), TOOLS, ROLLOUT, TinyRetriever(PASSAGES[::-1]))
    question = ask("q", "Who is mayor of Bel?", "Cor Dun", gold_passage_ids=["p2"])
    [lesson] = hops.lessons(passages.plans([question], {p.id: p for p in PASSAGES}), by)
    assert lesson.clean.text == (
        "<think>\nI need to find Bel.\n</think>\n\n"
        '<tool_call>\n{"name": "search", "arguments": {"query": "Bel"}}\n</tool_call><|im_end|>'
        "\n<|im_start|>user\n<tool_response>\nDoc 1(Title: Bel) Bel is a city with mayor Cor Dun.\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
        "<think>\nBel: city with mayor Cor Dun. So the answer is Cor Dun.\n</think>\n\n<answer> Cor Dun </answer><|im_end|>"
    )
    end = by.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert [turn.action_ids[-1] for turn in lesson.clean.turns] == [end, end]
