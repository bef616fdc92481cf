"""Findings in the terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from search_e1.cli.display import plain_table, printable
from search_e1.evaluation.preflight import Finding, Level, worst

_STYLES = {Level.OK: "green", Level.WARNING: "yellow", Level.STOP: "red"}
_ENDS = {
    Level.OK: "No problems found; the run can start.",
    Level.WARNING: "The run can start; see the warnings.",
    Level.STOP: "The run cannot learn.",
}


def show_findings(console: Console, findings: Sequence[Finding]) -> None:
    """Print the findings and the conclusion."""
    console.print(findings_table(findings))
    level = worst(findings)
    console.print(Text(_ENDS[level], style=_STYLES[level]))


def findings_table(findings: Sequence[Finding]) -> Table:
    """One row per finding, with its remedy below it. Fits 80 columns."""
    table = plain_table(None, "", "", "", left=3)
    table.show_header = False
    for finding in findings:
        said = Text(printable(finding.text))
        if finding.remedy:
            said.append(f"\n{printable(finding.remedy)}", style="dim")
        table.add_row(Text(finding.level, style=_STYLES[finding.level]), finding.check, said)
    return table
