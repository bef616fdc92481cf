"""The rollout loop: sample an action, answer it, and go on until every trajectory has ended.

It is the only one: GRPO, pools, the teacher's lead, evaluation and ``ask`` all sample through it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from search_e1.config import RolloutConfig
from search_e1.errors import ModelError
from search_e1.prompts import Prompts, plain_prompt
from search_e1.retrieval.base import Retriever
from search_e1.rollout.env import Protocol
from search_e1.rollout.generator import Generation, Generator
from search_e1.rollout.protocols import protocol_of
from search_e1.scoring import exact_match, f1
from search_e1.types import ActionKind, Question, StopReason, Trajectory, Turn

OnTurn = Callable[[int, Turn], None]
OnTrajectory = Callable[[int, Trajectory], None]


@dataclass(slots=True)
class Start:
    """Where a rollout begins: a question, the prompt to ask it with, and turns that were already taken (none, usually)."""

    question: Question
    prompt_ids: tuple[int, ...]
    turns: Sequence[Turn] = ()


@dataclass(slots=True)
class _Row:
    """A trajectory in the making."""

    start: Start
    turns: list[Turn] = field(default_factory=list)
    context: list[int] = field(default_factory=list)
    stop: StopReason | None = None

    @classmethod
    def begin(cls, start: Start) -> "_Row":
        row = cls(start, context=list(start.prompt_ids))
        for turn in start.turns:
            row.append(turn)
        return row

    def append(self, turn: Turn) -> None:
        self.turns.append(turn)
        self.context += turn.action_ids
        self.context += turn.observation_ids

    def finish(self) -> Trajectory:
        assert self.stop is not None
        # An observation that no action followed (the context was full) was never read: it is not part of the record.
        if self.turns and self.turns[-1].observation_ids:
            last = self.turns[-1]
            self.turns[-1] = last.model_copy(update={"observation_ids": (), "observation_text": "", "passage_ids": ()})
        answer = self.turns[-1].argument if self.stop is StopReason.ANSWERED else None
        gold = self.start.question.answers
        return Trajectory(
            question_id=self.start.question.id,
            prompt_ids=self.start.prompt_ids,
            turns=tuple(self.turns),
            stop_reason=self.stop,
            answer=answer,
            reward=exact_match(answer, gold),
            f1=f1(answer, gold),
        )


def starts(tokenizer, prompts: Prompts, questions: Sequence[Question], group_size: int = 1) -> list[Start]:
    """Plain starts, ``group_size`` for each question, siblings side by side."""
    return [
        Start(question, prompt_ids)
        for question in questions
        for prompt_ids in (plain_prompt(tokenizer, prompts, question.text),)
        for _ in range(group_size)
    ]


def rollout(
    generator: Generator,
    retriever: Retriever,
    starts: Sequence[Start],
    config: RolloutConfig,
    *,
    temperature: float,
    prompts: Prompts | None = None,
    on_turn: OnTurn | None = None,
    on_trajectory: OnTrajectory | None = None,
) -> list[Trajectory]:
    """Roll out every start to its end; trajectories in the order of ``starts``.

    A policy takes at most ``config.max_searches`` turns that are answered (with passages, or with a correction) and
    then one last generation. ``prompts`` says how it acts and is corrected (without them:
    Search-R1's tags). ``on_turn`` and ``on_trajectory`` are called with the index of the start as things happen.

    Raises:
        ModelError: a start's context leaves no room for a single token, or the tokenizer does not fit the protocol.
        RetrievalError: from the retriever; nothing is returned then.
    """
    protocol = protocol_of(generator.tokenizer, prompts or Prompts())
    limit = min(config.max_tokens, generator.context_length)
    rows = [_Row.begin(start) for start in starts]
    for row in rows:
        if len(row.context) >= limit:
            raise ModelError(
                f"question {row.start.question.id!r}: a context of {len(row.context)} tokens does not fit into {limit}; "
                "raise rollout.max_tokens, or use a policy with a longer context"
            )
    while active := [i for i, row in enumerate(rows) if row.stop is None]:
        generations = generator.generate(
            [rows[i].context for i in active],
            max_new_tokens=min(config.max_action_tokens, limit - min(len(rows[i].context) for i in active)),
            temperature=temperature,
            stop=protocol.stop,
        )
        turns = _answer(generator.tokenizer, protocol, retriever, [rows[i] for i in active], generations, limit, config)
        for i, turn in zip(active, turns, strict=True):
            row = rows[i]
            row.append(turn)
            if on_turn:
                on_turn(i, turn)
            row.stop = row.stop or (StopReason.MAX_TOKENS if len(row.context) >= limit else None)
            if row.stop and on_trajectory:
                on_trajectory(i, row.finish())
    return [row.finish() for row in rows]


def _answer(
    tokenizer,
    protocol: Protocol,
    retriever: Retriever,
    rows: Sequence[_Row],
    generations: Sequence[Generation],
    limit: int,
    config: RolloutConfig,
) -> list[Turn]:
    """The turn that each generation makes, its observation included; sets ``stop`` on rows that end with it."""
    drafts: list[dict] = []
    for row, generation in zip(rows, generations, strict=True):
        # Rows of one batch share max_new_tokens; a row with less room left keeps what fits.
        room = limit - len(row.context)
        text = tokenizer.decode(generation.ids[:room], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        action = protocol.parse(text)
        logprobs = generation.logprobs and generation.logprobs[:room]
        drafts.append(
            dict(
                action_ids=generation.ids[:room],
                action_text=text,
                kind=action.kind,
                argument=action.argument,
                sampling_logprobs=logprobs,
            )
        )
        if action.kind is ActionKind.ANSWER:
            row.stop = StopReason.ANSWERED
        elif len(row.turns) >= config.max_searches:
            row.stop = StopReason.MAX_TURNS if action.kind is ActionKind.SEARCH else StopReason.MALFORMED
    open_drafts = [draft for row, draft in zip(rows, drafts, strict=True) if row.stop is None]
    searches = [draft for draft in open_drafts if draft["kind"] is ActionKind.SEARCH]
    found = retriever.search([draft["argument"] for draft in searches], config.topk) if searches else []
    for draft, passages in zip(searches, found, strict=True):
        text, ids = protocol.observe(draft["action_text"], passages, config.max_observation_tokens)
        draft |= dict(observation_text=text, observation_ids=ids, passage_ids=tuple(p.id for p in passages))
    for draft in open_drafts:
        if draft["kind"] is ActionKind.MALFORMED:
            text, ids = protocol.correct(draft["action_text"])
            draft |= dict(observation_text=text, observation_ids=ids)
    return [Turn(**draft) for draft in drafts]
