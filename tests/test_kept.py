"""Groups that GRPO keeps: the newest of each question, whatever was left behind by a kill."""

import pytest

from search_e1.rollout import pool
from search_e1.runs.context import StageContext
from search_e1.stages.kept import Groups, keeping
from search_e1.types import Group, Question, StopReason, Trajectory


def group(name: str, step: int) -> Group:
    """Its trajectory tells the step."""
    made = Trajectory(question_id=name, prompt_ids=(step + 1,), turns=(), stop_reason=StopReason.MAX_TOKENS)
    return Group(question=Question(id=name, text="a\tb?", answers=("x",)), trajectories=(made,))


def steps_of(path) -> list[tuple[str, int]]:
    return [(g.question.id, g.trajectories[0].prompt_ids[0] - 1) for g in pool.read(path)]


def sample(groups: Groups, *steps: int) -> None:
    """Questions a and b in even steps, b and c\\t in odd ones."""
    for step in steps:
        groups.add(step, [group(name, step) for name in (("b", "c\t") if step % 2 else ("a", "b"))])


def test_the_newest_group_of_each_question_comes_first(tmp_path):
    groups = Groups(tmp_path / "groups")
    sample(groups, 0, 1, 2)
    groups.write_newest(tmp_path / "newest")
    assert steps_of(tmp_path / "newest") == [("b", 2), ("a", 2), ("c\t", 1)]


def test_after_a_kill_what_is_sampled_again_is_not_there_twice(tmp_path):
    """The checkpoint was of two steps; the third was sampled, and the fourth half written."""
    sample(Groups(tmp_path / "groups"), 0, 1, 2)
    with (tmp_path / "groups").open("ab") as file:
        file.write(b'3\t"b"\t{"question')
    groups = Groups(tmp_path / "groups")
    sample(groups, 2)
    whole = Groups(tmp_path / "whole")
    sample(whole, 0, 1, 2)
    assert (tmp_path / "groups").read_bytes() == (tmp_path / "whole").read_bytes()
    groups = Groups(tmp_path / "groups")
    sample(groups, 1)
    groups.write_newest(tmp_path / "newest")
    assert steps_of(tmp_path / "newest") == [("c\t", 1), ("b", 1), ("a", 0)]


@pytest.mark.parametrize("torn", [b"1", b'1\t"b"\t{"ques'])
def test_a_line_torn_by_a_kill_is_dropped_and_takes_none_with_it(tmp_path, torn):
    sample(Groups(tmp_path / "groups"), 0)
    with (tmp_path / "groups").open("ab") as file:
        file.write(torn)
    groups = Groups(tmp_path / "groups")
    sample(groups, 1, 2)
    groups.write_newest(tmp_path / "newest")
    assert steps_of(tmp_path / "newest") == [("b", 2), ("a", 2), ("c\t", 1)]


def test_nothing_is_kept_unasked_and_nothing_but_the_newest_in_the_end(tmp_path):
    with keeping(False, StageContext(tmp_path)) as groups:
        assert groups is None
    assert not list(tmp_path.iterdir())
    with keeping(True, StageContext(tmp_path)) as groups:
        assert groups
        sample(groups, 0)
    assert [path.name for path in tmp_path.iterdir()] == [pool.FILE]
