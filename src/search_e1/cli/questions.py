"""The verb ``search-e1 data questions``: makes question-answer pairs from passages, and applies a review of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.text import Text

from search_e1.cli.options import ColumnOption, EncoderOption, PrefixOption, encoder_settings, open_corpus
from search_e1.errors import ConfigError, RunError
from search_e1.runs.safe import printable

if TYPE_CHECKING:
    from search_e1.questions.completions import Costs
    from search_e1.questions.make import Made
    from search_e1.questions.review import Reviewed

console = Console(highlight=False, markup=False, emoji=False)
CorpusOption = Annotated[
    list[str] | None, typer.Option("--corpus", help="Passages, as for `search-e1 index build`. Repeatable.")
]
EndpointOption = Annotated[
    str | None,
    typer.Option("--endpoint", help="OpenAI-compatible server that writes the questions; key: SEARCH_E1_API_KEY."),
]
PolicyOption = Annotated[
    str | None, typer.Option("--policy", help="Directory or GGUF file of a model that writes them on this machine.")
]
MaxTokensOption = Annotated[
    int | None,
    typer.Option("--max-tokens", min=8, help="Maximum tokens of a reply. Default: 1024 from an endpoint, 192 from a policy."),
]
IndexesOption = Annotated[
    list[Path] | None, typer.Option("--index", help="Index of the corpus. Default: a temporary BM25 index. Repeatable.")
]
ReviewOption = Annotated[
    Path | None,
    typer.Option("--review", help="A reviewed review.csv: write the questions that it keeps, instead of making questions."),
]


def questions(
    out: Annotated[Path, typer.Option("--out", help="New directory for the question files.")],
    corpus: CorpusOption = None,
    column: ColumnOption = None,
    prefix_ids: PrefixOption = False,
    endpoint: EndpointOption = None,
    model: Annotated[str | None, typer.Option("--model", help="Name of the model on the endpoint.")] = None,
    policy: PolicyOption = None,
    by: Annotated[
        Literal["rule"] | None, typer.Option("--by", help="`rule`: write the questions by rules, without a model.")
    ] = None,
    number: Annotated[int, typer.Option("--number", min=1, help="Questions to make, in both splits together.")] = 200,
    two_hop: Annotated[float, typer.Option(min=0, max=1, help="Share of questions that need two linked passages.")] = 0.25,
    depth: Annotated[int, typer.Option(min=1, help="The retriever must find each passage within this many.")] = 10,
    index: IndexesOption = None,
    encoder: EncoderOption = None,
    eval_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share of questions for evaluation, from separate documents.")
    ] = 0.2,
    per_passage: Annotated[int, typer.Option(min=1, max=10, help="Maximum questions per passage or linked pair.")] = 2,
    temperature: Annotated[float, typer.Option(min=0, help="Temperature of the questions; answers are greedy.")] = 0.7,
    max_tokens: MaxTokensOption = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Concurrent requests to the endpoint.")] = 8,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds per attempt of a request.")] = 300.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of choice, split and sampling.")] = 0,
    review: ReviewOption = None,
) -> None:
    """Make questions with short answers from passages, filter them, and split them by document; or apply a review."""
    if out.exists() or out.is_symlink():
        raise RunError(f"{out} exists; give another --out, or remove it")
    if review is not None:
        if corpus or endpoint or policy or by:
            raise ConfigError("--review goes with --out alone; make the questions first, then review them")
        from search_e1.questions.review import apply

        _show_review(apply(review, out), out)
        return
    if not corpus:
        raise ConfigError("no passages; give --corpus FILE-OR-DIRECTORY, or --review FILE of questions made earlier")
    if sum(map(bool, (endpoint, policy, by))) != 1:
        raise ConfigError(
            "nothing to write the questions with; give one of --endpoint URL --model NAME, --policy DIR, --by rule"
        )
    if bool(endpoint) != bool(model):
        raise ConfigError("--endpoint and --model belong together; give both")
    if eval_share == 1:
        raise ConfigError("--eval-share 1 leaves no training questions; give a share below 1")
    from search_e1.cli.display import watch
    from search_e1.questions.make import Request, make_questions
    from search_e1.questions.opening import By
    from search_e1.retrieval.indexes import open_indexes

    request = Request(tuple(corpus), number, two_hop, depth, eval_share, per_passage, seed)
    written_by = By(out, endpoint, model, policy, temperature, max_tokens, concurrency, timeout, per_passage, seed)
    retriever = open_indexes(index, encoder_settings(encoder)) if index else None
    read = open_corpus(corpus, column, prefix_ids)
    passages, checksum = list(read), read.checksum()
    out.parent.mkdir(parents=True, exist_ok=True)
    settings = {**written_by.settings(), "index": retriever.checksum if retriever else None}
    with watch(console, 1)("questions") as progress:
        made = make_questions(
            request, passages, out, written_by.open,
            checksum=checksum, settings=settings, retriever=retriever, progress=progress,
        )  # fmt: skip
    written_by.forget()
    _show(made, written_by.costs, out, corpus)


def _show(made: "Made", costs: "Costs | None", out: Path, corpus: Sequence[str]) -> None:
    """Print the questions left after each filter, the costs, and a config. Fits 80 columns."""
    from search_e1.cli.display import plain_table

    table = plain_table("Questions left after each filter", "", "one hop", "two hops", "all", "of written")
    written = sum(made.funnel["written"])
    for step, (one, two) in made.funnel.items():
        table.add_row(step, str(one), str(two), str(one + two), f"{(one + two) / max(1, written):.3f}")
    console.print(table)
    console.print(f"\nwritten from {made.candidates[0]:,} passages and {made.candidates[1]:,} linked pairs")
    for note in made.notes:
        console.print(Text(printable(note), style="yellow"), soft_wrap=True)
    if costs:
        tokens = f"{costs.prompt_tokens:,} prompt and {costs.completion_tokens:,} completion tokens"
        reused = f"; {costs.reused:,} replies reused from an interrupted call" if costs.reused else ""
        console.print(f"{costs.requests:,} requests, {tokens}{reused}", soft_wrap=True)
    counts = ", ".join(f"{len(drafts)} in {name}.jsonl" for name, drafts in made.questions.items())
    console.print(f"{out}: {counts}; look through {out / 'review.csv'}", soft_wrap=True)
    _show_config(out, corpus, [name for name, drafts in made.questions.items() if drafts])


def _show_config(out: Path, corpus: Sequence[str], files: Sequence[str]) -> None:
    console.print("\nFor a config:\n\n[data]")
    if corpus:
        print(f"corpus = {json.dumps(list(corpus), ensure_ascii=False)}")
    if "train" in files:
        print(f"train = [{json.dumps(str(out / 'train.jsonl'), ensure_ascii=False)}]")
    if "eval" in files:
        print(f"\n[data.eval]\nmade = {json.dumps(str(out / 'eval.jsonl'), ensure_ascii=False)}")


def _show_review(reviewed: "Reviewed", out: Path) -> None:
    counts = ", ".join(f"{reviewed.counts[what]} {what}" for what in ("accepted", "edited", "dropped"))
    kept = ", ".join(f"{len(questions)} in {name}.jsonl" for name, questions in reviewed.questions.items())
    for note in reviewed.notes:
        console.print(Text(printable(note), style="yellow"), soft_wrap=True)
    console.print(f"{counts}\n{out}: {kept}", soft_wrap=True)
    _show_config(out, (), [name for name, questions in reviewed.questions.items() if questions])
