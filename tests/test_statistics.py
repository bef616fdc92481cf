"""Intervals and tests against scipy's and statsmodels'."""

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint

from search_e1.evaluation.statistics import interval, intervals_over_seeds, mcnemar, share_interval, wilson

MANY = 40_000
RNG = np.random.default_rng(7)
RIGHT = (RNG.random(180) < 0.37).astype(float)
BEFORE = (RNG.random(180) < 0.5).astype(float)
OF_SAMPLES = RNG.binomial(4, 0.3, size=60) / 4
TOKENS = RNG.gamma(2.0, 40.0, size=120)


def scipy_interval(data, statistic=np.mean, **options):
    found = stats.bootstrap(data, statistic, n_resamples=MANY, method="percentile", rng=np.random.default_rng(3), **options)
    return (found.confidence_interval.low, found.confidence_interval.high)


@pytest.mark.parametrize("values", [RIGHT, RIGHT - BEFORE, OF_SAMPLES, TOKENS], ids=["em", "paired", "samples", "tokens"])
def test_the_interval_of_a_mean_is_scipy_s(values):
    spread = values.std() / len(values) ** 0.5
    ours = interval(values, seed=0, resamples=MANY)
    # Both are Monte Carlo: an end of the interval has a standard error of about 1% of the mean's.
    assert ours == pytest.approx(scipy_interval((values,), vectorized=True, axis=0), abs=0.06 * spread)
    assert interval(values, seed=0) == interval(values, seed=0)


def test_the_interval_of_a_paired_difference_is_scipy_s():
    paired = scipy_interval((RIGHT, BEFORE), lambda a, b, axis=-1: a.mean(axis) - b.mean(axis), paired=True, axis=0)
    assert interval(RIGHT - BEFORE, seed=0, resamples=MANY) == pytest.approx(paired, abs=0.004)


def test_the_interval_of_a_macro_average_is_scipy_s():
    """Three benchmarks of different sizes, each resampled on its own."""
    parts = (RIGHT, BEFORE[:25], OF_SAMPLES)
    theirs = scipy_interval(parts, lambda a, b, c, axis=-1: (a.mean(axis) + b.mean(axis) + c.mean(axis)) / 3, axis=0)
    assert interval(*parts, seed=0, resamples=MANY) == pytest.approx(theirs, abs=0.004)


def test_another_seed_draws_anew():
    assert interval(TOKENS, seed=0) != interval(TOKENS, seed=1)
    # Two parts are drawn apart: errors of equal ones cancel in part.
    one, two = interval(TOKENS, seed=0), interval(TOKENS, TOKENS, seed=0)
    assert two[1] - two[0] == pytest.approx((one[1] - one[0]) / 2**0.5, rel=0.05)


def test_intervals_of_which_the_answer_is_known():
    assert interval([1.0] * 7, seed=0) == (1.0, 1.0)
    assert interval([0.25], seed=0) == (0.25, 0.25)
    # A mean of n coins: binomial, whose percentiles scipy knows exactly.
    exact = stats.binom(400, 0.25).ppf([0.025, 0.975]) / 400
    assert interval([1.0] * 100 + [0.0] * 300, seed=0, resamples=MANY) == pytest.approx(exact, abs=0.0026)
    with pytest.raises(ValueError, match="no values"):
        interval([], seed=0)
    with pytest.raises(ValueError, match="no values"):
        interval(seed=0)


def test_samples_of_one_question_are_not_drawn_apart():
    """Four samples that always agree tell no more than one: the interval is that of the questions."""
    questions = [1.0] * 10 + [0.0] * 30
    apart = interval([value for value in questions for _ in range(4)], seed=0)
    together = interval(questions, seed=0)
    assert together[1] - together[0] == pytest.approx(2 * (apart[1] - apart[0]), rel=0.1)


def test_all_distinct_values_fit_in_little_memory():
    values = np.linspace(0, 1, 5_000)
    low, high = interval(values, seed=0, resamples=1_000)
    assert (low + high) / 2 == pytest.approx(0.5, abs=0.002)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 5_000**0.5, rel=0.1)


@pytest.mark.parametrize(("right", "n"), [(0, 1), (1, 1), (0, 6), (6, 6), (3, 14), (1, 125), (1722, 3610), (51_713, 51_713)])
def test_wilson_is_scipy_s_and_statsmodels_s(right, n):
    theirs = stats.binomtest(right, n).proportion_ci(method="wilson")
    assert wilson(right, n) == pytest.approx((theirs.low, theirs.high), abs=1e-9)
    assert wilson(right, n) == pytest.approx(proportion_confint(right, n, method="wilson"), abs=1e-9)


def test_wilson_by_hand():
    """Of none right the interval ends at z^2 / (n + z^2)."""
    assert wilson(0, 6) == (0.0, pytest.approx(1.96**2 / (6 + 1.96**2), abs=1e-4))
    for right, n in ((1, 0), (-1, 3), (4, 3)):
        with pytest.raises(ValueError, match=f"{right} successes of {n}"):
            wilson(right, n)


def test_the_interval_of_a_share_is_wilson_s_and_of_other_values_the_bootstrap_s():
    assert share_interval(RIGHT, seed=0) == wilson(int(RIGHT.sum()), 180)
    assert share_interval(OF_SAMPLES, seed=0) == interval(OF_SAMPLES, seed=0)
    assert share_interval(RIGHT - BEFORE, seed=0, least=-1.0) == interval(RIGHT - BEFORE, seed=0)


@pytest.mark.parametrize(
    ("values", "least", "expected"),
    [
        ([0.0] * 6, 0.0, (0.0, 0.390)),
        ([1.0] * 6, 0.0, (0.610, 1.0)),
        ([0.5] * 6, 0.0, (0.110, 0.890)),
        ([0.0] * 6, -1.0, (-0.390, 0.390)),
        ([1.0] * 6, -1.0, (0.610, 1.0)),
        ([-1.0] * 6, -1.0, (-1.0, -0.610)),
    ],
)
def test_equal_outcomes_of_six_questions_are_no_certainty(values, least, expected):
    assert share_interval(values, seed=0, least=least) == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize(("a", "n", "b", "m"), [(12, 40, 5, 25), (0, 6, 3, 12), (0, 6, 0, 9), (6, 6, 0, 9)])
def test_a_macro_average_of_two_shares_is_newcombe_s_difference(a, n, b, m):
    """The mean of p and 1 - q is half of p - q, plus a half; statsmodels has Newcombe's interval of p - q."""
    low, high = confint_proportions_2indep(a, n, b, m, method="newcomb", compare="diff")
    parts = ([1.0] * a + [0.0] * (n - a), [1.0] * (m - b) + [0.0] * b)
    assert share_interval(*parts, seed=0) == pytest.approx(((low + 1) / 2, (high + 1) / 2), abs=1e-9)


def test_a_macro_average_of_large_benchmarks_has_the_bootstrap_s_interval():
    parts = (np.tile(RIGHT, 5), np.tile(BEFORE, 5), np.tile(OF_SAMPLES, 5))
    assert share_interval(*parts, seed=0) == pytest.approx(interval(*parts, seed=0), abs=0.001)


def test_a_share_of_nothing_has_no_interval():
    for parts in ((), ([],), ([1.0], [])):
        with pytest.raises(ValueError, match="no values"):
            share_interval(*parts, seed=0)


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (1, 0), (5, 5), (12, 3), (3, 12), (40, 61), (700, 801)])
def test_mcnemar_is_statsmodels_s(won, lost):
    theirs = statsmodels_mcnemar([[17, won], [lost, 4]], exact=True).pvalue
    assert mcnemar(won, lost) == pytest.approx(theirs, rel=1e-9)


def test_mcnemar_by_hand():
    assert mcnemar(5, 0) == 2 / 32
    assert mcnemar(4, 1) == 2 * (1 + 5) / 32
    assert mcnemar(20_000, 0) == 0.0  # smaller than any float


def test_intervals_over_seeds_are_those_of_drawing_seeds_and_questions():
    """Against drawing rows and columns one by one, with the table's own percentiles; and a figure that has holes."""
    rng = np.random.default_rng(5)
    table = rng.random((2, 4, 25)) + np.array([0.0, 0.3, 0.1, 0.6])[None, :, None]
    table[1, 2, :10] = np.nan
    expected = []
    for figure in table:
        means = [
            np.nanmean(figure[rng.integers(4, size=4)][:, rng.integers(25, size=25)]) for _ in range(6_000)
        ]  # fmt: skip
        expected.append(np.percentile(means, [2.5, 97.5]))
    assert np.allclose(intervals_over_seeds(table, seed=0), expected, atol=0.02)


def test_of_one_seed_only_questions_are_drawn():
    values = [0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0]
    [found] = intervals_over_seeds(np.array([[values]]), seed=0)
    assert found == pytest.approx(interval(values, seed=0), abs=0.13)  # one question is 0.125


def test_seeds_that_agree_in_nothing_but_their_mean_are_as_wide_as_seeds_alone():
    """Every question alike: what varies is seeds. Of 0 and 1, two draws have the mean 0 or 1 in a quarter of cases each."""
    [found] = intervals_over_seeds(np.array([[[0.0] * 9, [1.0] * 9]]), seed=0)
    assert found == (0.0, 1.0)
    [same] = intervals_over_seeds(np.full((1, 3, 9), 0.5), seed=0)
    assert same == (0.5, 0.5)


def test_nothing_has_no_interval_over_seeds():
    with pytest.raises(ValueError, match="no values"):
        intervals_over_seeds(np.full((1, 2, 3), np.nan), seed=0)
    with pytest.raises(ValueError, match="no values"):
        intervals_over_seeds(np.empty((0, 2, 3)), seed=0)
