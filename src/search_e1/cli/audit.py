"""The verb ``search-e1 data audit``."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from search_e1.cli.options import ColumnOption, check_output, open_corpus
from search_e1.errors import ConfigError, ModelError
from search_e1.runs.safe import printable

if TYPE_CHECKING:
    from search_e1.config import Config
    from search_e1.data.corpus import Corpus
    from search_e1.evaluation.audit import Audit, Source
    from search_e1.evaluation.verdict import FileAudit

console = Console(highlight=False, markup=False, emoji=False)


class _Passages(NamedTuple):
    texts: Iterable[str] | None
    skipped: Callable[[], Mapping[str, int]] = dict


def audit(
    config: Annotated[
        Path | None, typer.Option("--config", help="TOML file of a run: its corpus or index, its questions, its policy.")
    ] = None,
    corpus: Annotated[
        list[str] | None, typer.Option("--corpus", help="Passages, as for `index build`; instead of the config's.")
    ] = None,
    column: ColumnOption = None,
    index: Annotated[Path | None, typer.Option("--index", help="Index to read the passages from.")] = None,
    train: Annotated[list[Path] | None, typer.Option("--train", help="Training questions. Repeatable.")] = None,
    eval: Annotated[list[str] | None, typer.Option("--eval", help="Evaluation questions: [NAME=]FILE. Repeatable.")] = None,
    policy: Annotated[
        str | None, typer.Option("--policy", help="Policy whose tokenizer must be able to write the answers.")
    ] = None,
    topk: Annotated[int | None, typer.Option("--topk", min=1, help="Passages per search. Default: rollout.topk, or 3.")] = None,
    json: Annotated[Path | None, typer.Option("--json", help="File for all figures as JSON.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="CSV file for the questions that have a problem.")] = None,
) -> None:
    """Check questions and passages: answers in no passage, leaks, repeats, conflicts, answers that cannot be written.

    Reads whole files, whatever data.max_train and data.max_eval say; writes nothing but --json and --out.
    """
    from search_e1.cli.display import watch
    from search_e1.config import RolloutConfig, load
    from search_e1.data.answers import in_language
    from search_e1.evaluation import audit as auditing
    from search_e1.runs.files import write_atomically

    check_output(json, "--json")
    check_output(out, "--out")
    loaded = load(config) if config else None
    sources = _sources(loaded, train, eval)
    passages = _passages(loaded, corpus, column, index)
    limits = loaded.rollout if loaded else RolloutConfig()
    tokenizer = _tokenizer(loaded, policy)
    with in_language(limits.answer_language), watch(console, 1)("audit") as progress:
        found, examples = auditing.audit(
            sources, passages.texts, topk=topk or limits.topk, tokenizer=tokenizer,
            max_action_tokens=limits.max_action_tokens, skipped=passages.skipped, progress=progress,
        )  # fmt: skip
    show(console, found)
    if json:
        write_atomically(json, found.model_dump_json(indent=2) + "\n")
    if out:
        auditing.write_examples(examples, out)
        console.print(f"\n{out}: {len(examples):,} lines", soft_wrap=True)


def _sources(config: "Config | None", train: list[Path] | None, eval: list[str] | None) -> "list[Source]":
    from search_e1.evaluation.audit import read_source

    trained = train or (list(config.data.train) if config else [])
    named = [_named(word) for word in eval or ()] or (list(config.data.eval.items()) if config else [])
    if not (trained or named):
        raise ConfigError("nothing to audit; give --config FILE, or question files with --train and --eval")
    if repeated := next((name for i, (name, _) in enumerate(named) if name in dict(named[:i])), None):
        raise ConfigError(f"--eval: two files are called {repeated!r}; name one, as in --eval NAME=FILE")
    not_found = config.rollout.rewards.not_found if config else None
    sources = [read_source(path, path.name.partition(".jsonl")[0], "train", not_found) for path in trained]
    return sources + [read_source(path, name, "eval", not_found) for name, path in named]


def _named(word: str) -> tuple[str, Path]:
    name, equals, path = word.partition("=")
    if not equals or Path(word).exists():
        return Path(word).name.partition(".jsonl")[0], Path(word)
    return name, Path(path)


def _passages(config: "Config | None", corpus: list[str] | None, column: list[str] | None, index: Path | None) -> _Passages:
    """Title and text of each passage, from --corpus or --index, else the config's index, else its corpus."""
    from search_e1.retrieval import directory
    from search_e1.retrieval.passages import Passages
    from search_e1.stages.inputs import Inputs

    if corpus and index:
        raise ConfigError("give --corpus or --index, not both")
    if corpus:
        return _of_corpus(open_corpus(corpus, column, skip_bad_lines=True))
    if index is None and config and config.retrieval.index:
        index = config.retrieval.index[0]
    if index:
        directory.read(index)
        return _Passages(Passages.open(index).texts())
    own = Inputs(config, config.run).corpus if config else None
    if own is None:
        console.print(Text("No passages to search: give --corpus or --index.", style="yellow"))
        return _Passages(None)
    own.skip_bad_lines = True
    return _of_corpus(own)


def _of_corpus(corpus: "Corpus") -> _Passages:
    return _Passages((f"{passage.title} {passage.text}" for passage in corpus), lambda: corpus.skipped)


def _tokenizer(config: "Config | None", policy: str | None) -> Any:
    from search_e1.config import NEW, PolicyConfig
    from search_e1.training.policy import load_reader

    name = policy or (config.policy.model if config else NEW)
    if name == NEW:
        return None
    try:
        return load_reader(
            name, config.policy if config else PolicyConfig(model=name), config.prompts if config else None
        ).tokenizer
    except ModelError as error:
        if policy:
            raise
        console.print(Text(printable(f"Continuing without the policy's tokenizer: {error}"), style="yellow"), soft_wrap=True)
        return None


def show(console: Console, found: "Audit") -> None:
    """Print the reach of the questions and their problems, one row per file, then the findings. Fits 80 columns."""
    from search_e1.cli.display.findings import findings_table

    rows = [*found.files, *(total for total in found.totals if sum(f.role == total.role for f in found.files) > 1)]
    if found.passages is not None:
        console.print(_reach_table(rows, found))
        console.print()
    console.print(_fault_table(rows))
    console.print()
    console.print(findings_table(found.findings))


def _reach_table(rows: "list[FileAudit]", found: "Audit") -> Table:
    from search_e1.cli.display import plain_table, share

    depths = sorted({k for row in rows for k in row.in_top})
    title = f"Questions with an answer in {found.passages:,} passages, and in the top k for the question"
    table = plain_table(
        title, "questions", "n", "yes/\nno", "corpus", *(f"top\n{k}" for k in depths), "rank", "pas-\nsages", "com-\nmon"
    )
    for row in rows:
        shares = (share(row.in_corpus), *(share(row.in_top.get(k)) for k in depths))
        medians = ("" if value is None else f"{value:,.0f}" for value in (row.rank, row.passages))
        table.add_row(Text(printable(row.name)), str(row.questions), str(row.yes_no), *shares, *medians, str(row.common))
    return table


def _fault_table(rows: "list[FileAudit]") -> Table:
    from search_e1.cli.display import plain_table

    headings = ("refused", "unsay-\nable", "con-\nflict", "leaked", "nearly\nleaked", "re-\npeated", "nearly\nrepeated")
    table = plain_table("Questions with a problem", "questions", "n", *headings)
    for row in rows:
        counts = (row.refused, row.unsayable, row.conflicts, row.leaks, row.near_leaks, row.repeats, row.near_repeats)
        table.add_row(Text(printable(row.name)), str(row.questions), *(str(count or "") for count in counts))
    return table
