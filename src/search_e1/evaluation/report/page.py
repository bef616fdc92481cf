"""The report of a run directory as one self-contained HTML file, without network or server."""

import base64
import gzip
import hashlib
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from search_e1.errors import RunError
from search_e1.evaluation.report import figures
from search_e1.evaluation.report.files import open_run
from search_e1.evaluation.report.trajectories import Collector
from search_e1.runs import write_atomically

_SCRIPTS = (
    "dom.js", "charts.js", "trajectory.js", "explorer.js", "loop.js", "cost.js", "browser.js", "pairs.js",
    "rounds.js", "main.js",
)  # fmt: skip
_ASSETS = files("search_e1.evaluation.report") / "assets"


def write(run: Path, out: Path, most: int = 5_000) -> dict[str, int]:
    """Write the report of ``run`` to ``out``; returns its counts: policies, trajectories, left_out, pairs, bytes.

    Args:
        most: approximate number of trajectories in the page; beyond it, a fixed sample of the questions is shown.

    Raises:
        RunError: ``run`` is no run directory, an artifact in it is damaged, or ``out`` cannot be written.
        DataError: a line of an artifact's file is damaged.
    """
    opened = open_run(run)
    if out.is_dir() or not out.parent.is_dir():
        what = "is a directory" if out.is_dir() else f"there is no directory {out.parent}"
        raise RunError(f"{out}: {what}; give a file that can be written with --out")
    collector = Collector()
    evaluated = collector.evaluations(opened, most)
    collector.held_out_pairs(opened)
    overview = figures.overview(opened, evaluated) | {"left_out": collector.left_out}
    text = render(overview, collector.records())
    try:
        write_atomically(out, text)
    except OSError as error:
        raise RunError(f"{out}: {error.strerror or error}; give a file that can be written with --out") from error
    return {
        "policies": len(overview["policies"]),
        "trajectories": len(collector.trajectories),
        "left_out": collector.left_out,
        "pairs": len(collector.pairs),
        "bytes": len(text.encode()),
    }


def render(overview: dict[str, Any], records: dict[str, Any]) -> str:
    """The page. The overview is embedded as JSON; trajectories and pairs are compressed and unpacked after the first paint.

    A content security policy allows only the page's own script, identified by its hash.
    """
    style = _asset("report.css")
    script = "\n".join(map(_asset, _SCRIPTS))
    # Compressed without a time stamp, so that the same run gives the same file.
    packed = base64.b64encode(gzip.compress(_json(records).encode(), mtime=0)).decode()
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(_asset("page.html.j2"))
    return template.render(
        title=f"{overview['run']} · search-e1",
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        overview=_json(overview).replace("<", "\\u003c"),  # nothing in it can end the element or begin a comment
        records=packed,
    )


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
