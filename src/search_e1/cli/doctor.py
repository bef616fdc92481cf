"""The verb ``search-e1 doctor``."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from search_e1.cli.config_file import ConfigArgument
from search_e1.cli.options import check_output

console = Console(highlight=False, markup=False, emoji=False)


def doctor(
    context: typer.Context,
    config: ConfigArgument,
    policy: Annotated[str | None, typer.Option("--policy", help="Policy to examine. Default: policy.model.")] = None,
    questions: Annotated[
        int, typer.Option("--questions", min=1, help="Training questions to sample a group for, as GRPO does.")
    ] = 16,
    evaluated: Annotated[
        int, typer.Option("--evaluated", min=1, help="Evaluation questions to answer, over all benchmarks.")
    ] = 32,
    json: Annotated[Path | None, typer.Option("--json", help="File for the findings as JSON.")] = None,
) -> None:
    """Check whether a run can learn, whether it fits, and how long it takes. Exit status 1 if it cannot learn.

    Nothing is written into the run directory.
    """
    from search_e1.cli.display import watch
    from search_e1.cli.display.findings import show_findings
    from search_e1.config import load
    from search_e1.lab.doctor import examine

    check_output(json, "--json")
    loaded = load(config, context.args)
    found = examine(loaded, policy, questions=questions, evaluated=evaluated, watch=watch(console, loaded.rounds))
    show_findings(console, found.findings)
    if json:
        json.write_text(found.model_dump_json(indent=2) + "\n", encoding="utf-8")
    if not found.can_learn:
        raise typer.Exit(1)
