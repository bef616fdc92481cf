from html.parser import HTMLParser

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from search_e1.types import ActionKind, Group, Pair, Passage, Question, Sample, StopReason, Trajectory, Turn

relaxed = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])  # cores may be busy
QUESTION = Question(id="q", text="Who?", answers=("Ann",))
IDS = st.lists(st.integers(0, 200_000), min_size=1, max_size=8).map(tuple)
TEXT = st.text(max_size=20)


def search(ids: tuple[int, ...] = (1, 2), seen: tuple[int, ...] = (3,), **more) -> Turn:
    return Turn(action_ids=ids, action_text="s", kind=ActionKind.SEARCH, argument="x", observation_ids=seen, **more)


def answer(ids: tuple[int, ...] = (4, 5), **more) -> Turn:
    return Turn(action_ids=ids, action_text="a", kind=ActionKind.ANSWER, argument="Ann", **more)


def trajectory(*turns: Turn, question_id: str = "q", reward: float = 1.0) -> Trajectory:
    return Trajectory(
        question_id=question_id,
        prompt_ids=(9,),
        turns=turns,
        stop_reason=StopReason.ANSWERED,
        answer="Ann",
        reward=reward,
    )


@st.composite
def turns(draw: st.DrawFn, last: bool) -> Turn:
    kind = draw(st.sampled_from([ActionKind.SEARCH, ActionKind.MALFORMED]))
    ids = draw(IDS)
    logprobs = st.lists(st.floats(-50, 0), min_size=len(ids), max_size=len(ids)).map(tuple)
    return Turn(
        action_ids=ids,
        action_text=draw(TEXT),
        kind=kind,
        argument=draw(TEXT) if kind is ActionKind.SEARCH else None,
        observation_ids=() if last else draw(IDS),
        observation_text="" if last else draw(TEXT),
        passage_ids=draw(st.lists(TEXT, max_size=3).map(tuple)) if kind is ActionKind.SEARCH else (),
        sampling_logprobs=draw(st.none() | logprobs),
    )


@st.composite
def trajectories(draw: st.DrawFn) -> Trajectory:
    taken = draw(st.lists(turns(last=False), max_size=4))
    if draw(st.booleans()):
        final, reason = draw(st.text(max_size=20)), StopReason.ANSWERED
        taken.append(Turn(action_ids=draw(IDS), action_text=draw(TEXT), kind=ActionKind.ANSWER, argument=final))
    else:
        final, reason = None, draw(st.sampled_from([r for r in StopReason if r is not StopReason.ANSWERED]))
        taken.append(draw(turns(last=True)))
    return Trajectory(
        question_id="q",
        prompt_ids=draw(IDS),
        turns=tuple(taken),
        stop_reason=reason,
        answer=final,
        reward=draw(st.sampled_from([0.0, 1.0])) if final is not None else 0.0,
        f1=draw(st.floats(0, 1)),
    )


@relaxed
@given(trajectories())
def test_mask_and_ids_come_from_the_turns(t: Trajectory) -> None:
    assert len(t.action_mask) == len(t.response_ids)
    assert sum(t.action_mask) == t.sampled_tokens == sum(len(turn.action_ids) for turn in t.turns)
    sampled = [i for i, m in zip(t.response_ids, t.action_mask, strict=True) if m]
    assert sampled == [i for turn in t.turns for i in turn.action_ids]
    inserted = [i for i, m in zip(t.response_ids, t.action_mask, strict=True) if not m]
    assert inserted == [i for turn in t.turns for i in turn.observation_ids]
    assert t.searches == sum(turn.kind is ActionKind.SEARCH for turn in t.turns[:-1])


@relaxed
@given(trajectories())
def test_records_survive_json(t: Trajectory) -> None:
    group = Group(question=QUESTION, trajectories=(t, t))
    assert Group.model_validate_json(group.model_dump_json()) == group
    line = t.model_dump_json()
    assert "\n" not in line
    assert Trajectory.model_validate_json(line).model_dump_json() == line


def test_a_trajectory_by_hand() -> None:
    t = trajectory(search((1, 2), (7, 8, 9), observation_text="o"), answer((4,)))
    assert t.response_ids == (1, 2, 7, 8, 9, 4)
    assert t.action_mask == (1, 1, 0, 0, 0, 1)
    assert (t.text, t.searches, t.sampled_tokens, t.correct) == ("soa", 1, 3, True)


def test_an_unanswered_search_is_not_counted() -> None:
    last = Turn(action_ids=(1,), action_text="s", kind=ActionKind.SEARCH, argument="x")
    t = Trajectory(question_id="q", prompt_ids=(9,), turns=(search(), last), stop_reason=StopReason.MAX_TURNS)
    assert [turn.served for turn in t.turns] == [True, False]
    assert t.searches == 1


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: search(ids=()), "at least 1 item"),
        (lambda: Turn(action_ids=(1,), action_text="", kind=ActionKind.SEARCH), "a search action with argument None"),
        (
            lambda: Turn(action_ids=(1,), action_text="", kind=ActionKind.MALFORMED, argument="x"),
            "a malformed action with argument 'x'",
        ),
        (lambda: search(sampling_logprobs=(0.0,)), "1 sampling_logprobs for 2 action_ids"),
        (lambda: answer(observation_ids=(1,)), "an observation after an answer"),
        (lambda: answer(passage_ids=("p",)), "passages without a search"),
        (lambda: trajectory(answer(), answer()), "a turn after an answer"),
        (lambda: trajectory(answer(), search()), "a turn after an answer"),
        (lambda: trajectory(search()), "an observation that nothing follows"),
        (
            lambda: Trajectory(question_id="q", prompt_ids=(1,), turns=(), stop_reason=StopReason.ANSWERED),
            "stop_reason answered with answer None",
        ),
        (
            lambda: Trajectory(question_id="q", prompt_ids=(1,), turns=(), stop_reason=StopReason.MAX_TURNS, answer="x"),
            "stop_reason max_turns with answer 'x'",
        ),
        (
            lambda: Trajectory(question_id="q", prompt_ids=(1,), turns=(), stop_reason=StopReason.MALFORMED, reward=1.0),
            "a reward without an answer",
        ),
        (lambda: Group(question=QUESTION, trajectories=()), "at least 1 item"),
        (
            lambda: Group(question=QUESTION, trajectories=(trajectory(answer(), question_id="z"),)),
            r"trajectories of \['z'\] in the group of 'q'",
        ),
        (
            lambda: Pair(question=QUESTION, reference=trajectory(answer(), reward=0.0), student=trajectory(answer())),
            "a reference that is not correct",
        ),
        (
            lambda: Pair(question=QUESTION, reference=trajectory(answer()), student=trajectory(answer(), question_id="z")),
            "a pair across questions",
        ),
        (lambda: Question(id="q", text="Who?", answers=()), "a question needs an answer, or metadata.unanswerable"),
        (lambda: Question(id="q", text="Who?", answers=("x",), gold="x"), "Extra inputs"),
    ],
)
def test_what_cannot_be_is_refused(make, says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        make()


def test_records_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        QUESTION.id = "other"


@pytest.mark.parametrize(
    ("contents", "title", "text"),
    [
        ('"Bel"\nA city.\nOld.', "Bel", "A city.\nOld."),
        ('"The "Bel""\nx', 'The "Bel"', "x"),
        ("Bel\nA city.", "Bel", "A city."),
        ("A city.", "", "A city."),
        ('"Bel"', "", '"Bel"'),
        ('"\nx', '"', "x"),
        ("", "", ""),
    ],
)
def test_passages_from_contents(contents: str, title: str, text: str) -> None:
    assert Passage.from_contents("1", contents) == Passage(id="1", title=title, text=text)


@relaxed
@given(st.text(max_size=10).filter(lambda title: "\n" not in title), st.text(max_size=20))
def test_contents_and_back(title: str, text: str) -> None:
    passage = Passage(id="1", title=title, text=text)
    assert Passage.from_contents("1", passage.contents) == passage


def test_a_repr_shows_no_wall_of_ids() -> None:
    t = trajectory(search(ids=(1,) * 4000, passage_ids=("p1",)), answer(), question_id="q")
    assert "1, 1, 1" not in str(t)
    assert repr(t) == (
        "Trajectory(question_id='q', reward=1.0, answer='Ann', stop_reason='answered', searches=1, sampled_tokens=4002)"
    )
    assert repr(t.turns[0]) == (
        "Turn(kind='search', argument='x', sampled_tokens=4000, observation_tokens=1, passage_ids=('p1',))"
    )
    group = Group(question=QUESTION, trajectories=(t, t.model_copy(update={"reward": 0.0})))
    assert repr(group) == "Group(question=Question(id='q', text='Who?', answers=('Ann',)), trajectories=2, correct=1)"
    pair = Pair(question=QUESTION, reference=t, student=t)
    assert repr(pair) == f"Pair(question={QUESTION!r}, reference={t!r}, student={t!r})"
    sample = Sample(question_id="q", prompt_ids=(1,) * 900, response_ids=(1, 2, 3), action_mask=(1, 0, 1))
    assert repr(sample) == "Sample(question_id='q', prompt_tokens=900, response_tokens=3, positions=2)"
    long = Question(id="q", text="x" * 500, answers=tuple("abcde"), benchmark="nq", hops=2)
    assert repr(long) == (
        f"Question(id='q', text='{'x' * 60}...', answers=('a', 'b', 'c', 'and 2 more'), benchmark='nq', hops=2)"
    )


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        assert all(name == "style" for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


EVIL = "</pre><script>alert(1)</script><img src=x onerror=alert(1)>&lt;\ud800"


def test_a_notebook_shows_what_a_model_says_as_text() -> None:
    turns = (
        search().model_copy(update={"action_text": EVIL, "observation_text": EVIL}),
        answer().model_copy(update={"action_text": "<answer>Ann</answer>"}),
    )
    html = trajectory(*turns, question_id=EVIL).model_copy(update={"answer": EVIL})._repr_html_()
    html.encode()
    shown = Tags()
    shown.feed(html)
    assert shown.seen == {"div", "b", "pre", "details", "summary"}
    assert shown.text.count(EVIL.replace("\ud800", "?")) == 3  # and once more in quotes, as Python writes it
    assert "<answer>Ann</answer>" in shown.text
    none = Trajectory(question_id="q", prompt_ids=(9,), turns=(search(seen=()),), stop_reason=StopReason.MAX_TURNS)
    assert "q: no answer (max_turns), reward 0, 0 searches, 2 tokens" in none._repr_html_()
