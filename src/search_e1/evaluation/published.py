"""Published results under the Search-R1 protocol, for comparison with a run's own."""

from collections.abc import Mapping
from statistics import fmean

from search_e1.data.benchmarks import BENCHMARKS
from search_e1.types import Record


class Row(Record):
    """One line of a comparison; EM x 100."""

    method: str
    em: dict[str, float] = {}
    """Benchmark -> EM; empty if only the average is published."""
    average: float | None = None
    """Mean of ``em`` over benchmarks, weighted equally."""
    note: str = ""


def _row(method: str, *figures: float, note: str = "") -> Row:
    *em, average = figures
    return Row(method=method, em=dict(zip(BENCHMARKS, em, strict=True)) if em else {}, average=average, note=note)


_SPLIT = "the sources disagree on which figure is TriviaQA's and which PopQA's"
PUBLISHED_3B = (
    # Search-R1's own table (arXiv:2503.09516), Qwen2.5-3B, E5 over wiki-18.
    _row("RAG", 34.8, 54.4, 38.7, 25.5, 22.6, 4.7, 8.0, 27.0),
    _row("Search-R1 (PPO, instruct)", 34.1, 54.5, 37.8, 32.4, 31.9, 10.3, 26.4, 32.5),
    # The same paper's comparison of PPO with GRPO.
    _row("Search-R1 (GRPO, instruct)", 39.7, 56.5, 39.1, 33.1, 31.0, 12.4, 23.2, 33.6),
    # As reported in their own papers.
    _row("AutoRefine", 46.7, 62.0, 45.0, 40.5, 39.3, 15.7, 34.4, 40.5, note=_SPLIT),
    _row("GiGPO", 42.0, 59.5, 42.4, 36.9, 37.0, 12.6, 64.1, 42.1),
    _row("Tree-GRPO", 46.8, 59.7, 43.6, 42.4, 43.7, 17.8, 43.2, 42.5),
    # arXiv:2605.22511.
    _row("Search-E1", 47.4, 62.6, 46.1, 42.7, 43.6, 19.3, 46.4, 44.0, note=_SPLIT),
    # Only averages are published.
    _row("SD-Search", 42.8, note="five seeds, +-0.8"),
    _row("EviSD", 47.2),
)
"""At 3B parameters, greedy, on the whole test sets; single runs unless the note says otherwise."""


def comparison(em_by_benchmark: Mapping[str, float], name: str = "this run") -> list[Row]:
    """The published rows and, last, one for ``em_by_benchmark`` (EM from 0 to 1), all over the same benchmarks.

    Benchmarks without published figures are left out and averages are taken over the rest, so that rows are comparable. A
    method that publishes only the average over all seven benchmarks has no average over fewer. Empty if no benchmark remains.
    """
    shared = [benchmark for benchmark in BENCHMARKS if benchmark in em_by_benchmark]
    if not shared:
        return []
    ours = Row(method=name, em={benchmark: 100 * em_by_benchmark[benchmark] for benchmark in shared})
    return [_over(row, shared) for row in (*PUBLISHED_3B, ours)]


def _over(row: Row, benchmarks: list[str]) -> Row:
    if row.average is not None and len(benchmarks) == len(BENCHMARKS):
        return row
    em = {benchmark: row.em[benchmark] for benchmark in benchmarks if row.em}
    return row.model_copy(update={"em": em, "average": fmean(em.values()) if em else None})
