"""Intervals and tests over questions: what another sample of questions would have said.

Intervals are 95% percentile bootstrap intervals. What is drawn again is questions, never the samples of one question: these
depend on one another, and stand for their mean. Policies are compared on the same questions, so differences are paired.
"""

from collections.abc import Sequence

import numpy as np

Interval = tuple[float, float]
RESAMPLES = 10_000
_CELLS = 4_000_000  # of the table of draws in memory at once


def interval(*parts: Sequence[float], seed: int, resamples: int = RESAMPLES) -> Interval:
    """95% percentile bootstrap interval of the mean over ``parts`` of each part's mean.

    One part gives the interval of a plain mean. With several, each is resampled on its own (a macro average over benchmarks).
    For a paired difference give the differences. An interval of equal values has no width, whatever their number.

    Raises:
        ValueError: a part is empty, or there is none.
    """
    if not parts or not all(map(len, parts)):
        raise ValueError("no values to take an interval of")
    means = [_resampled_means(part, np.random.default_rng([seed, i]), resamples) for i, part in enumerate(parts)]
    low, high = np.percentile(np.mean(means, axis=0), [2.5, 97.5])
    return float(low), float(high)


def _resampled_means(values: Sequence[float], rng: np.random.Generator, resamples: int) -> np.ndarray:
    """Means of ``resamples`` draws of n = len(values) values with replacement: float64 [resamples].

    How often each distinct value is drawn is multinomial, so that no question is really drawn: for zeros and ones this is
    one binomial number a resample, whatever n is.
    """
    distinct, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    n, rows = len(values), max(1, _CELLS // len(distinct))
    means = [
        rng.multinomial(n, counts / n, size=min(rows, resamples - at)) @ distinct / n
        for at in range(0, resamples, rows)
    ]
    return np.concatenate(means)


def mcnemar(won: int, lost: int) -> float:
    """Exact two-sided p of McNemar's test: how likely ``won`` questions against ``lost`` ones, or a split more uneven, would
    be if each question on which the two policies disagree were a fair coin. 1.0 where they never disagree.
    """
    n = won + lost
    term = total = 1  # the binomial coefficients (n over i), whole numbers of any size
    for i in range(min(won, lost)):
        term = term * (n - i) // (i + 1)
        total += term
    return min(1.0, 2 * total / 2**n)
