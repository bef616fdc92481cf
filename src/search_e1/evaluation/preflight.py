"""Findings: before any training, whether a run can learn. Each is one sentence with a remedy."""

from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum

from search_e1.config import Config
from search_e1.data.answers import normalize_answer
from search_e1.evaluation.recall import Recall, figures
from search_e1.evaluation.results import Result
from search_e1.types import Group, Question, Record, StopReason

FILE = "preflight.json"
CERTAIN_TRAJECTORIES = 64
"""Trajectories needed to call a policy hopeless: if none of 64 is in form, at most 5% are, at 95% confidence."""
CERTAIN_QUESTIONS = 20
_RARE, _OFTEN_MALFORMED, _FEW_ANSWERS = 0.1, 0.2, 0.3


class Level(StrEnum):
    OK = "ok"
    WARNING = "warning"
    """The run may learn less than it could."""
    STOP = "stop"
    """The run cannot learn."""


class Finding(Record):
    check: str
    """``form``, ``search``, ``groups``, ``answers``, ``passages``, ``overlap``, ``template``, ``policy``, ``memory``, ``time``;
    in an audit ``reach``, ``records``, ``wording``, ``repeats`` or ``leaks``."""
    level: Level
    text: str
    """One sentence."""
    remedy: str = ""
    """One sentence; empty if there is nothing to fix."""

    def warning(self) -> "Finding":
        """This finding with ``STOP`` lowered to ``WARNING``."""
        return self.model_copy(update={"level": Level.WARNING}) if self.level is Level.STOP else self


class Observed(Record):
    """Counts over trajectories."""

    trajectories: int = 0
    malformed: int = 0
    """Trajectories whose last action was neither a search nor an answer."""
    searching: int = 0
    """Trajectories with a search that returned passages."""
    in_form: int = 0
    """Trajectories that searched or answered."""
    rewarded: int = 0
    """Trajectories with a positive reward."""
    groups: int = 0
    """Groups of at least two trajectories."""
    mixed: int = 0
    """Groups with different rewards; GRPO learns nothing from the others."""

    def __add__(self, other: "Observed") -> "Observed":
        return Observed(**{name: value + getattr(other, name) for name, value in self})

    @property
    def hopeless(self) -> bool:
        """Nothing to learn from: of enough trajectories, none is in form and none has a reward."""
        return self.trajectories >= CERTAIN_TRAJECTORIES and not self.in_form and not self.rewarded


def observe(groups: Iterable[Group]) -> Observed:
    """Counts over sampled groups."""
    seen = Observed()
    for group in groups:
        own, rewards = group.trajectories, {t.reward for t in group.trajectories}
        seen += Observed(
            trajectories=len(own),
            malformed=sum(t.stop_reason is StopReason.MALFORMED for t in own),
            searching=sum(t.searches > 0 for t in own),
            in_form=sum(t.searches > 0 or t.answer is not None for t in own),
            rewarded=sum(t.reward > 0 for t in own),
            groups=len(own) > 1,
            mixed=len(rewards) > 1,
        )
    return seen


def observe_results(results: Iterable[Result]) -> Observed:
    """Counts over an evaluation: everything from greedy trajectories, only rewards from sampled ones."""
    seen = Observed()
    for r in results:
        seen += Observed(
            trajectories=1,
            malformed=r.stop_reason is StopReason.MALFORMED,
            searching=r.searches > 0,
            in_form=r.searches > 0 or r.answer is not None,
            rewarded=(r.em > 0) + sum(em > 0 for em in r.em_of_samples),
            groups=len(r.em_of_samples) > 1,
            mixed=len(set(r.em_of_samples)) > 1,
        )
    return seen


def form(seen: Observed) -> Finding:
    """Does the policy follow the protocol?"""
    share = seen.malformed / seen.trajectories
    if seen.hopeless:
        return Finding(
            check="form", level=Level.STOP,
            text=f"None of {seen.trajectories} trajectories made a search or gave an answer, so none has a reward to learn "
            "from.",
            remedy="Add a [coldstart] section (or demonstrations to it), or use a policy that knows the protocol.",
        )  # fmt: skip
    text = f"{share:.0%} of {seen.trajectories} trajectories are malformed."
    if share <= _OFTEN_MALFORMED:
        return Finding(check="form", level=Level.OK, text=text)
    remedy = "Add a [coldstart] section; if actions are cut short, raise rollout.max_action_tokens."
    return Finding(check="form", level=Level.WARNING, text=text, remedy=remedy)


def search(seen: Observed) -> Finding:
    """Does the policy search?"""
    share = seen.searching / seen.trajectories
    text = f"{share:.0%} of {seen.trajectories} trajectories search."
    if share >= _RARE:
        return Finding(check="search", level=Level.OK, text=text)
    remedy = "Add a [coldstart] section, or ask for searches in prompts.instruction."
    return Finding(check="search", level=Level.WARNING, text=text, remedy=remedy)


def groups(seen: Observed) -> Finding:
    """Are any groups mixed?"""
    text = f"{seen.mixed} of {seen.groups} groups are mixed, so GRPO has something to learn from."
    if seen.mixed:
        return Finding(check="groups", level=Level.OK, text=text)
    if seen.rewarded:
        text = f"None of {seen.groups} groups is mixed, and some trajectories are right: questions are too easy or too hard."
        remedy = "Use other training questions, or raise grpo.group_size or grpo.temperature."
    else:
        text = f"None of {seen.groups} groups is mixed: no trajectory is right, and a step on such groups teaches nothing."
        remedy = "Use easier training questions, raise grpo.group_size, or add a [coldstart] section."
    return Finding(check="groups", level=Level.WARNING, text=text, remedy=remedy)


def answers(rows: Sequence[Recall], topk: int, seen: Observed) -> Finding | None:
    """Are answers in the corpus? ``None`` if all are yes/no questions. Can be ``STOP`` only if no reward was ``seen``."""
    shares, count = figures(rows), sum(row.in_topk is not None for row in rows)
    in_topk, in_corpus = shares["in_topk"], shares["in_corpus"]
    if in_topk is None:
        return None
    text = f"The first {topk} passages for a question hold an answer to {in_topk:.0%} of {count} questions"
    text += "." if in_corpus is None else f", the corpus to {in_corpus:.0%}."
    remedy = "Use passages that hold the answers: check data.corpus, or the index or server under [retrieval]."
    if in_corpus == 0 and count >= CERTAIN_QUESTIONS and seen.trajectories >= CERTAIN_TRAJECTORIES and not seen.rewarded:
        text = f"No passage holds an answer to any of {count} questions, and no trajectory has a reward."
        return Finding(check="answers", level=Level.STOP, text=text, remedy=remedy)
    held = in_corpus is None or in_corpus >= _FEW_ANSWERS
    if held and in_topk >= _RARE:  # low, since the question's text alone finds few answers to multi-hop questions
        return Finding(check="answers", level=Level.OK, text=text)
    if held:
        remedy = "Raise rollout.topk, or try another retrieval.kind."
    return Finding(check="answers", level=Level.WARNING, text=text, remedy=remedy)


def passages(count: int, topk: int) -> Finding | None:
    """Does the corpus have more than ``topk`` passages? ``None`` if it does."""
    if count > topk:
        return None
    plural = "s" * (count > 1)
    text = f"The corpus has {count} passage{plural}, and a search shows up to {topk}: there is nothing to choose from."
    remedy = "Check data.corpus, or the index under [retrieval]: a passage is a paragraph, not a document or a whole file."
    return Finding(check="passages", level=Level.WARNING, text=text, remedy=remedy)


def template(has_template: bool) -> Finding | None:
    """Does a policy that search-e1 did not train have a chat template? ``None`` if it does."""
    if has_template:
        return None
    text = "The policy's tokenizer has no chat template, so it reads the bare instruction, as a base model does."
    remedy = "Give a chat model's directory, with its chat_template.jinja; or add a [coldstart] section for a base model."
    return Finding(check="template", level=Level.WARNING, text=text, remedy=remedy)


def overlap(train: Sequence[Question], evaluated: Mapping[str, Sequence[Question]]) -> Finding:
    """Do training and evaluation questions overlap? Texts are compared ignoring case, punctuation, articles and white space.
    Shared ids with different texts are only mentioned, since many files count from 1."""
    texts = {normalize_answer(question.text): question for question in train}
    ids = {question.id for question in train}
    shared = [(name, q) for name, part in evaluated.items() for q in part if normalize_answer(q.text) in texts]
    same_ids = sum(q.id in ids for part in evaluated.values() for q in part) - sum(q.id in ids for _, q in shared)
    mentioned = f"; shared ids with different texts: {same_ids}" if same_ids else ""
    total = sum(map(len, evaluated.values()))
    if not shared:
        text = f"None of {total} evaluation questions is a training question{mentioned}."
        return Finding(check="overlap", level=Level.OK, text=text)
    name, example = shared[0]
    known = texts[normalize_answer(example.text)]
    return Finding(
        check="overlap", level=Level.WARNING,
        text=f"{len(shared)} of {total} evaluation questions are training questions, e.g. {example.id!r} of {name} and "
        f"{known.id!r} ({example.text!r}){mentioned}.",
        remedy="Take them out of data.train, or do not report these figures.",
    )  # fmt: skip


def amounts(config: Config, train_questions: int, eval_questions: int) -> dict[str, int]:
    """Stage -> the most trajectories that a run samples in it."""
    rounds, grpo, distillations = config.rounds, config.grpo, config.distillations
    distill, merge = config.distill, config.distill.merge
    found = {"evaluation": config.evaluated_policies * eval_questions * (1 + config.evaluation.samples)}
    found["grpo"] = rounds * grpo.steps * grpo.questions_per_step * grpo.group_size
    questions = min(config.pool.questions or train_questions, train_questions)
    if config.pool.source == "fresh":
        found["pool"] = distillations * questions * config.pool.group_size
    if distill.has_teacher:
        found["lead"] = distillations * int(4 * config.lead.pairs * config.lead.samples)
        found["teachers"] = distillations * questions * (distill.teachers == "verified")
    if distill.students == "fresh":
        found["students"] = distillations * questions * distill.epochs
    if len(merge.strengths) > 1:
        found["merge"] = distillations * len(merge.strengths) * min(merge.questions, train_questions)
    return {stage: count for stage, count in found.items() if count}


def time(sampled: Mapping[str, int], per_second: float, tokens: float, trained_per_second: float | None = None) -> Finding:
    """How long will it take?

    Args:
        sampled: see ``amounts``.
        per_second: measured trajectories sampled per second.
        tokens: mean sampled tokens per trajectory.
        trained_per_second: trajectories trained on per second, if measured.
    """
    count = sum(sampled.values())
    hours = count / per_second / 3600
    text = f"Sampling {count:,} trajectories takes about {duration(hours)} at the measured {per_second * tokens:,.0f} tokens/s"
    if trained_per_second is None:
        text += "; training is extra (search-e1 doctor measures it)."
    else:
        training = sampled.get("grpo", 0) / trained_per_second / 3600
        text += f", GRPO's updates {duration(training)}; the other stages' updates are extra."
    return Finding(check="time", level=Level.OK, text=text)


def duration(hours: float) -> str:
    """Human-readable: ``2 min``, ``3.5 h``, ``12 days``."""
    if hours < 1:
        return f"{max(1, round(hours * 60))} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"


def worst(findings: Iterable[Finding]) -> Level:
    """The most severe level in ``findings``."""
    return max((finding.level for finding in findings), key=list(Level).index, default=Level.OK)
