"""The verbs that answer questions: one (`ask`), or one after another (`chat`)."""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from search_e1.errors import ConfigError, SearchE1Error
from search_e1.runs.safe import plain, printable

if TYPE_CHECKING:
    from search_e1.agent.agent import Agent
    from search_e1.agent.answer import Answer
    from search_e1.rollout.engines.endpoint import Endpoint
    from search_e1.stages.inputs import Inputs
    from search_e1.types import Passage, Turn

# typer does not know overrides such as --grpo.steps 8; they are checked against the config.
OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
console = Console(markup=False, emoji=False)

AgentOption = Annotated[Path | None, typer.Option("--agent", help="Bundle of an agent (`search-e1 bundle`).")]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="TOML file with the limits, and the run whose policy and index to use.")
]
ModelOption = Annotated[str | None, typer.Option("--model", help="Policy directory, Hub id, or `small`.")]
IndexOption = Annotated[
    list[Path] | None, typer.Option("--index", help="Directory of an index. Given twice, their rankings are fused.")
]
EncoderOption = Annotated[str | None, typer.Option("--encoder", help="Current directory of a dense index's encoder.")]
UrlOption = Annotated[str | None, typer.Option("--url", help="Retrieval server, instead of --index.")]
TemperatureOption = Annotated[float, typer.Option("--temperature", min=0, help="0 is greedy.")]
EndpointOption = Annotated[
    str | None,
    typer.Option("--endpoint", help="OpenAI-compatible server to use instead of a policy, e.g. http://127.0.0.1:8000/v1."),
]
EndpointModelOption = Annotated[str | None, typer.Option("--endpoint-model", help="Name of the model on the endpoint.")]


def ask(
    context: typer.Context,
    question: Annotated[str, typer.Argument(help="The question.")],
    agent: AgentOption = None,
    config: ConfigOption = None,
    model: ModelOption = None,
    index: IndexOption = None,
    encoder: EncoderOption = None,
    url: UrlOption = None,
    temperature: TemperatureOption = 0.0,
    endpoint: EndpointOption = None,
    endpoint_model: EndpointModelOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer and its sources as one line of JSON.")] = False,
) -> None:
    """Answer one question: show thoughts, searches and passages live, then the answer and the passages that hold it."""
    if not question.strip():
        raise ConfigError("the question is empty; give one in quotes")
    asked = endpoint_of(endpoint, endpoint_model, model)
    opened = context.with_resource(_open(context, agent, config, model, index, encoder, url, asked))
    if as_json:
        answer = opened.ask(question, temperature=temperature)
        print(json.dumps(answer.as_json(), ensure_ascii=False))
    else:
        answer = _answer(opened, question, temperature)
    if answer.text is None:
        raise typer.Exit(1)


def chat(
    context: typer.Context,
    agent: AgentOption = None,
    config: ConfigOption = None,
    model: ModelOption = None,
    index: IndexOption = None,
    encoder: EncoderOption = None,
    url: UrlOption = None,
    temperature: TemperatureOption = 0.0,
    endpoint: EndpointOption = None,
    endpoint_model: EndpointModelOption = None,
) -> None:
    """Answer questions, one per line, until Ctrl-D. Each question is independent; Ctrl-C interrupts an answer."""
    asked = endpoint_of(endpoint, endpoint_model, model)
    opened = context.with_resource(_open(context, agent, config, model, index, encoder, url, asked))
    for question in _lines():
        try:
            _answer(opened, question, temperature)
        except SearchE1Error as error:  # concerns this question; the next may succeed
            print(f"search-e1: {plain(str(error))}", file=sys.stderr)
        except KeyboardInterrupt:
            console.print("\n(interrupted)", style="red")


def endpoint_of(url: str | None, model: str | None, policy: str | None) -> "Endpoint | None":
    """The endpoint that the options name, if any.

    Raises:
        ConfigError: only one of ``url`` and ``model`` is given, or both with a policy.
    """
    from search_e1.rollout.engines.endpoint import Endpoint

    if (url is None) != (model is None):
        raise ConfigError("--endpoint and --endpoint-model belong together; give both")
    if url and policy:
        raise ConfigError(f"--endpoint and a policy ({policy}); give one of them")
    return Endpoint(url, model) if url and model else None


def newest(stages: "Inputs") -> str:
    """The last policy made by the run, else the one that it starts from."""
    for round in range(stages.config.rounds, 0, -1):
        for name in (f"ofsd-{round}", f"grpo-{round}"):
            if (stages.root / name).exists():
                return str(stages.root / name / "policy")
    made = stages.root / "coldstart"
    return str(made / "policy") if made.exists() else stages.config.policy.model


def _open(
    context: typer.Context,
    bundle: Path | None,
    config: Path | None,
    model: str | None,
    index: list[Path] | None,
    encoder: str | None,
    url: str | None,
    endpoint: "Endpoint | None",
) -> "Agent":
    """The agent that the options describe, loaded."""
    from search_e1.agent.agent import Agent
    from search_e1.config import PolicyConfig, load
    from search_e1.retrieval.base import Retriever
    from search_e1.retrieval.client import HttpRetriever
    from search_e1.retrieval.convention import EncoderSettings
    from search_e1.retrieval.indexes import open_indexes
    from search_e1.rollout.engines.registry import open_engine
    from search_e1.runs import day
    from search_e1.stages.inputs import Inputs
    from search_e1.training import policy as policies

    stages = None
    if config:
        loaded = load(config, context.args)
        stages = Inputs(loaded, loaded.run)
        context.with_resource(day.pin(day.recorded(loaded.run)))
    elif context.args:
        raise ConfigError(f"unexpected argument {context.args[0]!r}; overrides need --config")
    if bundle:
        if config or model or endpoint:
            raise ConfigError("--agent brings its own policy; give no --config, --model or --endpoint with it")
        return Agent.open(bundle, url=url, index=index or (), encoder=encoder)
    if model is None and stages is None and endpoint is None:
        raise ConfigError("no policy; give --agent DIR, --model DIR, --endpoint URL, or --config FILE of a run")
    if not index and url is None and stages is None:
        raise ConfigError("no passages; give --index DIR, --url URL, --agent DIR, or --config FILE of a run")
    if url:
        retriever: Retriever = HttpRetriever(url)
    elif index:
        retriever = open_indexes(index, EncoderSettings(model=encoder) if encoder else None)
    else:
        retriever = stages.retriever  # type: ignore[union-attr]
    prompts = stages.config.prompts if stages else None
    of_policy = stages.config.policy if stages else PolicyConfig(model=str(model))
    policy: Any = endpoint
    if stages and not endpoint and stages.config.rollout.engine != "torch":
        policy, prompts = context.with_resource(open_engine(stages.config, model or newest(stages)))
    elif not endpoint:
        policy = policies.load(model or newest(stages), of_policy, prompts)  # type: ignore[arg-type]
    return Agent(policy, retriever, stages.config.rollout if stages else None, prompts=prompts)


def _answer(agent: "Agent", question: str, temperature: float) -> "Answer":
    """Ask, showing the trajectory as it is sampled."""
    from search_e1.cli.display.answers import show_answer

    shown = _Live() if console.is_terminal else None
    on_turn = shown.turn if shown else _show_turn
    answer = agent.ask(question, temperature=temperature, on_turn=on_turn, on_text=shown.text if shown else None)
    show_answer(console, answer)
    return answer


class _Live:
    """Shows text as it is sampled, then each observation."""

    def __init__(self) -> None:
        self._said = False

    def text(self, piece: str) -> None:
        self._said = True
        console.print(Text(printable(piece), style="dim"), end="", soft_wrap=True)

    def turn(self, turn: "Turn", passages: "Sequence[Passage]") -> None:
        from search_e1.cli.display import show_reply

        if self._said:
            console.print()
        self._said = False
        show_reply(console, turn)


def _show_turn(turn: "Turn", passages: "Sequence[Passage]") -> None:
    from search_e1.cli.display import show_turn

    show_turn(console, turn)


def _lines() -> Iterator[str]:
    """Questions from the terminal or another standard input, without empty lines."""
    prompt = "\n? " if sys.stdin.isatty() and console.is_terminal else ""
    with suppress(ImportError):
        import readline  # noqa: F401  line editing and history, if Python has it
    while True:
        try:
            line = input(prompt)
        except EOFError:
            if prompt:
                console.print()
            return
        except UnicodeDecodeError as error:
            print(f"search-e1: skipped a line that is not UTF-8 ({error.reason})", file=sys.stderr)
            continue
        # Escape sequences of keys that the terminal did not handle are not part of a question.
        line = re.sub(r"\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f]", " ", line).strip()
        if line:
            yield line
