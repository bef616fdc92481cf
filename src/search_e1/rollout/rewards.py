"""Reward functions by name: what an answer is worth, from 0 to 1, given every answer that counts as right.

A function of one's own is named ``module:function`` in ``rollout.reward`` and needs no registration.
"""

import math
import re
from collections.abc import Callable, Sequence

from search_e1.data.answers import exact_match, f1
from search_e1.errors import ConfigError
from search_e1.runs.registry import Registry

Reward = Callable[[str | None, Sequence[str]], float]
REWARDS: Registry[Reward] = Registry("reward function")
REWARDS.register("em")(exact_match)
REWARDS.register("f1")(f1)
_NUMBER = re.compile(r"(?<![\w.,])[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?(?![.,]?\d)")
_TOLERANCE = 1e-6


def open_reward(name: str) -> Reward:
    """The reward function called ``name``. A trajectory without an answer scores 0; the function is not called for it.

    Raises:
        ConfigError: there is none, or, when it is called, it returns something other than a number from 0 to 1.
    """
    function = REWARDS.get(name, "rollout.reward")
    if not callable(function):
        raise ConfigError(f"rollout.reward = {name!r}: not a function; give one of (answer, golds)")

    def reward(answer: str | None, golds: Sequence[str]) -> float:
        value = 0.0 if answer is None else function(answer, golds)
        if not (isinstance(value, int | float) and 0 <= value <= 1):
            raise ConfigError(f"rollout.reward = {name!r}: returned {value!r} for {answer!r}; return a number from 0 to 1")
        return float(value)

    return reward


@REWARDS.register("numeric")
def numeric(answer: str | None, golds: Sequence[str]) -> float:
    """1.0 if ``answer`` and a gold answer hold one number each and the same (within 1e-6 of it); else their exact match.

    Signs, thousands separators and exponents are understood, words and units around a number are ignored.
    """

    def equal(gold: str) -> float:
        number, wanted = _number(answer), _number(gold)
        if number is None or wanted is None:
            return exact_match(answer, [gold])
        return float(math.isclose(number, wanted, rel_tol=_TOLERANCE))

    return max(map(equal, golds), default=0.0)


def _number(text: str | None) -> float | None:
    """The number in ``text``, if there is exactly one."""
    numbers = _NUMBER.findall(text or "")
    return float(numbers[0].replace(",", "")) if len(numbers) == 1 else None
