"""The verbs that run one stage, and their shared parts with ``train``."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from search_e1.cli import asking
from search_e1.cli.config_file import ConfigArgument
from search_e1.errors import RunError
from search_e1.runs import ranks
from search_e1.runs.stopping import on_signals

if TYPE_CHECKING:
    from search_e1.config import Config
    from search_e1.runs import Artifact
    from search_e1.stages.runner import StageRunner

# No markup, since users' names may contain brackets. Only rank 0 prints.
console = Console(markup=False, emoji=False, quiet=not ranks.is_first())

RoundOption = Annotated[int, typer.Option("--round", min=1, help="The round that this stage belongs to.")]
PolicyOption = Annotated[
    str | None,
    typer.Option("--policy", help="Policy to start from. Default: the one made by the run's previous stage."),
]
OutOption = Annotated[Path | None, typer.Option("--out", help="Directory of the artifact. Default: its place in the run.")]
OtherPolicyOption = Annotated[
    bool, typer.Option("--allow-other-policy", help="Accept trajectories of another policy, if the tokenizer is the same.")
]


def coldstart(context: typer.Context, config: ConfigArgument, out: OutOption = None) -> None:
    """Fine-tune the policy, or one from scratch, on demonstrations of how to search and answer."""
    from search_e1.lab.plan import check_memory
    from search_e1.stages.coldstart import Coldstart

    with open_runner(config, context) as runner:
        Coldstart().check(runner.run)
        start = runner.run.config.policy.model
        runner.run.check(start)
        check_memory(runner.run.config, start, ("coldstart",), ranks.count())
        _report(runner.make(Coldstart(), out))


def grpo(
    context: typer.Context,
    config: ConfigArgument,
    round: RoundOption = 1,
    policy: PolicyOption = None,
    out: OutOption = None,
) -> None:
    """Train one round of GRPO."""
    from search_e1.lab.plan import check_memory
    from search_e1.stages.grpo import Grpo

    with open_runner(config, context) as runner:
        start = policy or _before_grpo(runner, round)
        runner.run.check(start)
        check_memory(runner.run.config, start, ("grpo",), ranks.count())
        _report(runner.make(Grpo(start, round), out))


def rollout(
    context: typer.Context,
    config: ConfigArgument,
    round: RoundOption = 1,
    policy: PolicyOption = None,
    out: OutOption = None,
) -> None:
    """Sample a pool of trajectories on the training questions."""
    from search_e1.stages.pool import pool_stage

    with open_runner(config, context) as runner:
        start = policy or _after_grpo(runner, round)
        runner.run.check(start)
        _report(runner.make(pool_stage(runner.run.config, start, round), out))


def mine(
    context: typer.Context,
    config: ConfigArgument,
    round: RoundOption = 1,
    policy: PolicyOption = None,
    pool: Annotated[Path | None, typer.Option("--pool", help="Pool to mine. Default: the run's, of this round.")] = None,
    out: OutOption = None,
    other: OtherPolicyOption = False,
) -> None:
    """Mine a pool for pairs of an efficient reference and a sibling to learn from it."""
    from search_e1.stages.pairs import Pairs

    with open_runner(config, context) as runner:
        start, pool = policy or _after_grpo(runner, round), pool or _complete(runner, f"pool-{round}")
        _report(runner.make(Pairs(start, pool, round, other_policy=other), out))


def lead(
    context: typer.Context,
    config: ConfigArgument,
    round: RoundOption = 1,
    policy: PolicyOption = None,
    pairs: Annotated[Path | None, typer.Option("--pairs", help="Pairs. Default: the run's, of this round.")] = None,
    out: OutOption = None,
    other: OtherPolicyOption = False,
) -> None:
    """Measure the lead: how much better the policy is when it sees the reference."""
    from search_e1.cli.display import lead_table
    from search_e1.selfdistill.lead import Lead
    from search_e1.stages.lead import MeasureLead

    with open_runner(config, context) as runner:
        start, mined = policy or _after_grpo(runner, round), pairs or _complete(runner, f"pairs-{round}")
        measured = runner.make(MeasureLead(start, mined, round, other_policy=other), out)
    console.print(lead_table(Lead.model_validate(measured.manifest.result)))


def distill(
    context: typer.Context,
    config: ConfigArgument,
    round: RoundOption = 1,
    policy: PolicyOption = None,
    pairs: Annotated[Path | None, typer.Option("--pairs", help="Pairs. Default: the run's, of this round.")] = None,
    lead: Annotated[Path | None, typer.Option("--lead", help="Measured lead. Default: the run's, else measured.")] = None,
    out: OutOption = None,
    other: OtherPolicyOption = False,
) -> None:
    """Measure the lead if necessary, distill, and merge the adapter. Refused without a lead.

    With distill.objective = "sft" the references are imitated instead, and no lead is needed.
    """
    from search_e1.lab.plan import check_memory
    from search_e1.stages.distill import Distill
    from search_e1.stages.lead import MeasureLead

    with open_runner(config, context) as runner:
        start, mined = policy or _after_grpo(runner, round), pairs or _complete(runner, f"pairs-{round}")
        check_memory(runner.run.config, start, ("distill",), ranks.count())
        if lead is None and runner.run.config.distill.has_teacher:
            lead = runner.make(MeasureLead(start, mined, round, other_policy=other)).path
        _report(runner.make(Distill(start, mined, lead, round, other_policy=other), out))


def evaluate(
    context: typer.Context,
    config: ConfigArgument,
    policy: PolicyOption = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the evaluation. Default: the policy's stage.")] = None,
    benchmark: Annotated[
        list[str] | None, typer.Option("--benchmark", help="Only this benchmark of data.eval. Repeatable.")
    ] = None,
    out: OutOption = None,
    endpoint: asking.EndpointOption = None,
    endpoint_model: asking.EndpointModelOption = None,
) -> None:
    """Evaluate a policy on the evaluation questions, greedily and sampled, and classify wrong answers."""
    from search_e1.cli.display import show_evaluation
    from search_e1.stages.evaluate import Evaluate, Recall, read_evaluation

    with open_runner(config, context) as runner:
        run = runner.run
        chosen = run.benchmarks(benchmark or ())
        served = asking.endpoint_of(endpoint, endpoint_model, policy)
        start = policy or str(asking.newest(runner.run))
        run.check(served or start)
        if name is None:
            name = Path(start).parent.name if Path(start).name == "policy" else Path(start).name
            name = "base" if not policy and start == run.config.policy.model else name
            name = endpoint_model or name
            name += f"-{'+'.join(chosen)}" if len(chosen) < len(run.config.data.eval) else ""
            name = re.sub(r"[^\w.+-]+", "-", name).lstrip(".-") or "policy"
        stage = Evaluate(served or start, name, None, chosen)
        assert stage.id
        recall = runner.make(Recall()) if run.config.evaluation.recall else None
        made = runner.make(Evaluate(served or start, name, recall, chosen), out)
    show_evaluation(console, read_evaluation(made))
    console.print(f"\n{made.path}", highlight=False, markup=False, soft_wrap=True)


@contextmanager
def joined(config: "Config") -> Iterator[None]:
    """Join the other ranks within the context, if torchrun has started several."""
    if ranks.count() == 1:
        yield
        return
    from search_e1.runs.devices import device

    with ranks.joined(device(config.policy.device).type):
        yield


@contextmanager
def open_runner(config: Path, context: typer.Context) -> "Iterator[StageRunner]":
    """The runner of the config's stages, with the run directory locked within the context."""
    from search_e1.cli.display import watch
    from search_e1.config import load, migrate_fingerprint
    from search_e1.runs.opening import opened
    from search_e1.stages.inputs import Inputs
    from search_e1.stages.runner import StageRunner

    loaded = load(config, context.args)
    versions = context.obj["other_versions"]
    held = opened(loaded.run, loaded.fingerprint(), migrate=migrate_fingerprint, other_versions=versions)
    with joined(loaded), on_signals() as stop, held as root:
        runner = StageRunner(Inputs(loaded, root, watch(console, loaded.rounds)), stop)
        runner.check()
        yield runner


def _report(artifact: "Artifact") -> None:
    """Print the artifact's path and figures. All these stages sample, so ``em`` is ``em_sampled``; evaluations have tables."""
    console.print(f"{artifact.path}", highlight=False, markup=False)
    for name, value in artifact.manifest.result.items():
        shown: Any = f"{value:.4g}" if isinstance(value, float) else json.dumps(value)
        name = "em_sampled" if name == "em" else name
        console.print(f"  {name}  {shown}", highlight=False, markup=False)


# The policy that a stage starts from, found in the run directory.


def _complete(runner: "StageRunner", name: str) -> Path:
    from search_e1 import runs

    path = runner.run.root / name
    if not path.exists():
        raise RunError(f"{path}: does not exist yet; run its stage first, or name another artifact")
    return runs.read(path).path


def _before_grpo(runner: "StageRunner", round: int) -> str:
    if round == 1:
        config = runner.run.config
        return str(_complete(runner, "coldstart") / "policy") if config.coldstart else config.policy.model
    for name in (f"ofsd-{round - 1}", f"grpo-{round - 1}"):
        if (runner.run.root / name).exists():
            return str(_complete(runner, name) / "policy")
    raise RunError(f"{runner.run.root}: round {round - 1} does not exist yet; run its stages first, or give --policy")


def _after_grpo(runner: "StageRunner", round: int) -> str:
    steps = runner.run.config.grpo.steps
    return str(_complete(runner, f"grpo-{round}") / "policy") if steps else _before_grpo(runner, round)
