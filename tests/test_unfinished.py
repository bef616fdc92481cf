"""A rollout that a signal interrupts: it ends at the next step, and the same call goes on without sampling anything again."""

import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from conftest import PASSAGES, TinyRetriever
from scripted import ScriptedEngine
from search_e1.config import Prompts, RolloutConfig
from search_e1.errors import RetrievalError
from search_e1.rollout.engines.continuous import ContinuousSession
from search_e1.rollout.engines.endpoint import Endpoint, EndpointEngine
from search_e1.rollout.engines.torch import TorchEngine
from search_e1.rollout.loop import rollout
from search_e1.rollout.starts import starts
from search_e1.rollout.unfinished import Unfinished
from search_e1.runs.stopping import Stop, Stopped
from search_e1.types import Question, Trajectory
from serving import misbehaving
from test_endpoint import completion

PROMPTS = Prompts(instruction="Q: {question}\n", correction="\nNo.\n")
LIMITS = RolloutConfig(max_searches=2, topk=1, max_action_tokens=24, max_observation_tokens=100, max_tokens=512)
SCRIPT = {
    "one?": ["<answer> a </answer>"],
    "two?": ["<search>arda</search>", "<answer> b </answer>"],
    "three?": ["<search>bel</search>", "<search>arda</search>", "<answer> c </answer>"],
}


def play(engine: Any, retriever: Any, unfinished: Unfinished | None = None, **changes: Any) -> list[Trajectory]:
    questions = [Question(id=text, text=text, answers=("a",)) for text in SCRIPT]
    begun = starts(engine.tokenizer, PROMPTS, questions, group_size=2)
    given = dict(temperature=1.0, seed=3, prompts=PROMPTS, unfinished=unfinished) | changes
    return rollout(engine, retriever, begun, LIMITS, **given)


class Interrupting(TinyRetriever):
    """Asks to stop with its n-th batch of queries."""

    def __init__(self, stop: Stop, at: int) -> None:
        super().__init__(PASSAGES)
        self.stop, self.at, self.queries = stop, at, []

    def search(self, queries: Sequence[str], topk: int) -> Any:
        self.queries += queries
        self.at -= 1
        if self.at == 0:
            self.stop.asked = signal.SIGTERM
        return super().search(queries, topk)


def lasting(directory: Path) -> Callable[[], Unfinished]:
    return lambda: Unfinished(directory / "unfinished.json", Stop())


@pytest.mark.parametrize("at", [1, 2])
def test_whole_batches_are_resumed(tiny_policy, tmp_path, at: int) -> None:
    expected = play(ScriptedEngine(tiny_policy.tokenizer, SCRIPT), TinyRetriever(PASSAGES))
    place, first = lasting(tmp_path)(), ScriptedEngine(tiny_policy.tokenizer, SCRIPT)
    with pytest.raises(Stopped):
        play(first, Interrupting(place.stop, at), place)
    again, told = ScriptedEngine(tiny_policy.tokenizer, SCRIPT), []
    done = play(again, TinyRetriever(PASSAGES), lasting(tmp_path)(), on_trajectory=lambda i, _: told.append(i))
    assert done == expected
    assert sorted(told) == list(range(6))
    asked = [prompt for engine in (first, again) for call in engine.calls for prompt in call["prompts"]]
    assert len(asked) == 12  # as many as actions: nothing is sampled twice
    assert not (tmp_path / "unfinished.json").exists()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("steps", [1, 7, 40])
def test_the_action_at_hand_is_continued(tiny_policy, tmp_path, monkeypatch, steps: int, temperature: float) -> None:
    engine = TorchEngine(tiny_policy.model, tiny_policy.tokenizer)
    expected = play(engine, TinyRetriever(PASSAGES), temperature=temperature)
    place, step, taken, sampled = lasting(tmp_path)(), ContinuousSession.step, [], []

    def counted(session: ContinuousSession) -> Any:
        taken.append(session)
        if len(taken) == steps:
            place.stop.asked = signal.SIGTERM
        return step(session)

    monkeypatch.setattr(ContinuousSession, "step", counted)
    with pytest.raises(Stopped):
        play(engine, TinyRetriever(PASSAGES), place, temperature=temperature)
    assert len(taken) == steps
    submit = ContinuousSession.submit
    monkeypatch.setattr(
        ContinuousSession, "submit", lambda session, request: (sampled.append(request), submit(session, request))[1]
    )
    done = play(engine, TinyRetriever(PASSAGES), lasting(tmp_path)(), temperature=temperature)
    assert (sum(len(request.begun.ids) for request in sampled) > 0) == (steps > 1)  # the first ends before its prefill
    assert [t.response_ids for t in done] == [t.response_ids for t in expected]
    for ours, theirs in zip(done, expected, strict=True):
        for turn, other in zip(ours.turns, theirs.turns, strict=True):
            assert turn.sampling_logprobs == pytest.approx(other.sampling_logprobs, abs=1e-5)


def test_a_stop_that_never_comes_changes_nothing(tiny_policy, tmp_path) -> None:
    engine = TorchEngine(tiny_policy.model, tiny_policy.tokenizer)
    assert play(engine, TinyRetriever(PASSAGES), lasting(tmp_path)()) == play(engine, TinyRetriever(PASSAGES))


@pytest.mark.parametrize("changes", [{"seed": 4}, {"temperature": 0.5}])
def test_another_call_begins_anew(tiny_policy, tmp_path, changes) -> None:
    place = lasting(tmp_path)()
    with pytest.raises(Stopped):
        play(ScriptedEngine(tiny_policy.tokenizer, SCRIPT), Interrupting(place.stop, 1), place)
    again = ScriptedEngine(tiny_policy.tokenizer, SCRIPT)
    play(again, TinyRetriever(PASSAGES), lasting(tmp_path)(), **changes)
    assert len(again.calls[0]["prompts"]) == 6


def test_a_damaged_file_is_left(tiny_policy, tmp_path) -> None:
    place = lasting(tmp_path)()
    with pytest.raises(Stopped):
        play(ScriptedEngine(tiny_policy.tokenizer, SCRIPT), Interrupting(place.stop, 1), place)
    path = tmp_path / "unfinished.json"
    path.write_bytes(path.read_bytes().replace(b"one?", b"two?").replace(b"answer", b"anwser"))
    again = ScriptedEngine(tiny_policy.tokenizer, SCRIPT)
    play(again, TinyRetriever(PASSAGES), lasting(tmp_path)())
    assert len(again.calls[0]["prompts"]) == 6


def test_a_retriever_that_hangs_is_not_waited_for(tiny_policy, tmp_path) -> None:
    place, held = lasting(tmp_path)(), threading.Event()

    class Hanging(TinyRetriever):
        def search(self, queries: Sequence[str], topk: int) -> Any:
            place.stop.asked = signal.SIGTERM
            held.wait(120)
            return super().search(queries, topk)

    clock = time.monotonic()
    with pytest.raises(Stopped):
        play(ScriptedEngine(tiny_policy.tokenizer, SCRIPT), Hanging(PASSAGES), place)
    assert time.monotonic() - clock < 60  # a fraction of a second
    held.set()
    done = play(ScriptedEngine(tiny_policy.tokenizer, SCRIPT), TinyRetriever(PASSAGES), lasting(tmp_path)())
    assert [t.answer for t in done] == ["a", "a", "b", "b", "c", "c"]


def endpoint_reply(request: dict[str, Any], number: int) -> tuple[int, bytes]:
    """What ``SCRIPT`` says, over HTTP."""
    told = [message["content"] for message in request["messages"]]
    [question] = [q for q in SCRIPT if q in told[0]]
    return completion(SCRIPT[question][sum("<information>" in text for text in told)])


def test_answers_of_an_endpoint_are_kept_as_they_arrive(tmp_path) -> None:
    """Whatever ends the call: no answer is asked for again, of unfinished trajectories neither."""
    place = lasting(tmp_path)()
    with misbehaving(endpoint_reply) as server:
        with pytest.raises(Stopped):
            play(EndpointEngine(Endpoint(server.url, "m"), PROMPTS), Interrupting(place.stop, 1), place)
        asked = len(server.requests)
        assert asked < 12

    class Broken(TinyRetriever):
        def search(self, queries: Sequence[str], topk: int) -> Any:
            raise RetrievalError("down")

    with misbehaving(endpoint_reply) as server:
        with pytest.raises(RetrievalError):
            play(EndpointEngine(Endpoint(server.url, "m"), PROMPTS), Broken(PASSAGES), lasting(tmp_path)())
        asked += len(server.requests)
    with misbehaving(endpoint_reply) as server:
        again = EndpointEngine(Endpoint(server.url, "m"), PROMPTS)
        again.tokenizer.encode("words that shift all others")
        done = play(again, TinyRetriever(PASSAGES), lasting(tmp_path)())
        assert [t.answer for t in done] == ["a", "a", "b", "b", "c", "c"]
        # Those in flight when a call ended were never read.
        assert 12 <= asked + len(server.requests) <= 12 + 2 * 8
        before = len(server.requests)
        assert play(again, TinyRetriever(PASSAGES), lasting(tmp_path)()) == done
        assert len(server.requests) == before  # the call was whole: nothing is asked
        play(again, TinyRetriever(PASSAGES), lasting(tmp_path)(), seed=4)
        assert len(server.requests) == before + 12  # another call


@pytest.mark.parametrize("damage", [lambda data: data[:-20], lambda data: b"</anwser>".join(data.rsplit(b"</answer>", 1))])
def test_of_damaged_answers_the_rest_is_asked_again(tmp_path, damage) -> None:
    with misbehaving(endpoint_reply) as server:
        engine = EndpointEngine(Endpoint(server.url, "m", concurrency=1), PROMPTS)
        expected = play(engine, TinyRetriever(PASSAGES), lasting(tmp_path)())
        [kept] = tmp_path.glob("*-answers.jsonl")
        kept.write_bytes(damage(kept.read_bytes()))
        assert play(engine, TinyRetriever(PASSAGES), lasting(tmp_path)()) == expected
        assert 12 < len(server.requests) < 24
