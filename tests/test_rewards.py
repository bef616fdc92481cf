"""Reward functions by name: values, refusals, and what a trajectory carries."""

import pytest

from conftest import PASSAGES, TINY_PROMPTS, TinyRetriever
from scripted import ScriptedEngine
from search_e1.config import RolloutConfig
from search_e1.errors import ConfigError
from search_e1.rollout.loop import rollout
from search_e1.rollout.rewards import open_reward
from search_e1.rollout.starts import starts
from search_e1.types import Question, Trajectory


def half(answer: str | None, golds) -> float:
    return 0.5 if answer else 1.0


def too_much(answer: str | None, golds) -> float:
    return 1.5


@pytest.mark.parametrize(
    ("name", "answer", "golds", "worth"),
    [
        ("em", "The Cor Dun", ["cor dun"], 1.0),
        ("em", "Cor", ["cor dun"], 0.0),
        ("f1", "Cor", ["cor dun"], 2 / 3),
        ("f1", "dun cor", ["x", "cor dun"], 1.0),
        ("numeric", "about 1,234.50 km", ["1234.5"], 1.0),
        ("numeric", "$-3", ["3"], 0.0),
        ("numeric", "1e3", ["one thousand", "1000"], 1.0),
        ("numeric", "3 to 4", ["4"], 0.0),  # two numbers: which one is meant?
        ("numeric", "1.234.567", ["1.234"], 0.0),
        ("numeric", "12,34", ["34"], 0.0),
        ("numeric", "B12", ["12"], 0.0),
        ("numeric", "0.3333333", ["0.33333333"], 1.0),
        ("numeric", "0.333", ["0.334"], 0.0),
        ("numeric", "Cor Dun", ["cor dun"], 1.0),
        ("numeric", "3 to 4", ["3 to 4"], 1.0),
        ("test_rewards:half", "x", ["y"], 0.5),
        ("test_rewards:half", None, ["y"], 0.0),  # no answer, no call
        ("f1", None, ["y"], 0.0),
    ],
)
def test_what_an_answer_is_worth(name: str, answer: str | None, golds: list[str], worth: float) -> None:
    assert open_reward(name)(answer, golds) == pytest.approx(worth)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("numerical", r"rollout\.reward = 'numerical': no such reward function; did you mean 'numeric'"),
        ("nowhere:x", r"rollout\.reward = 'nowhere:x': No module named"),
        ("test_rewards:PASSAGES", "not a function"),
    ],
)
def test_what_is_no_reward_function_is_refused_in_one_line(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        open_reward(name)
    assert "\n" not in str(caught.value)


def play(tokenizer, reward: str) -> Trajectory:
    question = Question(id="q", text="q?", answers=("Cor Dun",))
    engine = ScriptedEngine(tokenizer, {"q?": ["<search>mayor Bel</search>", "<answer> Cor </answer>"]})
    limits = RolloutConfig(max_tokens=512, reward=reward)
    begun = starts(tokenizer, TINY_PROMPTS, [question])
    [done] = rollout(engine, TinyRetriever(PASSAGES), begun, limits, temperature=1.0, seed=0, prompts=TINY_PROMPTS)
    return done


def test_a_trajectory_carries_its_reward_and_is_correct_at_one(tiny_policy) -> None:
    part = play(tiny_policy.tokenizer, "f1")
    assert (part.reward, part.f1, part.correct) == (pytest.approx(2 / 3), pytest.approx(2 / 3), False)
    assert play(tiny_policy.tokenizer, "em").reward == 0.0
    with pytest.raises(ConfigError, match=r"returned 1\.5 for 'Cor'; return a number from 0 to 1"):
        play(tiny_policy.tokenizer, "test_rewards:too_much")
