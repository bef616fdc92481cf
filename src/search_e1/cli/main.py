"""The command line."""

import logging
import os
import signal
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from search_e1.cli import asking, bundle, compare, data, doctor, index, init, pairs, plan, report, serving, stages, sweep
from search_e1.cli.config_file import ConfigArgument, ConfigCommand
from search_e1.errors import ConfigError, SearchE1Error
from search_e1.runs import ranks
from search_e1.runs.allocation import keep_freed_memory
from search_e1.runs.safe import plain
from search_e1.runs.stopping import STATUS, Stopped, on_signals

# Slow imports (torch, transformers) are inside the verbs that need them, so that `--help` is fast.

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train search agents by GRPO interleaved with offline self-distillation.",
    epilog="Errors are one line; --traceback before the verb shows where they came from.",
)
console = stages.console
_AFTER_FIRST = 5.0
"""Seconds after which a rank other than 0 prints its own error."""

OVERRIDES = asking.OVERRIDES
# Panels of `--help`, in the order of their first verbs.
RUN, STAGES, RUNS, ASK, DATA = (
    "A run",
    "Its stages, one by one",
    "Several runs",
    "Ask",
    "Questions, passages, retrieval",
)


def _show_version(asked: bool) -> None:
    if asked:
        from search_e1 import __version__

        print(f"search-e1 {__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show tracebacks of errors.")] = False,
    other_versions: Annotated[
        bool, typer.Option("--other-versions", help="Resume a run that was started under other package versions.")
    ] = False,
) -> None:
    global _show_traceback
    _show_traceback = traceback
    context.obj = {"other_versions": other_versions}


_show_traceback = False


app.command("init", rich_help_panel=RUN)(init.init)


@app.command(cls=ConfigCommand, context_settings=OVERRIDES, rich_help_panel=RUN)
def train(
    context: typer.Context,
    config: ConfigArgument,
    branch: Annotated[
        Path | None,
        typer.Option(
            "--branch",
            help="New run directory for a changed config; reuses the artifacts of `run` that it would make the same.",
        ),
    ] = None,
) -> None:
    """Run the whole loop, or resume it, and print the results."""
    from search_e1 import evolve
    from search_e1.agent.make import AGENT
    from search_e1.cli.display import summary_table, watch
    from search_e1.config import load
    from search_e1.lab.plan import check_memory
    from search_e1.stages.grpo import describe_collapse

    loaded = load(config, context.args)
    origin = loaded.run if branch else None
    loaded = loaded.model_copy(update={"run": branch}) if branch else loaded
    with stages.joined(loaded), on_signals() as stop:
        check_memory(loaded, loaded.policy.model, ("coldstart", "grpo", "distill"), ranks.count())
        summary = evolve.train(
            loaded,
            watch(console, loaded.rounds),
            stop,
            branch_of=origin,
            other_versions=context.obj["other_versions"],
        )
    for stage, collapse in summary.stopped_early.items():
        console.print(describe_collapse(stage, collapse, loaded.grpo), style="yellow", markup=False)
    for number, round in summary.rounds.items():
        if round.refused:
            console.print(f"round {number}: not distilled: {round.refused}", style="yellow", markup=False)
    console.print(summary_table(summary))
    console.print(f"{loaded.run / evolve.SUMMARY}", highlight=False)
    if loaded.bundle:
        agent = loaded.run / AGENT
        console.print(f'{agent}; ask it: search-e1 ask --agent {agent} "QUESTION"', highlight=False, soft_wrap=True)


@app.command(rich_help_panel=DATA)
def world(
    directory: Annotated[Path, typer.Argument(help="Directory for corpus.jsonl, train.jsonl, dev.jsonl and test.jsonl.")],
    train: Annotated[int, typer.Option(min=1, help="Training questions.")] = 800,
    dev: Annotated[int, typer.Option(min=1, help="Development questions.")] = 300,
    test: Annotated[int, typer.Option(min=1, help="Test questions, about entities in no other question.")] = 300,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the questions; the world is always the same.")] = 0,
    hard: Annotated[bool, typer.Option("--hard", help="Questions of three to six hops; three entities share a name.")] = False,
) -> None:
    """Write the small world: a corpus and questions about it, without a download."""
    from search_e1.data.world import HARD, USUAL, make_world, write

    if (directory / "corpus.jsonl").exists():
        console.print(f"{directory} already exists and was left unchanged", markup=False, highlight=False)
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{directory}: {error.strerror}; give a directory that can be written to") from None
    write(make_world(difficulty=HARD if hard else USUAL), directory, train=train, dev=dev, test=test, seed=seed)
    console.print(
        f"{directory}: corpus, {train} train, {dev} dev, {test} test questions",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


@app.command(rich_help_panel=RUN)
def config() -> None:
    """Print every configuration key with its default and meaning."""
    from search_e1.config import describe

    print(describe(), end="")


for verb in (stages.coldstart, stages.grpo, stages.rollout, stages.lead, stages.distill, stages.evaluate):
    app.command(cls=ConfigCommand, context_settings=OVERRIDES, rich_help_panel=STAGES)(verb)
pairs.app.command("mine", cls=ConfigCommand, context_settings=OVERRIDES)(stages.mine)
app.add_typer(pairs.app, name="pairs", rich_help_panel=STAGES)
app.add_typer(data.app, name="data", rich_help_panel=DATA)
app.add_typer(index.app, name="index", rich_help_panel=DATA)
app.command("serve-retriever", rich_help_panel=DATA)(serving.serve_retriever)
app.command("doctor", cls=ConfigCommand, context_settings=OVERRIDES, rich_help_panel=RUN)(doctor.doctor)
app.command("plan", cls=ConfigCommand, context_settings=OVERRIDES, rich_help_panel=RUN)(plan.plan)
app.command("report", rich_help_panel=RUN)(report.report)
app.command("compare", rich_help_panel=RUNS)(compare.compare)
app.command("sweep", context_settings=OVERRIDES, rich_help_panel=RUNS)(sweep.sweep)
app.command("bundle", rich_help_panel=ASK)(bundle.bundle)
app.command("ask", context_settings=OVERRIDES, rich_help_panel=ASK)(asking.ask)
app.command("chat", context_settings=OVERRIDES, rich_help_panel=ASK)(asking.chat)
app.command("serve", rich_help_panel=ASK)(serving.serve)
app.command("mcp", rich_help_panel=ASK)(serving.mcp)


def main() -> None:
    """Entry point of ``search-e1``: a user's mistake is one line and exit status 2; see ``stopping`` for signals."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # OpenMP threads that spin while waiting starve each other on busy cores: a rollout took 13 times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    keep_freed_memory()
    # Silences libraries' messages to developers; errors are still shown.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("search_e1").setLevel(logging.INFO)
    logging.getLogger("search_e1").addHandler(_LINES)
    try:
        app()
    except SearchE1Error as error:
        if _show_traceback:
            _show_causes(error)
            raise
        _say(plain(str(error)))
        _record(error)
        sys.exit(2)
    except Stopped as stopped:
        if ranks.is_first():
            _say(str(stopped))
        sys.exit(stopped.status)
    except SystemExit as end:
        if end.code == STATUS[signal.SIGINT]:  # Typer makes this of a KeyboardInterrupt, without a word
            _say("interrupted; run the same command again to resume")
        raise
    except Exception as error:
        _record(error)
        raise


class _Lines(logging.Handler):
    """Prints log messages on rank 0, one line each on standard error, above the progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        if ranks.is_first():
            print(plain(record.getMessage()), file=sys.stderr)


_LINES = _Lines()


def _say(message: str) -> None:
    """Print one line on standard error. Rank 0 alone prints errors of all ranks: when it exits, the waiting ones are ended."""
    if ranks.is_first():
        print(f"search-e1: {message}", file=sys.stderr)
        return
    time.sleep(_AFTER_FIRST)
    print(f"search-e1, process {ranks.rank()}: {message}", file=sys.stderr)


def _show_causes(error: BaseException | None) -> None:
    """Make the traceback show the causes of an error, even those suppressed by ``raise ... from None``."""
    while error is not None:
        error.__suppress_context__ = False
        error = error.__context__


def _record(error: Exception) -> None:
    """Record the error for torchrun, which reports the first one that ended the group."""
    if ranks.count() == 1:
        return
    from torch.distributed.elastic.multiprocessing.errors import record

    @record
    def fail() -> None:
        raise error

    with suppress(type(error)):
        fail()
