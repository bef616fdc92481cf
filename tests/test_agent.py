"""The agent in use: the ids that rollouts sample, many at once; sources; what is cancelled, fails, or does not fit."""

import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest

from chat import chat_tokenizer
from conftest import PASSAGES, TinyRetriever, make_tiny_policy
from scripted import ScriptedEngine
from search_e1.agent.agent import Agent
from search_e1.agent.answer import NOT_FOUND, Support, locate
from search_e1.agent.scheduler import TextStream
from search_e1.config import Prompts, RolloutConfig
from search_e1.errors import ConfigError, ModelError, RetrievalError, SearchE1Error
from search_e1.rollout.engines.torch import TorchEngine
from search_e1.rollout.loop import rollout
from search_e1.rollout.starts import Start
from search_e1.text.prompts import plain_prompt
from search_e1.types import Passage, Question, StopReason

PROMPTS = Prompts(instruction="Question: {question}\n", correction="\nNo.\n", privileged="{instruction}{reference}\n")
LIMITS = RolloutConfig(max_searches=3, topk=2, max_action_tokens=40, max_observation_tokens=300, max_tokens=1000, batch_size=4)


def scripted(script: dict[str, list[str]], passages=PASSAGES, limits=LIMITS) -> Agent:
    engine = ScriptedEngine(make_tiny_policy().tokenizer, script)
    return Agent(engine, TinyRetriever(passages), limits, prompts=PROMPTS)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_many_threads_get_the_ids_that_a_rollout_samples(temperature: float) -> None:
    policy, retriever = make_tiny_policy(), TinyRetriever(PASSAGES)
    questions = [Question(id=f"q{i}", text=f"{name} {i}?", answers=("x",)) for i, name in enumerate(["Arda", "Bel", "Fen"] * 4)]
    starts = [Start(q, plain_prompt(policy.tokenizer, policy.prompts, q.text)) for q in questions]
    expected = rollout(
        TorchEngine(policy.model, policy.tokenizer), retriever, starts, LIMITS, temperature=temperature, seed=5,
        prompts=policy.prompts,
    )  # fmt: skip
    with Agent(policy, retriever, LIMITS) as agent, ThreadPoolExecutor(12) as threads:
        asked = [threads.submit(agent.ask, q, temperature=temperature, seed=5) for q in questions]
        answers = [future.result() for future in asked]
    assert [a.trajectory.response_ids for a in answers] == [t.response_ids for t in expected]
    assert [a.text for a in answers] == [t.answer for t in expected]


def test_rows_of_several_temperatures_are_sampled_together() -> None:
    policy, retriever = make_tiny_policy(), TinyRetriever(PASSAGES)
    with Agent(policy, retriever, LIMITS) as agent:
        alone = [agent.ask("Arda?", temperature=t, seed=1).trajectory.response_ids for t in (0.0, 0.7, 1.0)]
        jobs = [agent.submit("Arda?", temperature=t, seed=1) for t in (0.0, 0.7, 1.0)]
        together = [job.answer.result().trajectory.response_ids for job in jobs]
    assert together == alone
    assert len(set(alone)) == 3


def test_a_temperature_next_to_zero_is_greedy_and_disturbs_no_other() -> None:
    with Agent(make_tiny_policy(), TinyRetriever(PASSAGES), LIMITS) as agent:
        jobs = [agent.submit("Arda?", temperature=t, seed=1) for t in (0.0, 1e-245, 1e-40)]
        ids = [job.answer.result().trajectory.response_ids for job in jobs]
    assert ids[0] == ids[1] == ids[2]


def test_the_passage_that_holds_the_answer_is_marked_and_comes_first() -> None:
    passages = [
        Passage(id="a", title="Rivers", text="The mayor of Bel likes rivers.", metadata={"file": "r.pdf", "page": 3}),
        Passage(
            id="b", title="Bel", text="Bel's mayor is Cor  Dun. The (cor dun) family is old.", metadata={"url": "http://x/b"}
        ),
    ]
    with scripted({"Mayor?": ["<search> mayor of bel </search>", "<answer> the Cor Dun </answer>"]}, passages) as agent:
        answer = agent.ask("Mayor?")
    assert (str(answer), answer.support, answer.found) == ("the Cor Dun", Support.HELD, True)
    first, second = answer.sources
    assert (first.passage.id, first.holds, first.query, first.turn) == ("b", True, "mayor of bel", 0)
    assert [first.passage.text[begin:end] for begin, end in first.marks] == ["Cor  Dun", "cor dun"]
    assert (second.passage.id, second.holds, second.marks) == ("a", False, ())
    told = answer.as_json()
    assert told["searches"] == ["mayor of bel"]
    assert [(s["id"], s.get("file"), s.get("page"), s.get("url")) for s in told["sources"]] == [
        ("b", None, None, "http://x/b"), ("a", "r.pdf", 3, None),
    ]  # fmt: skip


def test_what_was_cut_off_was_not_read() -> None:
    long = Passage(id="p", title="Bel", text="mayor " + "word " * 60 + "Cor Dun")
    limits = LIMITS.model_copy(update={"max_observation_tokens": 120})
    with scripted({"Mayor?": ["<search> mayor </search>", "<answer> Cor Dun </answer>"]}, [long], limits) as agent:
        answer = agent.ask("Mayor?")
    assert "Cor Dun" not in answer.trajectory.text.partition("<answer>")[0]
    assert (answer.support, answer.sources[0].holds, answer.sources[0].marks) == (Support.GUESS, False, ())


@pytest.mark.parametrize(
    ("last", "support", "said"),
    [
        ("<answer> Gil Hor </answer>", Support.GUESS, NOT_FOUND),
        ("<answer> Yes. </answer>", Support.YES_NO, "Yes."),
        ("<answer> ... </answer>", Support.GUESS, NOT_FOUND),
        ("<search> bel </search>", Support.NONE, NOT_FOUND),
    ],
)
def test_an_answer_that_nothing_read_holds_is_not_found(last: str, support: Support, said: str) -> None:
    with scripted({"Mayor?": [*["<search> bel </search>"] * 3, last]}) as agent:
        answer = agent.ask("Mayor?")
    assert (answer.support, str(answer)) == (support, said)
    assert {source.passage.id for source in answer.sources} == {"p1", "p2"}  # read thrice, told once


@pytest.mark.parametrize(
    ("text", "answer", "found"),
    [
        ("In 1961/1963 it rained.", "1963", ["1963"]),
        ("Zo\u00e9's is Zo\u00e9", "zoe\u0301", ["Zo\u00e9", "Zo\u00e9"]),
        ("the an a", "the", []),
        ("New York, New York", "new york", ["New York", "New York"]),
        ("Paris-based; paris", "Paris", ["Paris", "paris"]),
        ("aa aa aa", "aa aa", ["aa aa"]),
        ("", "x", []),
    ],
)
def test_where_an_answer_stands(text: str, answer: str, found: list[str]) -> None:
    assert [text[begin:end] for begin, end in locate(text, answer)] == found


def test_text_streams_in_whole_characters_without_end_tokens_and_joins_to_what_was_said() -> None:
    tokenizer = chat_tokenizer()
    ids = tokenizer.encode("Zo\u00eb \u65e5\u672c x<|im_end|>")
    heard: list[str] = []
    stream = TextStream(tokenizer, frozenset(tokenizer.all_special_ids), heard.append)
    for n in range(1, len(ids) + 1):
        stream.feed(ids[:n])
    stream.finish(ids)
    assert "".join(heard) == "Zo\u00eb \u65e5\u672c x"
    assert len(heard) == 8
    stream.finish(ids[:1])  # the next generation begins anew
    assert heard[-1] == "Z"


def test_what_is_sampled_is_told_while_it_is_sampled() -> None:
    policy = make_tiny_policy()
    pieces: list[str] = []
    with Agent(policy, TinyRetriever(PASSAGES), LIMITS) as agent:
        answer = agent.ask("Arda?", on_text=pieces.append)
    special = policy.tokenizer.all_special_ids
    said = ([i for i in turn.action_ids if i not in special] for turn in answer.trajectory.turns)
    assert len(pieces) > 3
    assert "".join(pieces) == "".join(policy.tokenizer.decode(ids).rstrip("\N{REPLACEMENT CHARACTER}") for ids in said)


def test_a_question_that_does_not_fit_fails_alone() -> None:
    with scripted({"Mayor?": ["<answer> Cor Dun </answer>"]}) as agent:
        long, short = agent.submit("x" * 2000), agent.submit("Mayor?")
        assert short.answer.result(30).text == "Cor Dun"
        with pytest.raises(ModelError, match="does not fit into 1000"):
            long.answer.result(30)
        with pytest.raises(ConfigError, match="empty"):
            agent.ask(" ")


class Gate(TinyRetriever):
    """Answers when it is opened; fails when it is told to."""

    def __init__(self) -> None:
        super().__init__(PASSAGES)
        self.asked, self.open, self.broken = threading.Event(), threading.Event(), False

    def search(self, queries, topk):
        self.asked.set()
        self.open.wait(30)
        if self.broken:
            raise RetrievalError("http://x: no passages after 4 attempts")
        return super().search(queries, topk)


SCRIPT = {"One?": ["<search> bel </search>", "<answer> Cor Dun </answer>"], "Two?": ["<answer> two </answer>"]}


def test_a_cancelled_question_leaves_and_others_go_on_while_a_search_takes_long() -> None:
    gate = Gate()
    engine = ScriptedEngine(make_tiny_policy().tokenizer, SCRIPT)
    with Agent(engine, gate, LIMITS, prompts=PROMPTS) as agent:
        one = agent.submit("One?")
        assert gate.asked.wait(30)
        assert agent.ask("Two?", timeout=30).text == "two"  # the search of another is no hindrance
        agent.cancel(one)
        assert one.answer.cancelled()
        with pytest.raises(CancelledError):
            one.answer.result()
        with pytest.raises(TimeoutError):
            agent.ask("One?", timeout=0.1)
        gate.open.set()
        assert agent.ask("One?", timeout=30).text == "Cor Dun"
    assert len(engine.calls) == 5  # nothing was sampled of the cancelled ones after their search


def test_a_failed_search_ends_what_is_under_way_and_nothing_else() -> None:
    gate = Gate()
    gate.open.set()
    gate.broken = True
    with Agent(ScriptedEngine(make_tiny_policy().tokenizer, SCRIPT), gate, LIMITS, prompts=PROMPTS) as agent:
        with pytest.raises(RetrievalError, match="no passages after 4 attempts"):
            agent.ask("One?", timeout=30)
        gate.broken = False
        assert agent.ask("One?", timeout=30).text == "Cor Dun"


def test_a_callback_that_raises_ends_its_question_alone() -> None:
    def broken(*_) -> None:
        raise BrokenPipeError("gone")

    with scripted(SCRIPT) as agent:
        jobs = [agent.submit("One?", on_turn=broken), agent.submit("Two?", on_text=broken), agent.submit("One?")]
        assert jobs[2].answer.result(30).text == "Cor Dun"
        for job in jobs[:2]:
            with pytest.raises(BrokenPipeError):
                job.answer.result(30)


def test_a_closed_agent_answers_nothing_and_leaves_nobody_waiting() -> None:
    gate = Gate()
    agent = Agent(ScriptedEngine(make_tiny_policy().tokenizer, SCRIPT), gate, LIMITS, prompts=PROMPTS)
    one = agent.submit("One?")
    assert gate.asked.wait(30)
    closing = threading.Thread(target=agent.close)
    closing.start()
    with pytest.raises(SearchE1Error, match="closed before it answered"):
        one.answer.result(30)
    gate.open.set()
    closing.join(30)
    with pytest.raises(SearchE1Error, match="is closed"):
        agent.submit("Two?")


def test_rows_that_leave_in_the_middle_disturb_no_other() -> None:
    policy, retriever = make_tiny_policy(), TinyRetriever(PASSAGES)
    limits = LIMITS.model_copy(update={"max_searches": 1})
    texts = [f"Arda {i}?" for i in range(6)]
    with Agent(policy, retriever, limits) as agent:
        alone = [agent.ask(text).trajectory.response_ids for text in texts]
        begun = threading.Event()
        jobs = [agent.submit(text, on_text=lambda _: begun.set()) for text in texts]
        assert begun.wait(30)
        for job in jobs[::2]:
            agent.cancel(job)
        kept = [job.answer.result(60) for job in jobs[1::2]]
        assert [answer.trajectory.response_ids for answer in kept] == alone[1::2]
        assert {answer.trajectory.stop_reason for answer in kept} <= {StopReason.MALFORMED, StopReason.MAX_TOKENS}


def test_an_answer_is_held_by_the_rule_of_its_language() -> None:
    passages = [Passage(id="zh", title="北京", text="Bel 中国的首都是北京。")]
    script = {"首都?": ["<search> bel </search>", "<answer> 北 京 </answer>"]}
    with scripted(script, passages) as agent:
        assert agent.ask("首都?").support is Support.GUESS
    with scripted(script, passages, LIMITS.model_copy(update={"answer_language": "zh"})) as agent:
        answer = agent.ask("首都?")
    assert answer.support is Support.HELD
    assert answer.sources[0].marks == ((10, 12),)
