"""Confidence intervals and tests over questions.

All intervals are 95%: Wilson's for a share of questions (EM), the percentile bootstrap's for any other mean. Questions are
resampled; the samples of one question are correlated, so they enter as their mean. With several seeds, seeds are resampled
too. Policies are compared on the same questions, so differences are paired.
"""

from collections.abc import Iterator, Sequence
from statistics import NormalDist, fmean

import numpy as np

Interval = tuple[float, float]
RESAMPLES = 10_000
_Z = NormalDist().inv_cdf(0.975)
_CELLS = 4_000_000  # size of the in-memory table of draws


def wilson(successes: int, n: int) -> Interval:
    """95% score interval of a proportion (E. B. Wilson, Journal of the American Statistical Association 22, 1927).

    Never of zero width: 0 of 6 gives 0 to 0.390.

    Raises:
        ValueError: ``n`` is not positive, or ``successes`` is not from 0 to ``n``.
    """
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"{successes} successes of {n}")
    share, z2 = successes / n, _Z * _Z
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z / (1 + z2 / n) * (share * (1 - share) / n + z2 / (4 * n * n)) ** 0.5
    return (middle - half if successes else 0.0), (middle + half if successes < n else 1.0)  # the ends are exact


def share_interval(*parts: Sequence[float], seed: int, least: float = 0.0) -> Interval:
    """95% interval of the mean over ``parts`` of each part's mean, for values from ``least`` to 1: EM, F1, and with
    ``least=-1`` their paired differences. Never of zero width.

    One part: Wilson's interval if the values are all 0 or 1 and not differences, else the bootstrap's. If all values are
    equal, the bootstrap has nothing to resample: the interval then extends on each side as far as Wilson's for 0 out of n,
    the share of unseen questions that may differ.
    Several parts (a macro average): distances from mean to limit are added in quadrature (Newcombe, Statistics in Medicine 17,
    1998; Zou and Donner, Statistics in Medicine 27, 2008), so that a benchmark on which all questions agree still adds its
    uncertainty.

    Raises:
        ValueError: a part is empty, or there is none.
    """
    if not parts or not all(map(len, parts)):
        raise ValueError("no values to take an interval of")
    ends = np.array([_share_interval(part, seed, least) for part in parts])
    if len(parts) == 1:
        return float(ends[0, 0]), float(ends[0, 1])
    means = np.array(list(map(fmean, parts)))
    below, above = (np.linalg.norm(means - end) / len(parts) for end in ends.T)
    return float(means.mean() - below), float(means.mean() + above)


def _share_interval(values: Sequence[float], seed: int, least: float) -> Interval:
    distinct = set(map(float, values))
    if least == 0 and distinct <= {0.0, 1.0}:
        return wilson(round(sum(values)), len(values))
    if len(distinct) > 1:
        return interval(values, seed=seed)
    [value], room = distinct, wilson(0, len(values))[1]
    return max(least, value - room), min(1.0, value + room)


def interval(*parts: Sequence[float], seed: int, resamples: int = RESAMPLES) -> Interval:
    """95% percentile bootstrap interval of the mean over ``parts`` of each part's mean.

    One part gives the interval of a plain mean. Several parts are resampled separately (a macro average over benchmarks). For
    a paired difference, pass the differences. If all values are equal, the interval has zero width; see ``share_interval``.

    Raises:
        ValueError: a part is empty, or there is none.
    """
    if not parts or not all(map(len, parts)):
        raise ValueError("no values to take an interval of")
    means = [_resampled_means(part, np.random.default_rng([seed, i]), resamples) for i, part in enumerate(parts)]
    low, high = np.percentile(np.mean(means, axis=0), [2.5, 97.5])
    return float(low), float(high)


def intervals_over_seeds(values: np.ndarray, *, seed: int) -> list[Interval]:
    """95% intervals of means over seeds and questions, resampled independently: Owen's pigeonhole bootstrap (Annals of Applied
    Statistics 1(2), 2007), for tables whose rows and columns are both samples.

    Args:
        values: float [figures, seeds, questions], NaN where a seed was not evaluated on a question; paired differences give
            the interval of the difference. All figures share the same draws.

    With few seeds the intervals are too narrow: the variance of n observed seeds is (n - 1) / n of the true one. With one
    seed, only questions are resampled.

    Raises:
        ValueError: a figure has no value.
    """
    figures, seeds, questions = values.shape
    present = ~np.isnan(values)
    if not values.size or not present.any(axis=(1, 2)).all():
        raise ValueError("no values to take an interval of")
    rng = np.random.default_rng(seed)
    sums, counts = (table.reshape(figures * seeds, questions).T for table in (np.nan_to_num(values), present.astype(float)))
    whole, means = bool(present.all()), []
    for drawn in _counts_drawn(rng, questions, RESAMPLES):
        picked = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=len(drawn))[:, None, :]
        shape = (len(drawn), figures, seeds)
        total = ((drawn @ sums).reshape(shape) * picked).sum(axis=2)
        weight = seeds * questions if whole else ((drawn @ counts).reshape(shape) * picked).sum(axis=2)
        with np.errstate(invalid="ignore"):  # a resample without any value has no mean
            means.append(total / weight)
    low, high = np.nanpercentile(np.concatenate(means), [2.5, 97.5], axis=0)
    return [(float(a), float(b)) for a, b in zip(low, high, strict=True)]


def _counts_drawn(rng: np.random.Generator, n: int, resamples: int) -> Iterator[np.ndarray]:
    """Number of times each of n items is drawn in each resample: float64 [rows, n], in batches of rows that fit in memory."""
    rows = max(1, _CELLS // n)
    for at in range(0, resamples, rows):
        yield rng.multinomial(n, np.full(n, 1 / n), size=min(rows, resamples - at)).astype(np.float64)


def _resampled_means(values: Sequence[float], rng: np.random.Generator, resamples: int) -> np.ndarray:
    """Means of ``resamples`` draws of n = len(values) values with replacement: float64 [resamples].

    Counts of distinct values are multinomial, so questions are not drawn one by one: for zeros and ones a resample is one
    binomial number, whatever n is.
    """
    distinct, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    n, rows = len(values), max(1, _CELLS // len(distinct))
    means = [rng.multinomial(n, counts / n, size=min(rows, resamples - at)) @ distinct / n for at in range(0, resamples, rows)]
    return np.concatenate(means)


def mcnemar(won: int, lost: int) -> float:
    """Exact two-sided p-value of McNemar's test: the probability of a split at least as uneven as ``won`` to ``lost`` if each
    question on which the policies disagree were a fair coin flip; 1.0 if they never disagree.
    """
    n = won + lost
    term = total = 1  # binomial coefficients (n over i), exact
    for i in range(min(won, lost)):
        term = term * (n - i) // (i + 1)
        total += term
    return min(1.0, 2 * total / 2**n)
