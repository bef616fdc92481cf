"""The teacher's lead: what is measured, and the gate that a spoilt privileged prompt does not pass."""

import pytest
import torch

from made_pairs import make_pair, make_turn
from search_e1.config import LeadConfig, RolloutConfig
from search_e1.errors import DataError, NoLeadError, TrainingError
from search_e1.rollout.engines.base import BatchEngine, Generation
from search_e1.selfdistill.lead import Lead, gate, hold_out, interval, measure
from search_e1.selfdistill.profile import by_class, pair_kl, pieces
from search_e1.text.prompts import plain_prompt, privileged_prompt
from search_e1.text.tokens import TokenClass
from search_e1.types import ActionKind, Question

CONFIG = LeadConfig(samples=2)
ROLLOUT = RolloutConfig(max_action_tokens=60, max_tokens=900, topk=1)
SPOILT = "{instruction}Solved by an expert, but not for you to see.{reference}"


class Copier(BatchEngine):
    """Answers what an expert in its prompt answered, right after a search if it is off track; else searches, then gives up."""

    context_length = 1024

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def generate(self, requests, *, temperature, stop):
        return [
            Generation(tuple(self.tokenizer.encode(self._act(self.tokenizer.decode(request.prompt)))[: request.max_new_tokens]))
            for request in requests
        ]

    def _act(self, context: str) -> str:
        if "An expert:" in context and "<answer>Cor Dun</answer>" in context:
            return "<answer>Cor Dun</answer>"
        return "<answer>Fen</answer>" if "<information>" in context else "<search>bel mayor</search>"


def pairs_of(policy, count=4):
    return [make_pair(policy, Question(id=f"q{i}", text=f"Mayor of Bel, {i}?", answers=("Cor Dun",))) for i in range(count)]


def measured(policy, retriever, pairs, **kwargs) -> Lead:
    generator = Copier(policy.tokenizer)
    return measure(policy, generator, retriever, pairs, CONFIG, ROLLOUT, temperature=1.0, seed=1, **kwargs)[0]


def spoil(policy) -> None:
    """A privileged prompt in which the policy does not recognize the reference."""
    policy.prompts = policy.prompts.model_copy(update={"privileged": SPOILT})


def test_a_sound_privileged_prompt_leads_and_passes(tiny_policy, tiny_retriever):
    told: list[tuple[int, int, str]] = []
    lead = measured(tiny_policy, tiny_retriever, pairs_of(tiny_policy), progress=lambda *a: told.append(a))
    assert (lead.em_plain, lead.em_privileged, lead.lead) == (0.0, 1.0, 1.0)
    # 4 pairs of difference 1, and the added ones: mean 4/6, variance 5/6 - (4/6) ** 2.
    assert lead.low == pytest.approx(4 / 6 - 1.96 * (7 / 18 / 6) ** 0.5)
    assert lead.high == 1.0
    assert (lead.pairs, lead.pairs_off_track, lead.samples, lead.too_long) == (4, 4, 2, 0)
    assert (lead.em_plain_off_track, lead.em_privileged_off_track) == (0.0, 1.0)
    assert (lead.searches_plain, lead.searches_privileged) == (1, 0)
    tokenizer = tiny_policy.tokenizer
    assert lead.tokens_privileged == len(tokenizer.encode("<answer>Cor Dun</answer>"))
    assert lead.tokens_plain == len(tokenizer.encode("<search>bel mayor</search><answer>Fen</answer>"))
    assert [done for done, _, _ in told] == list(range(1, 33))  # 4 pairs, 2 samples, 2 prompts, 2 kinds of start
    assert (*told[-1][:2], told[-1][2].partition(", ")[0]) == (32, 32, "sampled EM 0.500")
    gate(lead, CONFIG)
    assert Lead.model_validate_json(lead.model_dump_json()) == lead


def test_a_spoilt_privileged_prompt_is_refused(tiny_policy, tiny_retriever):
    spoil(tiny_policy)
    pairs = pairs_of(tiny_policy)
    lead = measured(tiny_policy, tiny_retriever, pairs)
    assert (lead.em_plain, lead.em_privileged, lead.lead) == (0.0, 0.0, 0.0)
    with pytest.raises(
        NoLeadError, match=r"does not lead: sampled EM 0\.000 .*lead \+0\.000.*4 pairs.*lead\.minimum = 0\.02"
    ) as refused:
        gate(lead, CONFIG)
    assert "\n" not in str(refused.value)
    gate(lead, CONFIG.model_copy(update={"enforce": False}))


def test_off_track_starts_are_for_wrong_students_with_something_left_to_do(tiny_policy, tiny_retriever):
    one_turn = make_pair(tiny_policy, Question(id="one", text="One?", answers=("Cor Dun",)))
    answer = make_turn(tiny_policy.tokenizer, "<answer>Fen</answer>", ActionKind.ANSWER, "Fen")
    one_turn = one_turn.model_copy(update={"student": one_turn.student.model_copy(update={"turns": (answer,)})})
    right = make_pair(tiny_policy, Question(id="right", text="Right?", answers=("Fen", "Cor Dun")))
    right = right.model_copy(update={"student": right.student.model_copy(update={"reward": 1.0})})
    lead = measured(tiny_policy, tiny_retriever, [one_turn, right])
    assert (lead.pairs, lead.pairs_off_track) == (2, 0)
    assert lead.em_plain_off_track is lead.em_privileged_off_track is None


def test_the_interval_is_of_paired_differences(tiny_policy, tiny_retriever):
    # "Fen" is right for one of two questions, so plain and privileged differ by 1 and by 0.
    easy = make_pair(tiny_policy, Question(id="easy", text="Easy?", answers=("Fen", "Cor Dun")))
    lead = measured(tiny_policy, tiny_retriever, [easy, *pairs_of(tiny_policy, 1)])
    assert (lead.em_plain, lead.em_privileged) == (0.5, 1.0)
    assert (lead.low, lead.high) == pytest.approx(interval([1.0, 0.0]))


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        # Matched pairs of 100 questions, 30 right with the reference only and 10 without it only. Agresti and Min: the table
        # with 0.5 in each cell more, (30.5 - 10.5) / 102 +- 1.96 * sqrt(30.5 + 10.5 - 20 ** 2 / 102) / 102.
        ([1.0] * 30 + [-1.0] * 10 + [0.0] * 60, (20 / 102, 1.96 * (41 - 20**2 / 102) ** 0.5 / 102)),
        # Nobody differs: not for sure.
        ([0.0] * 10, (0.0, 1.96 / 12)),
        # One pair, and halves as of two samples: (0.5 / 3, variance (0.25 + 1) / 3 - (0.5 / 3) ** 2).
        ([0.5], (0.5 / 3, 1.96 * ((1.25 / 3 - 0.25 / 9) / 3) ** 0.5)),
    ],
)
def test_the_interval_by_hand(differences, expected):
    mean, half = expected
    assert interval(differences) == pytest.approx((mean - half, mean + half))


def test_the_interval_stays_in_its_bounds():
    assert interval([1.0] * 8)[1] == 1.0
    assert interval([-1.0] * 8)[0] == -1.0


def test_a_teacher_that_is_only_shorter_passes_unless_it_is_worse_for_sure(tiny_policy, tiny_retriever):
    lead = measured(tiny_policy, tiny_retriever, pairs_of(tiny_policy))
    same = lead.model_copy(
        update={
            "em_privileged": 0.5,
            "em_plain": 0.5,
            "low": -0.1,
            "high": 0.1,
            "tokens_plain": 80.0,
            "tokens_privileged": 60.0,
        }
    )
    assert same.saving == 0.25
    gate(same, LeadConfig(saving=0.25))
    with pytest.raises(NoLeadError, match=r"lead \+0\.000, .*and it saves 25% of the tokens \(lead\.saving = 30%\)"):
        gate(same, LeadConfig(saving=0.3))
    with pytest.raises(NoLeadError, match=r"lead -0\.400"):
        gate(same.model_copy(update={"em_privileged": 0.1, "low": -0.5, "high": -0.3}), LeadConfig())


def test_a_teacher_that_searches_more_is_refused_unless_each_is_verified(tiny_policy, tiny_retriever):
    lead = measured(tiny_policy, tiny_retriever, pairs_of(tiny_policy))
    more = lead.model_copy(update={"searches_plain": 2.0, "searches_privileged": 2.5})
    assert more.added_searches == 0.5
    with pytest.raises(
        NoLeadError,
        match=r"2\.50 searches per question .* 2\.00 without \(4 pairs\), and the difference exceeds lead\.searches = 0\.2; ",
    ) as refused:
        gate(more, LeadConfig())
    assert "\n" not in str(refused.value)
    gate(more, LeadConfig(), verified=True)
    gate(more, LeadConfig(searches=0.5))
    gate(more, LeadConfig(enforce=False))
    worse = more.model_copy(update={"em_privileged": 0.0, "low": -0.5, "high": 0.1})
    with pytest.raises(NoLeadError, match="does not lead"):
        gate(worse, LeadConfig(saving=1), verified=True)


def test_the_gate_on_the_lower_end(tiny_policy, tiny_retriever):
    low = LeadConfig(gate="low", minimum=0.5, saving=1)
    lead = measured(tiny_policy, tiny_retriever, pairs_of(tiny_policy))
    gate(lead, CONFIG.model_copy(update={"minimum": 0.5}))
    with pytest.raises(
        NoLeadError,
        match=r"does not lead for sure: .*lead \+1\.000, 95% \+0\.168 .*lower end is less than lead\.minimum = 0\.5",
    ) as refused:
        gate(lead, low)
    assert "raise lead.pairs" in str(refused.value)
    gate(lead, low.model_copy(update={"minimum": 0.16}))
    gate(lead, low.model_copy(update={"enforce": False}))


def test_the_teacher_is_asked_with_what_is_shown(tiny_policy, tiny_retriever):
    """What may be seen of the reference reaches sampling and divergence alike; with nothing of it there is no teacher."""
    pair = make_pair(tiny_policy)

    def privileged(shown: str) -> tuple[int, ...]:
        return privileged_prompt(tiny_policy.tokenizer, tiny_policy.prompts, pair.question.text, shown)

    hidden = pair.model_copy(update={"teacher_prompt_ids": pair.student.prompt_ids})
    lead = measured(tiny_policy, tiny_retriever, [hidden])
    assert (lead.em_privileged, lead.searches_privileged) == (0.0, 1.0)
    assert max(part.mean for part in lead.kl.values()) < 1e-10
    cut = {"teacher_prompt_ids": privileged("<answer>Cor Dun</answer>"), "shortened": True}
    lead = measured(tiny_policy, tiny_retriever, [pair.model_copy(update=cut)])
    assert (lead.em_privileged, lead.shortened) == (1.0, 1)
    wrong = pair.model_copy(update={"teacher_prompt_ids": privileged("<answer>Fen</answer>")})
    assert measured(tiny_policy, tiny_retriever, [wrong]).em_privileged == 0.0


def test_one_pair_of_a_question_is_measured(tiny_policy, tiny_retriever):
    pair = make_pair(tiny_policy)
    lead = measured(tiny_policy, tiny_retriever, [pair, pair, pair])
    assert lead.pairs == 1
    assert (lead.low, lead.high) == pytest.approx(interval([1.0]))


def test_pairs_too_long_for_the_context_are_counted(tiny_policy, tiny_retriever, monkeypatch):
    long = make_pair(tiny_policy, Question(id="long", text="x" * 700, answers=("Cor Dun",)))
    monkeypatch.setattr(Copier, "context_length", 600)
    lead = measured(tiny_policy, tiny_retriever, [long, *pairs_of(tiny_policy, 2)])
    assert (lead.pairs, lead.too_long) == (2, 1)
    with pytest.raises(DataError, match="all 1 are too long for the policy's context of 600"):
        measured(tiny_policy, tiny_retriever, [long])
    with pytest.raises(DataError, match="there are none; sample a larger pool"):
        measured(tiny_policy, tiny_retriever, [])


def test_the_profile_is_zero_where_both_prompts_are_the_same(tiny_policy):
    """Any shift between the rows would show: the hidden states differ from one position to the next."""
    pair = make_pair(tiny_policy)
    same = pair.model_copy(update={"teacher_prompt_ids": pair.student.prompt_ids})
    profile = by_class(pair_kl(tiny_policy, [same]))
    assert max(part.mean for part in profile.values()) < 1e-10
    assert min(part.mean for part in by_class(pair_kl(tiny_policy, [pair])).values()) > 1e-6


def test_a_divergence_that_is_not_finite_is_refused(tiny_policy):
    with torch.no_grad():
        tiny_policy.model.model.norm.weight[0] = float("nan")
    with pytest.raises(TrainingError, match=r"divergence from the teacher is not finite in torch\.float32; set policy\.dtype"):
        pair_kl(tiny_policy, [make_pair(tiny_policy)])


def test_the_profile_adds_up(tiny_policy):
    pairs = pairs_of(tiny_policy, 3)
    profile = by_class(pair_kl(tiny_policy, pairs))
    assert set(profile) == set(TokenClass)
    assert sum(part.tokens for part in profile.values()) == sum(pair.student.sampled_tokens for pair in pairs)
    assert profile[TokenClass.SEARCH].tokens == 3 * len("bel")
    assert sum(part.share for part in profile.values()) == pytest.approx(1)
    total = sum(part.tokens * part.mean for part in profile.values())
    assert profile[TokenClass.TAG].share == pytest.approx(profile[TokenClass.TAG].tokens * profile[TokenClass.TAG].mean / total)


def test_each_token_has_its_divergence_and_both_probabilities(tiny_policy):
    """Against whole logits, row by row, without batch or padding."""
    pairs = pairs_of(tiny_policy, 9)  # more than go through the model together
    pairs[4] = make_pair(tiny_policy, Question(id="q4", text="x" * 40, answers=("Cor Dun",)))
    found = pair_kl(tiny_policy, pairs)
    assert [row.question_id for row in found] == [pair.question.id for pair in pairs]
    for pair, row in [(pairs[0], found[0]), (pairs[4], found[4])]:
        prompts = (
            pair.student.prompt_ids,
            privileged_prompt(tiny_policy.tokenizer, tiny_policy.prompts, pair.question.text, pair.reference.text),
        )
        student, teacher = (
            tiny_policy.model(torch.tensor([[*prompt, *pair.student.response_ids]])).logits[0, len(prompt) - 1 : -1]
            .detach().log_softmax(-1)
            for prompt in prompts
        )  # fmt: skip
        sampled = [i for i, mask in enumerate(pair.student.action_mask) if mask]
        ids = [pair.student.response_ids[i] for i in sampled]
        divergence = (teacher.exp() * (teacher - student)).sum(-1)[sampled].tolist()
        assert row.kl == pytest.approx(divergence, rel=1e-3, abs=1e-6)
        assert row.student == pytest.approx(student[sampled, ids].exp().tolist(), rel=1e-4)
        assert row.teacher == pytest.approx(teacher[sampled, ids].exp().tolist(), rel=1e-4)
        assert row.preferred == tuple(tiny_policy.tokenizer.decode([i]) for i in teacher[sampled].argmax(-1).tolist())
        assert "".join(row.pieces) == "".join(turn.action_text for turn in pair.student.turns)


def test_a_character_of_several_tokens_is_the_piece_of_its_last(tiny_policy):
    text = "<search>Zoë 日本</search>"
    ids = tiny_policy.tokenizer.encode(text)
    assert pieces(tiny_policy.tokenizer, ids)[:5] == ["<search>", "Z", "o", "", "ë"]
    assert "".join(pieces(tiny_policy.tokenizer, ids)) == text


def test_hold_out_splits_by_question(tiny_policy):
    pairs = [pair for pair in pairs_of(tiny_policy, 12) for _ in range(2)]
    train, held_out = hold_out(pairs, LeadConfig(pairs=64, max_share=0.25), seed=3)
    assert len({pair.question.id for pair in held_out}) == 3
    assert (len(train), len(held_out)) == (18, 6)
    assert not {pair.question.id for pair in train} & {pair.question.id for pair in held_out}
    assert hold_out(pairs, LeadConfig(pairs=64), seed=3) == (train, held_out)
    assert hold_out(pairs, LeadConfig(pairs=64), seed=4) != (train, held_out)
    assert len(hold_out(pairs, LeadConfig(pairs=2), seed=3)[1]) == 4


def test_hold_out_always_leaves_something_to_measure_on(tiny_policy):
    train, held_out = hold_out([make_pair(tiny_policy)], LeadConfig(), seed=0)
    assert (len(train), len(held_out)) == (0, 1)
    assert hold_out([], LeadConfig(), seed=0) == ([], [])


def test_students_are_asked_with_their_own_prompt(tiny_policy, tiny_retriever):
    """The plain rollouts start from the ids stored with the student."""
    seen: list[tuple[int, ...]] = []
    generator = Copier(tiny_policy.tokenizer)
    generate = generator.generate
    generator.generate = lambda requests, **kwargs: (
        seen.extend(tuple(request.prompt) for request in requests) or generate(requests, **kwargs)
    )
    pair = make_pair(tiny_policy)
    measure(tiny_policy, generator, tiny_retriever, [pair], CONFIG, ROLLOUT, temperature=1.0, seed=1)
    assert seen[0] == pair.student.prompt_ids == plain_prompt(tiny_policy.tokenizer, tiny_policy.prompts, pair.question.text)
    prefix = pair.student.turns[0]
    assert seen[2] == pair.student.prompt_ids + prefix.action_ids + prefix.observation_ids
