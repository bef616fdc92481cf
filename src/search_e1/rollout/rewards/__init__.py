"""Reward functions by name: from an answer and all gold answers to a reward from 0 to 1.

Name your own function as ``module:function`` in ``rollout.reward``; it needs no registration.
"""

from collections.abc import Callable, Sequence

from search_e1.data.answers import exact_match, f1
from search_e1.errors import ConfigError
from search_e1.rollout.rewards import dates, lists, numbers
from search_e1.runs.registry import Registry

Reward = Callable[[str | None, Sequence[str]], float]
TYPED, JUDGE = "typed", "judge"
REWARDS: Registry[Reward] = Registry("reward function")
REWARDS.register("em")(exact_match)
REWARDS.register("f1")(f1)
REWARDS.register("numeric")(numbers.numeric)
REWARDS.register("number")(numbers.number)
REWARDS.register("date")(dates.date)
REWARDS.register("list")(lists.list_match)
REWARDS.register("list_f1")(lists.list_f1)
REWARDS.register("yes_no")(lists.yes_no)


@REWARDS.register(TYPED)
@REWARDS.register(JUDGE)
def _of_question(answer: str | None, golds: Sequence[str]) -> float:
    raise ConfigError("this reward needs the question; open it with open_scorer")


def open_reward(name: str, key: str = "rollout.reward") -> Reward:
    """The reward function ``name``. A missing answer scores 0 without a call of the function.

    Raises:
        ConfigError: there is no such function; or, when called, it returns something other than a number from 0 to 1.
    """
    function = REWARDS.get(name, key)
    if not callable(function):
        raise ConfigError(f"{key} = {name!r}: not a function; give one of (answer, golds)")
    return checked(function, name, key)


def checked(function: Reward, name: str, key: str) -> Reward:
    """``function`` with its result checked to be a number from 0 to 1; 0 for a missing answer."""

    def reward(answer: str | None, golds: Sequence[str]) -> float:
        value = 0.0 if answer is None else function(answer, golds)
        if not (isinstance(value, int | float) and 0 <= value <= 1):
            raise ConfigError(f"{key} = {name!r}: returned {value!r} for {answer!r}; return a number from 0 to 1")
        return float(value)

    return reward
