"""Whatever bytes and texts come in: a record, an action, or an error of ours; and what goes out comes back the same."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attacks import hostile_texts
from chat import chat_tokenizer
from search_e1 import runs
from search_e1.config import Prompts
from search_e1.data.lines import parse
from search_e1.data.questions import to_question, to_record
from search_e1.errors import DataError, RunError
from search_e1.text.protocols import protocol_of
from search_e1.types import ActionKind, Group, Pair, Passage, Question, StopReason, Trajectory, Turn

UNDISTURBED = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
quick = settings(max_examples=50, deadline=None, suppress_health_check=UNDISTURBED)
TEXT = st.one_of(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), st.sampled_from(hostile_texts(200))).map(
    lambda text: text.encode("utf-8", "replace").decode()
)
WORDS = TEXT.filter(bool)
IDS = st.lists(st.integers(0, 2**31), min_size=1, max_size=5).map(tuple)
QUESTIONS = st.builds(
    Question, id=st.just("q"), text=WORDS, answers=st.lists(WORDS, min_size=1, max_size=3).map(tuple), benchmark=TEXT,
    hops=st.none() | st.integers(1, 9), metadata=st.dictionaries(TEXT, TEXT | st.integers() | st.none(), max_size=2),
)  # fmt: skip
SEARCHES = st.builds(
    Turn, action_ids=IDS, action_text=TEXT, kind=st.just(ActionKind.SEARCH), argument=TEXT, observation_ids=IDS,
    observation_text=TEXT, passage_ids=st.lists(TEXT, max_size=2).map(tuple),
)  # fmt: skip


@st.composite
def trajectories(draw) -> Trajectory:
    answer = draw(TEXT)
    last = Turn(action_ids=draw(IDS), action_text=draw(TEXT), kind=ActionKind.ANSWER, argument=answer)
    return Trajectory(
        question_id="q", prompt_ids=draw(IDS), turns=(*draw(st.lists(SEARCHES, max_size=3)), last),
        stop_reason=StopReason.ANSWERED, answer=answer, reward=1.0, f1=draw(st.floats(0, 1)),
    )  # fmt: skip


@quick
@given(QUESTIONS, trajectories(), trajectories(), TEXT, TEXT)
def test_records_come_back_from_json(question, one, two, title, text) -> None:
    passage = Passage(id=text, title=title, text=text)
    for record in (passage, question, one, Group(question=question, trajectories=(one, two)),
                   Pair(question=question, reference=one, student=two, reference_shown=text)):  # fmt: skip
        line = record.model_dump_json()
        assert "\n" not in line
        assert type(record).model_validate_json(line) == record


@quick
@given(QUESTIONS.filter(lambda question: all(text.strip() for text in (question.text, *question.answers))))
def test_a_question_comes_back_from_its_file(question) -> None:
    line = json.dumps(to_record(question)).encode()
    again = to_question(parse(line, "f:1"), question.benchmark, "f:1")
    assert (again.id, again.text, again.answers) == (question.id, question.text, question.answers)


FIELDS = st.sampled_from(["id", "question", "golden_answers", "metadata"])
JSON = st.recursive(
    st.none() | TEXT | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(FIELDS, inner), max_leaves=8
)


@quick
@given(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_line_is_a_question_or_our_error(line: bytes) -> None:
    said = "f:1: "
    try:
        assert isinstance(to_question(parse(line, "f:1"), "", "f:1"), Question)
    except DataError as error:
        said = str(error)
    assert said.startswith("f:1: ")


@pytest.mark.parametrize("protocol", ["tags", "tools"])
@quick
@given(TEXT, TEXT)
def test_any_text_is_an_action(protocol: str, text: str, more: str) -> None:
    acting = protocol_of(chat_tokenizer(), Prompts.model_validate({"protocol": protocol}))
    for said in (text, text + more, f"<search>{text}</search>", f"<answer>{text}", f"<tool_call>{text}</tool_call>"):
        action = acting.parse(said)
        assert (action.argument is None) == (action.kind is ActionKind.MALFORMED)
        assert action.kind is not ActionKind.SEARCH or action.argument
        assert all(0 <= span.begin <= span.end <= len(said) for span in acting.spans(said))
        begins = acting.begins(said)
        assert begins is None or 0 <= begins <= len(said)
        acting.passages(said)


@quick
@given(
    st.dictionaries(TEXT, TEXT | st.integers(-(2**53), 2**53) | st.booleans() | st.none(), max_size=3),
    st.integers(0, 10**9),
)
def test_a_manifest_comes_back_or_is_refused(tmp_path: Path, values, bit) -> None:
    path = tmp_path / str(len(list(tmp_path.iterdir())))
    made = runs.artifact(path, stage="s", settings=values, inputs={}, seed=1, make=lambda out: {"figures": values})
    assert runs.read(path).manifest == made.manifest
    assert made.manifest.result == {"figures": values}
    file = path / runs.MANIFEST
    content = bytearray(file.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    file.write_bytes(content)
    with pytest.raises(RunError, match="damaged"):
        runs.read(path)
