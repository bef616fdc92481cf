"""The comparison as one SVG: EM over what was charged, and the differences from the reference, all with 95% intervals."""

from collections.abc import Iterator, Sequence
from html import escape
from math import floor, log10

from search_e1.evaluation.compare import Figure
from search_e1.lab.sweep.comparison import LAST, Comparison, Row

FILE = "comparison.svg"
_COLOURS = ("#555555", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito, 2008
_DASHES = ("", "6 3", "2 3", "8 3 2 3")  # for more variants than colours
_PANEL, _GAP, _LINE, _LEGEND_LINE, _LETTER = 175, 20, 22, 18, 6.5
_LONGEST = 90  # letters of a text
_TITLES = {"em": "EM, greedy", "em_sampled": "EM, sampled", "searches": "searches", "tokens": "sampled tokens"}


class _Axis:
    """Values to places on the page, over a range with round ends."""

    def __init__(self, values: Sequence[float], begin: float, end: float) -> None:
        low, high = min(values), max(values)
        room = (high - low or 1.0) * 0.05
        self.low, self.high, self.begin, self.end = low - room, high + room, begin, end

    def __call__(self, value: float) -> float:
        return round(self.begin + (value - self.low) / (self.high - self.low) * (self.end - self.begin), 1)

    def ticks(self, most: int) -> list[float]:
        """At most about this many round numbers."""
        rough = (self.high - self.low) / most
        power = 10.0 ** floor(log10(rough))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
        first = -(-self.low // step)
        return [round((first + i) * step, 10) for i in range(int((self.high - first * step) // step) + 1)]


class _Page:
    """Room for names however long, and for a legend however many."""

    def __init__(self, names: Sequence[str]) -> None:
        longest = round(_LETTER * min(_LONGEST, max(map(len, names))))
        self.left = max(170, longest + 20)
        """Where the panels of the differences begin."""
        self.width = self.left + len(_TITLES) * (_PANEL + _GAP) + 10
        self.right = self.width - max(250, longest + 60)
        """Where the curves end and their legend begins."""
        self.curve = max(300, _LEGEND_LINE * len(names))


def svg(comparison: Comparison) -> str:
    """The whole figure."""
    names = list(dict.fromkeys(row.variant for row in comparison.rows))
    last = comparison.at(LAST)
    others = [row for row in last if row.differences]
    page = _Page(names)
    below = 60 + page.curve + 50
    height = below + 40 + _LINE * max(1, len(others)) + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {page.width} {height}" font-family="sans-serif" '
        'font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        *_curves(comparison, names, page),
        *(_forest(comparison, others, below, page.left) if others else ()),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _style(names: Sequence[str], name: str) -> tuple[str, str]:
    at = names.index(name)
    return _COLOURS[at % len(_COLOURS)], _DASHES[at // len(_COLOURS) % len(_DASHES)]


def _curves(comparison: Comparison, names: Sequence[str], page: _Page) -> Iterator[str]:
    """Greedy EM of each policy on the way, over the CPU seconds that it is charged with."""
    ways = {
        name: sorted(
            (row for row in comparison.rows if row.variant == name and row.benchmark == "all" and row.stage != LAST),
            key=lambda row: row.cost["cpu_seconds"],
        )
        for name in names
    }
    shown = [row for way in ways.values() for row in way]
    x = _Axis([row.cost["cpu_seconds"] for row in shown], 60, page.right)
    y = _Axis([end for row in shown for end in row.figures["em"].interval], 40 + page.curve, 40)
    yield _text(60, 24, "Greedy EM of each policy over the CPU seconds it took (95% over seeds and questions)", "start")
    for tick in x.ticks(8):
        yield f'<path d="M{x(tick)} 40V{40 + page.curve}" stroke="#eee"/>'
        yield _text(x(tick), 56 + page.curve, f"{tick:g}")
    for tick in y.ticks(6):
        yield f'<path d="M60 {y(tick)}H{page.right}" stroke="#eee"/>' + _text(54, y(tick) + 4, f"{tick:g}", "end")
    for i, (name, way) in enumerate(ways.items()):
        colour, dash = _style(names, name)
        points = [(x(row.cost["cpu_seconds"]), row.figures["em"]) for row in way]
        line = " ".join(f"{at},{y(figure.mean)}" for at, figure in points)
        yield f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-dasharray="{dash}" stroke-width="1.5"/>'
        yield from (_upright(at, y, figure, colour) for at, figure in points)
        place = 50 + _LEGEND_LINE * i
        yield f'<path d="M{page.right + 15} {place}h24" stroke="{colour}" stroke-dasharray="{dash}" stroke-width="2"/>'
        yield _text(page.right + 45, place + 4, name, "start")


def _upright(at: float, y: _Axis, figure: Figure, colour: str) -> str:
    low, high = figure.interval
    return (
        f'<path d="M{at} {y(low)}V{y(high)}" stroke="{colour}" opacity="0.6"/>'
        f'<circle cx="{at}" cy="{y(figure.mean)}" r="3" fill="{colour}"/>'
    )


def _forest(comparison: Comparison, rows: Sequence[Row], top: float, left: float) -> Iterator[str]:
    """The last policies minus the reference's: a row for each variant, a panel for each figure."""
    yield _text(20, top, f"Last policies, minus {comparison.reference} (paired, 95% over seeds and questions)", "start")
    for i, row in enumerate(rows):
        yield _text(left - 12, top + 46 + i * _LINE, row.variant, "end")
    bottom = top + 34 + _LINE * len(rows)
    for panel, (name, title) in enumerate(_TITLES.items()):
        shown = [(i, row.differences[name]) for i, row in enumerate(rows) if name in row.differences]
        if not shown:
            continue
        begin = left + panel * (_PANEL + _GAP)
        x = _Axis([0.0, *(end for _, figure in shown for end in figure.interval)], begin, begin + _PANEL)
        yield _text(begin + _PANEL / 2, top + 22, title)
        yield f'<path d="M{x(0.0)} {top + 30}V{bottom}" stroke="#999" stroke-dasharray="3 3"/>'
        for tick in x.ticks(4):
            yield _text(x(tick), bottom + 16, f"{tick:g}")
        for i, figure in shown:
            at, (low, high) = top + 42 + i * _LINE, figure.interval
            colour = "#999999" if low <= 0 <= high else "#0072b2"
            yield f'<path d="M{x(low)} {at}H{x(high)}" stroke="{colour}" stroke-width="2"/>'
            yield f'<circle cx="{x(figure.mean)}" cy="{at}" r="3.5" fill="{colour}"/>'


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    short = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{escape(short)}</text>'
