"""The command line: one verb per stage."""

import json
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from search_e1.cli import asking, compare, data, index, pairs, plan, serve, sweep
from search_e1.errors import RunError, SearchE1Error
from search_e1.runs.allocation import keep_freed_memory
from search_e1.runs.safe import plain
from search_e1.runs.stopping import Stopped, on_signals

if TYPE_CHECKING:
    from search_e1.config import Config
    from search_e1.stages.all import Stages

# What takes seconds to import (torch, transformers) is imported by the verb that needs it: `--help` must not wait for it.

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train search agents by GRPO interleaved with offline self-distillation.",
    epilog="Errors are one line; --traceback before the verb shows where they came from.",
)
console = Console(markup=False, emoji=False)  # in what is named by users, brackets are brackets

OVERRIDES = asking.OVERRIDES
# Panels of `--help`; they come in the order of their first verbs.
RUN, STAGES, RUNS, ASK, DATA = (
    "A run",
    "Its stages, one by one",
    "Several runs",
    "Ask",
    "Questions, passages, retrieval",
)
ConfigOption = Annotated[Path, typer.Option("--config", help="TOML file; every key can be set as --section.key VALUE.")]
RoundOption = Annotated[int, typer.Option("--round", min=1, help="The round that this stage belongs to.")]
PolicyOption = Annotated[
    str | None,
    typer.Option("--policy", help="Policy to start from. Default: what the stage before it in the run made."),
]
OutOption = Annotated[
    Path | None, typer.Option("--out", help="Where the artifact goes. Default: its place in the run.")
]
OtherPolicyOption = Annotated[
    bool, typer.Option("--allow-other-policy", help="Take what another policy sampled, if the tokenizer is the same.")
]


@app.callback()
def options(
    context: typer.Context,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show tracebacks of errors.")] = False,
    other_versions: Annotated[
        bool, typer.Option("--other-versions", help="Go on with a run that was begun under other package versions.")
    ] = False,
) -> None:
    global _show_traceback, _other_versions
    _show_traceback, _other_versions = traceback, other_versions
    context.obj = {"other_versions": other_versions}


_show_traceback = _other_versions = False


@app.command(context_settings=OVERRIDES, rich_help_panel=RUN)
def train(
    context: typer.Context,
    config: ConfigOption,
    branch: Annotated[
        Path | None,
        typer.Option(
            "--branch",
            help="A new run directory, which takes over from `run` what a changed config would make the same.",
        ),
    ] = None,
) -> None:
    """Run the whole loop, or what is left of it, and print what it came to."""
    from search_e1 import evolve
    from search_e1.cli.display import summary_table, watch
    from search_e1.stages import all as stages

    loaded = _load(config, context)
    origin = loaded.run if branch else None
    loaded = loaded.model_copy(update={"run": branch}) if branch else loaded
    with on_signals() as stop:
        summary = evolve.train(
            loaded, watch(console, loaded.rounds), stop, branch_of=origin, other_versions=_other_versions
        )
    if not stages.is_first(loaded):
        return
    for number, round in summary.rounds.items():
        if round.refused:
            console.print(f"round {number}: not distilled: {round.refused}", style="yellow", markup=False)
    console.print(summary_table(summary))
    console.print(f"{loaded.run / evolve.SUMMARY}", highlight=False)


@app.command(context_settings=OVERRIDES, rich_help_panel=STAGES)
def warmstart(context: typer.Context, config: ConfigOption, out: OutOption = None) -> None:
    """Train a first policy on demonstrations built from the questions' supporting passages."""
    with _stages(config, context) as stages:
        made = stages.warmstart(out)
    console.print(f"{made.path / 'policy'}", highlight=False)


@app.command(context_settings=OVERRIDES, rich_help_panel=STAGES)
def grpo(
    context: typer.Context,
    config: ConfigOption,
    round: RoundOption = 1,
    policy: PolicyOption = None,
    out: OutOption = None,
) -> None:
    """Train one round of GRPO."""
    with _stages(config, context) as stages:
        start = policy or _before_grpo(stages, round)
        stages.check(start)
        stages.check_memory(start, "grpo")
        _report(stages.grpo(start, round, out))


@app.command(context_settings=OVERRIDES, rich_help_panel=STAGES)
def rollout(
    context: typer.Context,
    config: ConfigOption,
    round: RoundOption = 1,
    policy: PolicyOption = None,
    out: OutOption = None,
) -> None:
    """Sample a pool of trajectories on the training questions."""
    with _stages(config, context) as stages:
        start = policy or _after_grpo(stages, round)
        stages.check(start)
        _report(stages.pool(start, round, out))


@pairs.app.command("mine", context_settings=OVERRIDES)
def mine(
    context: typer.Context,
    config: ConfigOption,
    round: RoundOption = 1,
    policy: PolicyOption = None,
    pool: Annotated[
        Path | None, typer.Option("--pool", help="Pool to mine. Default: the run's, of this round.")
    ] = None,
    out: OutOption = None,
    other: OtherPolicyOption = False,
) -> None:
    """Mine a pool for pairs of an efficient reference and a sibling that is to learn from it."""
    with _stages(config, context) as stages:
        pool = pool or _made(stages, f"pool-{round}")
        _report(stages.pairs(policy or _after_grpo(stages, round), pool, round, out, other_policy=other))


@app.command(context_settings=OVERRIDES, rich_help_panel=STAGES)
def lead(
    context: typer.Context,
    config: ConfigOption,
    round: RoundOption = 1,
    policy: PolicyOption = None,
    pairs: Annotated[Path | None, typer.Option("--pairs", help="Pairs. Default: the run's, of this round.")] = None,
    out: OutOption = None,
    other: OtherPolicyOption = False,
) -> None:
    """Measure how much better the policy is when it sees the reference."""
    from search_e1.cli.display import lead_table
    from search_e1.selfdistill.lead import Lead

    with _stages(config, context) as stages:
        mined = pairs or _made(stages, f"pairs-{round}")
        made = stages.lead(policy or _after_grpo(stages, round), mined, round, out, other_policy=other)
    console.print(lead_table(Lead.model_validate(made.manifest.result)))


@app.command(context_settings=OVERRIDES, rich_help_panel=STAGES)
def distill(
    context: typer.Context,
    config: ConfigOption,
    round: RoundOption = 1,
    policy: PolicyOption = None,
    pairs: Annotated[Path | None, typer.Option("--pairs", help="Pairs. Default: the run's, of this round.")] = None,
    lead: Annotated[
        Path | None, typer.Option("--lead", help="Measured lead. Default: the run's, else measured.")
    ] = None,
    out: OutOption = None,
    other: OtherPolicyOption = False,
) -> None:
    """Measure the lead if it is not measured yet, distil, and merge the adapter. Refused without a lead.

    With distill.objective = "sft" the references are imitated instead, and no lead is asked for.
    """
    with _stages(config, context) as stages:
        start = policy or _after_grpo(stages, round)
        mined = pairs or _made(stages, f"pairs-{round}")
        stages.check_memory(start, "distill")
        taught = stages.config.distill.objective == "ofsd"
        measured = lead or (stages.lead(start, mined, round, other_policy=other).path if taught else None)
        _report(stages.distill(start, mined, measured, round, out, other_policy=other))


@app.command(context_settings=OVERRIDES, rich_help_panel=STAGES)
def evaluate(
    context: typer.Context,
    config: ConfigOption,
    policy: PolicyOption = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the evaluation. Default: the policy's stage.")
    ] = None,
    benchmark: Annotated[
        list[str] | None, typer.Option("--benchmark", help="Only this benchmark of data.eval. May come again.")
    ] = None,
    out: OutOption = None,
    endpoint: asking.EndpointOption = None,
    endpoint_model: asking.EndpointModelOption = None,
) -> None:
    """Evaluate a policy on the evaluation questions, greedily and sampled, and say why answers are wrong."""
    from search_e1.cli.display import show_evaluation
    from search_e1.stages.all import read_evaluation

    with _stages(config, context) as stages:
        chosen = stages.benchmarks(benchmark or ())
        served = asking.endpoint_of(endpoint, endpoint_model, policy)
        start = policy or str(asking.newest(stages))
        stages.check(served or start)
        if name is None:
            name = Path(start).parent.name if Path(start).name == "policy" else Path(start).name
            name = "base" if not policy and start == stages.config.policy.model else name
            name = endpoint_model or name
            name += f"-{'+'.join(chosen)}" if len(chosen) < len(stages.config.data.eval) else ""
            name = re.sub(r"[^\w.+-]+", "-", name).lstrip(".-") or "policy"
        made = stages.evaluate(served or start, name, out, chosen)
    show_evaluation(console, read_evaluation(made))
    console.print(f"\n{made.path}", highlight=False, markup=False, soft_wrap=True)


@app.command(rich_help_panel=RUN)
def report(
    run: Annotated[Path, typer.Argument(help="Run directory, finished or not.")],
    out: Annotated[Path | None, typer.Option("--out", help="HTML file. Default: report.html in the run.")] = None,
    most: Annotated[
        int, typer.Option(min=1, help="About this many trajectories; of more, a fixed sample of questions.")
    ] = 5_000,
) -> None:
    """Write a run as one HTML file: figures, costs, trajectories, pairs, rounds."""
    from search_e1.evaluation.report.page import write

    out = out or run / "report.html"
    shown = write(run, out, most)
    left_out = f" (of {shown['trajectories'] + shown['left_out']})" if shown["left_out"] else ""
    console.print(
        f"{out}: {shown['policies']} policies, {shown['trajectories']} trajectories{left_out}, {shown['pairs']} pairs, "
        f"{shown['bytes'] / 1e6:.1f} MB",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


@app.command(rich_help_panel=DATA)
def world(
    directory: Annotated[
        Path, typer.Argument(help="Where corpus.jsonl, train.jsonl, dev.jsonl, test.jsonl and demonstrations.jsonl go.")
    ],
    train: Annotated[int, typer.Option(min=1, help="Training questions.")] = 800,
    dev: Annotated[int, typer.Option(min=1, help="Development questions.")] = 300,
    test: Annotated[
        int, typer.Option(min=1, help="Test questions, over entities that no other question touches.")
    ] = 300,
    seed: Annotated[int, typer.Option(min=0, help="Of the questions; the world itself is always the same.")] = 0,
) -> None:
    """Write the small world: a corpus, questions, and demonstrations for training ones; it needs no download."""
    from search_e1.config import PolicyConfig
    from search_e1.data.questions import load_questions
    from search_e1.data.world import make_world, write
    from search_e1.rollout.world_demonstrations import write_gold
    from search_e1.training.policy import load_reader

    if (directory / "corpus.jsonl").exists():
        console.print(f"{directory} is there already", markup=False, highlight=False)
        return
    small = make_world()
    write(small, directory, train=train, dev=dev, test=test, seed=seed)
    reader = load_reader("small", PolicyConfig(model="small"))
    write_gold(directory / "demonstrations.jsonl", small, load_questions(directory / "train.jsonl"), reader)
    console.print(
        f"{directory}: corpus, {train} train, {dev} dev, {test} test questions, {train} demonstrations",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


@app.command(rich_help_panel=RUN)
def config() -> None:
    """Print every key of the configuration, its default and what it does."""
    from search_e1.config import describe

    print(describe(), end="")


app.add_typer(pairs.app, name="pairs", rich_help_panel=STAGES)
app.add_typer(data.app, name="data", rich_help_panel=DATA)
app.add_typer(index.app, name="index", rich_help_panel=DATA)
app.command("serve-retriever", rich_help_panel=DATA)(serve.serve_retriever)
app.command("plan", context_settings=OVERRIDES, rich_help_panel=RUN)(plan.plan)
app.command("compare", rich_help_panel=RUNS)(compare.compare)
app.command("sweep", context_settings=OVERRIDES, rich_help_panel=RUNS)(sweep.sweep)
app.command("ask", context_settings=OVERRIDES, rich_help_panel=ASK)(asking.ask)
app.command("chat", context_settings=OVERRIDES, rich_help_panel=ASK)(asking.chat)


@contextmanager
def _stages(config: Path, context: typer.Context) -> "Iterator[Stages]":
    from search_e1.cli.display import watch
    from search_e1.config import bound_now
    from search_e1.runs.opening import opened
    from search_e1.stages.all import Stages

    loaded = _load(config, context)
    held = opened(loaded.run, loaded.binding(), bound_now=bound_now, other_versions=_other_versions)
    with on_signals() as stop:
        if Stages(loaded, loaded.run, stop=stop).follow():
            raise typer.Exit
        with held as root, (stages := Stages(loaded, root, watch(console, loaded.rounds), stop)).together():
            yield stages


def _load(config: Path, context: typer.Context) -> "Config":
    from search_e1.config import load

    return load(config, context.args)


def _report(artifact) -> None:
    """The artifact's place, and its figures."""
    console.print(f"{artifact.path}", highlight=False, markup=False)
    for name, value in artifact.manifest.result.items():
        shown = f"{value:.4g}" if isinstance(value, float) else json.dumps(value)
        console.print(f"  {name}  {shown}", highlight=False, markup=False)


# Which policy a stage starts from, read off the run directory.


def _made(stages: "Stages", name: str) -> Path:
    from search_e1 import runs

    path = stages.root / name
    if not path.exists():
        raise RunError(f"{path}: not made yet; run its stage first, or name another artifact")
    return runs.read(path).path


def _before_grpo(stages: "Stages", round: int) -> str:
    if round == 1:
        return stages.config.policy.model
    for name in (f"ofsd-{round - 1}", f"grpo-{round - 1}"):
        if (stages.root / name).exists():
            return str(_made(stages, name) / "policy")
    raise RunError(f"{stages.root}: round {round - 1} is not made yet; run its stages first, or give --policy")


def _after_grpo(stages: "Stages", round: int) -> str:
    return str(_made(stages, f"grpo-{round}") / "policy") if stages.config.grpo.steps else _before_grpo(stages, round)


def main() -> None:
    """Entry point of ``search-e1``: a user's mistake is one line and exit status 2; see ``stopping`` for signals."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # OpenMP threads that spin while they wait starve each other on busy cores: a rollout took 13 times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    keep_freed_memory()
    # What libraries say to their developers; errors still come through.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        app()
    except SearchE1Error as error:
        if _show_traceback:
            raise
        print(f"search-e1: {plain(str(error))}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        print(f"search-e1: {stopped}", file=sys.stderr)
        sys.exit(stopped.status)
    except KeyboardInterrupt:
        print("search-e1: interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
