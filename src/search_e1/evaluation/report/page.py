"""The report of run directories as one self-contained HTML file, without network or server."""

import base64
import gzip
import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from search_e1.errors import RunError
from search_e1.evaluation.report import figures
from search_e1.evaluation.report.files import Run, open_run
from search_e1.evaluation.report.repeat import differences
from search_e1.evaluation.report.trajectories import Collector, Evaluated
from search_e1.runs import MANIFEST, sha256_text, write_atomically

_SCRIPTS = (
    "dom.js", "glossary.js", "tooltip.js", "axes.js", "charts.js", "trajectory.js", "explorer.js", "loop.js", "cards.js",
    "cost.js", "browser.js", "pairs.js", "rounds.js", "runs.js", "config.js", "keys.js", "main.js",
)  # fmt: skip
_LIVE = "live.js"
_ASSETS = files("search_e1.evaluation.report") / "assets"


def write(run: Path, out: Path, most: int = 5_000, *, others: Sequence[Path] = ()) -> dict[str, int]:
    """Write the report of ``run`` to ``out``; returns its counts: policies, trajectories, left_out, pairs, bytes.

    Args:
        most: approximate number of trajectories in the page; beyond it, a fixed sample of the questions is shown.
        others: more runs to show beside it.

    Raises:
        RunError: a run is not a run directory, an artifact in it is damaged, or ``out`` cannot be written.
        DataError: a line of an artifact's file is damaged.
    """
    report = Report((run, *others), most)
    report.read()
    if out.is_dir() or not out.parent.is_dir():
        what = "is a directory" if out.is_dir() else f"no directory {out.parent}"
        raise RunError(f"{out}: {what}; give a file that can be written with --out")
    text = report.html()
    try:
        write_atomically(out, text)
    except OSError as error:
        raise RunError(f"{out}: {error.strerror or error}; give a file that can be written with --out") from error
    return {**report.counts(), "bytes": len(text.encode())}


class Report:
    """What the page shows about some runs; call ``read`` again when they have changed."""

    def __init__(self, runs: Sequence[Path], most: int) -> None:
        self._paths, self._most = runs, most
        self._made: object = None
        self._collector = Collector()
        self._evaluated: list[list[Evaluated]] = []
        self.overview: dict[str, Any] = {}
        """Everything except trajectories and pairs, for all runs."""
        self.records = ""
        """Trajectories and pairs: JSON, gzip, base64."""

    def read(self) -> None:
        """
        Raises:
            RunError, DataError: as ``write``.
        """
        runs = [open_run(path) for path in self._paths]
        made = [(stage.path, (stage.path / MANIFEST).stat().st_mtime_ns) for run in runs for stage in run.stages.values()]
        if made != self._made:  # complete artifacts never change
            collector = Collector()
            self._evaluated = [collector.add(run, max(1, self._most // len(runs))) for run in runs]
            # No time stamp, so that the same run gives the same file.
            self.records = base64.b64encode(gzip.compress(_json(collector.records()).encode(), mtime=0)).decode()
            self._collector, self._made = collector, made
        shown = [figures.overview(run, evaluated) for run, evaluated in zip(runs, self._evaluated, strict=True)]
        for one, name, left_out in zip(shown, names(runs), self._collector.left_out, strict=True):
            one |= {"run": name, "left_out": left_out}
        self.overview = {"runs": shown, "differences": differences(runs), "glossary": json.loads(_asset("glossary.json"))}

    def counts(self) -> dict[str, int]:
        return {
            "policies": sum(len(run["policies"]) for run in self.overview["runs"]),
            "trajectories": len(self._collector.trajectories),
            "left_out": sum(self._collector.left_out),
            "pairs": len(self._collector.pairs),
        }

    @property
    def versions(self) -> dict[str, str]:
        """Digests of the overview and of the records, to detect changes."""
        return {"version": sha256_text(_json(self.overview))[:16], "records": sha256_text(self.records)[:16]}

    def html(self, *, live: bool = False) -> str:
        """The page. The overview is embedded as JSON; trajectories and pairs are unpacked after the first paint.

        A content security policy allows only the page's own script, identified by its hash. A ``live`` page polls its server
        for changes.
        """
        style = _asset("report.css")
        overview = self.overview | ({"live": self.versions} if live else {})
        script = "\n".join(map(_asset, (*_SCRIPTS, *((_LIVE,) if live else ()))))
        template = Environment(autoescape=True, undefined=StrictUndefined).from_string(_asset("page.html.j2"))
        return template.render(
            title=f"{' · '.join(run['run'] for run in self.overview['runs'])} · search-e1",
            style=style,
            style_hash=_hash(style),
            script=script,
            script_hash=_hash(script),
            overview=_json(overview).replace("<", "\\u003c"),  # nothing in it can end the element or begin a comment
            records=self.records,
            live=live,
        )


def names(runs: Sequence[Run]) -> list[str]:
    """The names of the runs' directories, with as many parents as needed to be unambiguous.

    Raises:
        RunError: a run is given twice.
    """
    places = [run.path.resolve() for run in runs]
    for place in places:
        if places.count(place) > 1:
            raise RunError(f"{place}: given twice; give each run once")
    short = [place.name for place in places]
    return [
        name if short.count(name) == 1 else "/".join(place.parts[-2:]) if _differ(places, 2) else str(place)
        for name, place in zip(short, places, strict=True)
    ]


def _differ(places: Sequence[Path], parts: int) -> bool:
    return len({place.parts[-parts:] for place in places}) == len(places)


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
