"""Terminal output: progress, tables, turns."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, cast

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bars
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text

from search_e1.runs.progress import Pace, Progress, count, stage_label
from search_e1.runs.safe import printable
from search_e1.text.prompts import seen_passages
from search_e1.types import ActionKind, Passage, Turn

if TYPE_CHECKING:
    from search_e1.evaluation.results import Evaluation
    from search_e1.evolve import Summary
    from search_e1.retrieval.directory import IndexManifest
    from search_e1.selfdistill.lead import Lead


_TABLE_WIDTH = 80  # columns that every table fits


def watch(console: Console, rounds: int) -> Callable[[str], AbstractContextManager[Progress]]:
    """A progress bar per stage: name, round, progress, elapsed and remaining time, and the figure to watch.

    If the output is not a terminal, one line at the end of each stage.
    """

    @contextmanager
    def stage(name: str) -> Iterator[Progress]:
        bar = _Bar(console, printable(stage_label(name, rounds)))
        with bar.bars:
            try:
                yield bar
            except BaseException:
                bar.hide_unless_begun()
                raise
            bar.end()

    return stage


class _Bar:
    """A progress listener that draws a bar."""

    def __init__(self, console: Console, label: str) -> None:
        self._pace = Pace()
        self.bars = Bars(
            TextColumn("{task.description:<20}", markup=False),
            BarColumn(bar_width=6),
            TextColumn("{task.fields[count]:>9}", markup=False),
            TextColumn("{task.fields[pace]!s:>11}", markup=False),
            # The rest of the line, most important part first, since it may be cut off.
            TextColumn("{task.fields[figure]}", markup=False, table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
            console=console,
            expand=True,
        )
        self._task = self.bars.add_task(label, total=None, figure="", count="", pace=self._pace)

    def __call__(self, done: float, total: int, figure: str = "") -> None:
        self._pace.report(done, total)
        shown = figure or self.bars.tasks[self._task].fields["figure"]
        self.bars.update(self._task, completed=done, total=total or None, figure=shown, count=count(done, total))

    within = __call__

    def hide_unless_begun(self) -> None:
        """A stage that was refused at once has no progress to show."""
        self.bars.update(self._task, visible=bool(self.bars.tasks[self._task].completed))

    def end(self) -> None:
        done = self.bars.tasks[self._task].completed or 1
        self.bars.update(self._task, completed=done, total=done, pace=str(self._pace).partition("<")[0])


class _Figures(Table):
    """A table that loses no column on a terminal narrower than 80 columns: its lines then go on below."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        if width >= _TABLE_WIDTH:
            yield from super().__rich_console__(console, options)
            return
        segments = cast("Iterable[Segment]", super().__rich_console__(console, options.update(width=_TABLE_WIDTH)))
        for line in Segment.split_and_crop_lines(segments, _TABLE_WIDTH, pad=False, include_new_lines=False):
            cells = cell_len("".join(segment.text for segment in line).rstrip())
            for part in Segment.divide(line, [*range(width, cells, width), cells]):
                yield from part
                yield Segment.line()


def plain_table(title: str | None, *headings: str, left: int = 1) -> Table:
    """A table without a frame, to fit 80 columns. The first ``left`` columns are text, which folds; the others are figures,
    which do not."""
    table = _Figures(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for number, heading in enumerate(headings):
        text = number < left
        table.add_column(heading, justify="left" if text else "right", overflow="fold", no_wrap=not text)
    return table


def summary_table(summary: "Summary") -> RenderableType:
    """A run's EM with 95% intervals, then its costs, one row per evaluated policy. Fits 80 columns."""
    return Group(_em_table(summary), "", _cost_table(summary))


def _em_table(summary: "Summary") -> Table:
    """EM of each policy; macro averages only if there are several benchmarks."""
    several = any(len(policy.by_benchmark) > 1 for policy in summary.policies)
    over = ("\nmicro", "95%") if several else ("", "95%")
    headings = ["policy", "n", f"greedy EM{over[0]}", over[1], f"sampled EM{over[0]}", over[1]]
    headings += ["greedy EM\nmacro", "95%"] if several else []
    table = plain_table(f"EM of each policy (seed {summary.seed})", *headings)
    for policy in summary.policies:
        macro = (share(policy.macro_em), _interval(policy.macro_em_interval)) if several else ()
        greedy = (share(policy.em), _interval(policy.em_interval))
        sampled = (share(policy.em_sampled), _interval(policy.em_sampled_interval))
        table.add_row(policy.stage, str(policy.n), *greedy, *sampled, *macro)
    return table


def _cost_table(summary: "Summary") -> Table:
    hops = sorted({h for policy in summary.policies for h in policy.by_hops if h != "None"})
    figures = ("policy", *(f"{h}-hop" for h in hops), "searches", "tokens", "lead", "train\npairs", "s")
    table = plain_table("Greedy EM by hops; searches, tokens per question; lead in sampled EM", *figures)
    for policy in summary.policies:
        kind, _, number = policy.stage.rpartition("-")
        round = summary.rounds.get(number) if kind == "ofsd" else None
        table.add_row(
            policy.stage,
            *(share(policy.by_hops.get(h)) for h in hops),
            f"{policy.searches:.2f}",
            f"{policy.tokens:.0f}",
            f"{round.lead.lead:+.3f}" if round and round.lead else "",
            str(round.pairs["train_pairs"]) if round else "",
            f"{_round_seconds(summary, policy.stage):.0f}",
        )
    return table


def _round_seconds(summary: "Summary", stage: str) -> float:
    """Seconds spent on this policy: GRPO for a GRPO policy; pool, pairs, lead and distillation for an OFSD policy."""
    kind, _, number = stage.rpartition("-")
    names = [stage] if kind != "ofsd" else [f"{part}-{number}" for part in ("pool", "pairs", "lead", "ofsd")]
    return sum(summary.seconds.get(name, 0.0) for name in names)


def show_evaluation(console: Console, evaluation: "Evaluation") -> None:
    """Print figures, retrieval recall, and failure classes, one row per benchmark. Fits 80 columns."""
    console.print(evaluation_table(evaluation))
    for table in (recall_table(evaluation), failure_table(evaluation)):
        console.print()
        console.print(table)


def evaluation_table(evaluation: "Evaluation") -> Table:
    """One row per benchmark and hop count, then the average over questions and, if several, over benchmarks."""
    name = evaluation.reward_name  # if set, replaces F1 and cover EM
    other = ("F1", "cover") if name is None else (f"{'reward' if ':' in name else name}", "95%")
    table = plain_table(None, "questions", "n", "greedy\nEM", "95%", "sampled\nEM", *other, "searches", "tokens")
    hops = ((f"{hops}-hop", row) for hops, row in evaluation.by_hops.items())
    kinds = evaluation.by_answer_type.items()
    for label, row in (*evaluation.by_benchmark.items(), *hops, *kinds, (_MICRO, evaluation)):
        beside = (share(row.f1), share(row.cover_em)) if name is None else (share(row.reward), _interval(row.reward_interval))
        scores = (share(row.em_sampled), *beside)
        costs = (f"{row.searches:.2f}", f"{row.tokens:.0f}")
        table.add_row(printable(label), str(row.n), share(row.em), _interval(row.em_interval), *scores, *costs)
    if len(evaluation.by_benchmark) > 1:
        greedy = (share(evaluation.macro_em), _interval(evaluation.macro_em_interval))
        table.add_row("macro average", "", *greedy, share(evaluation.macro_em_sampled), *("",) * 4)
    return table


def recall_table(evaluation: "Evaluation") -> Table:
    """How often an answer is in the passages, and greedy EM over the questions whose answer is in the corpus."""
    title = "Answer in the passages read, in the top k for the question, in the corpus"
    table = plain_table(title, "questions", "read", "top k", "corpus", "greedy EM\nif in corpus", "95%")
    for name, row in (*evaluation.by_benchmark.items(), (_MICRO, evaluation)):
        recall = (share(row.read), share(row.in_topk, "unknown"), share(row.in_corpus, "unknown"))
        table.add_row(printable(name), *recall, share(row.em_answerable), _interval(row.em_answerable_interval))
    return table


def failure_table(evaluation: "Evaluation") -> Table:
    """Number of wrong answers of each class by benchmark, without empty classes."""
    wrong = sum(evaluation.failures.values())
    headings = (_FAILURES.get(failure, failure) for failure in evaluation.failures)
    table = plain_table(f"Why {wrong} answers are wrong" if wrong else "No answer is wrong", "questions", *headings)
    for name, row in (*evaluation.by_benchmark.items(), ("all", evaluation)):
        table.add_row(printable(name), *(str(row.failures.get(failure, 0)) for failure in evaluation.failures))
    if wrong:
        table.add_row("share", *(f"{count / wrong:.3f}" for count in evaluation.failures.values()))
    return table


# Multi-line headings, so that all classes fit beside the longest benchmark name.
_FAILURES = {
    "not_in_corpus": "not in\ncorpus",
    "repeated_search": "re-\npeated",
    "yes_no": "yes/no",
    "invented": "in-\nvented",
    "wording": "word-\ning",
    "not_read_out": "not\nread\nout",
    "no_search": "no\nsearch",
    "not_retrieved": "not re-\ntrieved",
}


_MICRO = "all (micro)"
"""Label of the mean over all questions."""


def share(value: float | None, unknown: str = "") -> str:
    return unknown if value is None else f"{value:.3f}"


def _interval(interval: tuple[float, float] | None) -> str:
    return "{:.3f}-{:.3f}".format(*interval) if interval else ""


def lead_table(lead: "Lead") -> RenderableType:
    """Plain and privileged prompt compared, then KL by token class. Fits 80 columns."""
    sampling = plain_table(None, "prompt", "sampled EM", "sampled EM off track", "searches", "tokens")
    for name in ("plain", "privileged"):
        em, off_track, searches, tokens = (
            getattr(lead, field.format(name)) for field in ("em_{}", "em_{}_off_track", "searches_{}", "tokens_{}")
        )
        sampling.add_row(name, f"{em:.3f}", share(off_track), f"{searches:.2f}", f"{tokens:.0f}")
    divergence = plain_table(None, "sampled token", "number", "KL, nats", "share of KL")
    for kind, part in lead.kl.items():
        divergence.add_row(kind, str(part.tokens), f"{part.mean:.4f}", f"{part.share:.1%}")
    return Group(
        Text(f"The teacher's lead: {lead.lead:+.3f} sampled EM (95% {lead.low:+.3f} to {lead.high:+.3f})", style="italic"),
        Text(
            f"{lead.pairs} held-out pairs, {lead.shortened} of them with a shortened reference; {lead.too_long} too long",
            style="italic",
        ),
        sampling,
        "",
        Text("Divergence of the teacher from the students' tokens", style="italic"),
        divergence,
    )


def index_table(manifest: "IndexManifest") -> Table:
    """An index: one row per setting, then one per file. Fits 80 columns."""
    total = _bytes(sum(manifest.files.values()))
    table = plain_table(printable(f"{manifest.kind} index, {manifest.passages:,} passages, {total}"))
    table.show_header = False
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in flat(manifest.settings).items():
        table.add_row(Text(printable(name)), Text(printable(str(value))))
    versions = ", ".join(f"{package} {version}" for package, version in manifest.versions.items())
    table.add_row("built in", Text(printable(f"{manifest.seconds:,.0f} s with {versions}")))
    table.add_row("corpus", Text(printable(manifest.corpus)))
    table.add_row("checksum", Text(printable(manifest.checksum)))
    for name, size in sorted(manifest.files.items(), key=lambda item: -item[1]):
        table.add_row(f"{_bytes(size):>10}", Text(printable(name)))
    return table


def _bytes(number: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} GiB"


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name, without unset ones."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        elif value is not None and value != "":
            found[f"{prefix}{name}"] = value
    return found


def show_turn(console: Console, turn: Turn) -> None:
    """Print a thought, a search, and the beginning of each passage."""
    thought = re.split(r"<(?:search|open|answer|tool_call)>", turn.action_text)[0]
    thought = re.sub(r"</?think>", "", thought).strip()
    if thought:
        console.print(Text(printable(thought), style="dim"))
    show_reply(console, turn)


def show_reply(console: Console, turn: Turn) -> None:
    """Print a search, and the beginning of each passage."""
    if turn.kind.is_call:
        console.print(Text(f"{turn.tool or 'search'}  {printable(turn.argument or '')}", style="bold cyan"))
        for line in seen_passages(turn.observation_text):
            console.print(Text("  " + printable(line)), overflow="ellipsis", no_wrap=True)
    elif turn.kind is ActionKind.MALFORMED:
        console.print(Text("(neither a search nor an answer)", style="red"))


def show_passages(console: Console, passages: Sequence[Passage]) -> None:
    if not passages:
        console.print("nothing found")
    for rank, passage in enumerate(passages, 1):
        console.print(Text(f"{rank}  {printable(passage.title)}  [{printable(passage.id)}]", style="bold"))
        console.print(Text(printable(passage.text)))
