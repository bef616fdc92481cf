import itertools

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from scripted import STOP_STRINGS, ScriptedEngine, generate
from search_e1.config import Prompts, RolloutConfig
from search_e1.errors import ModelError, RetrievalError
from search_e1.rollout.engines.torch import TorchEngine
from search_e1.rollout.loop import rollout
from search_e1.rollout.starts import Start, starts
from search_e1.text.prompts import observation
from search_e1.text.protocol import Action, parse_action
from search_e1.training.policy import Policy
from search_e1.types import ActionKind, Question, StopReason, Trajectory

SEARCH, ANSWER, MALFORMED = ActionKind.SEARCH, ActionKind.ANSWER, ActionKind.MALFORMED
CORRECTION = "\nNo.\n"
PROMPTS = Prompts(instruction="Q: {question}\n", correction=CORRECTION)
LIMITS = RolloutConfig(max_searches=2, topk=1, max_action_tokens=64, max_observation_tokens=100, max_tokens=1024)


@pytest.mark.parametrize(
    ("text", "kind", "argument"),
    [
        ("<search> Bel </search>", SEARCH, "Bel"),
        ("<answer>Cor Dun</answer>", ANSWER, "Cor Dun"),
        ("<think> hm </think>\n<search>Bel\ncity</search>", SEARCH, "Bel\ncity"),
        ("<search> a </search>\n\nand more", SEARCH, "a"),
        ("<answer> a </answer>.", ANSWER, "a"),
        ("<search> a <search> b </search>", SEARCH, "b"),
        ("<answer> a <answer> b </answer>", ANSWER, "b"),
        ("<think> I could <search> a </search>", SEARCH, "a"),
        ("<think> the <answer> tag </think><search> a </search>", SEARCH, "a"),
        ("<search> q <answer> a </answer>", ANSWER, "a"),
        ("<search> q <answer> a </answer> </search>", ANSWER, "a"),
        ("<answer> a <search> q </search> </answer>", SEARCH, "q"),
        ("<search> a </search><answer> b </answer>", SEARCH, "a"),
        ("</search><search> a </search>", SEARCH, "a"),
        ("<answer> 3 < 4 > 2 </answer>", ANSWER, "3 < 4 > 2"),
        ("<answer></answer>", ANSWER, ""),
        ("<search></search>", MALFORMED, None),
        ("<search> \n </search>", MALFORMED, None),
        ("<search> a", MALFORMED, None),
        ("a </search>", MALFORMED, None),
        ("<search> a </answer>", MALFORMED, None),
        ("<SEARCH> a </SEARCH>", MALFORMED, None),
        ("< search> a </ search>", MALFORMED, None),
        ("", MALFORMED, None),
    ],
)
def test_what_an_action_says(text: str, kind: ActionKind, argument: str | None) -> None:
    assert parse_action(text) == Action(kind, argument)


def questions(*texts: str) -> list[Question]:
    return [Question(id=text, text=text, answers=("Cor Dun",)) for text in texts]


def play(
    tokenizer, retriever, script: dict[str, list[str]], limits: RolloutConfig = LIMITS, **kwargs
) -> tuple[list[Trajectory], ScriptedEngine]:
    generator = ScriptedEngine(tokenizer, script)
    begun = starts(tokenizer, PROMPTS, questions(*script))
    done = rollout(generator, retriever, begun, limits, temperature=0.7, seed=0, prompts=PROMPTS, **kwargs)
    return done, generator


def test_two_searches_and_an_answer_to_the_id(tiny_policy: Policy, tiny_retriever) -> None:
    encode = lambda text: tuple(tiny_policy.tokenizer.encode(text, add_special_tokens=False))  # noqa: E731
    actions = ["<search> arda </search>\n", "<search>bel mayor</search>", "<answer> Cor Dun </answer>"]
    [t], generator = play(tiny_policy.tokenizer, tiny_retriever, {"Mayor of Arda's capital?": actions})
    first, first_ids = observation(tiny_policy.tokenizer, tiny_retriever.passages[:1], 100)
    second, second_ids = observation(tiny_policy.tokenizer, tiny_retriever.passages[1:2], 100)
    assert t.prompt_ids == encode("Q: Mayor of Arda's capital?\n")
    assert t.text == actions[0] + first + actions[1] + second + actions[2]
    assert t.response_ids == encode(actions[0]) + first_ids + encode(actions[1]) + second_ids + encode(actions[2])
    assert t.action_mask == tuple(
        m
        for action, seen in zip(actions, (first_ids, second_ids, ()), strict=True)
        for m in (1,) * len(encode(action)) + (0,) * len(seen)
    )
    assert [turn.kind for turn in t.turns] == [SEARCH, SEARCH, ANSWER]
    assert [turn.argument for turn in t.turns] == ["arda", "bel mayor", "Cor Dun"]
    assert [turn.passage_ids for turn in t.turns] == [("p1",), ("p2",), ()]
    assert t.turns[2].sampling_logprobs == tuple(-0.5 - i for i in range(len(encode(actions[2]))))
    assert (t.stop_reason, t.answer, t.reward, t.f1, t.searches) == (StopReason.ANSWERED, "Cor Dun", 1.0, 1.0, 2)
    # What is sampled from next is what was sampled and inserted, id by id.
    assert generator.calls[2]["prompts"] == [t.prompt_ids + t.response_ids[: -len(t.turns[2].action_ids)]]
    assert {call["temperature"] for call in generator.calls} == {0.7}


def test_the_last_generation_is_not_served(tiny_policy: Policy, tiny_retriever) -> None:
    script = {
        "one?": ["<search> arda </search>"] * 3,
        "two?": ["<search> arda </search>"] * 2 + ["no tag"],
        "three?": ["<search> arda </search>"] * 2 + ["<answer> x </answer>"],
    }
    done, generator = play(tiny_policy.tokenizer, tiny_retriever, script)
    assert [t.stop_reason for t in done] == [StopReason.MAX_TURNS, StopReason.MALFORMED, StopReason.ANSWERED]
    assert [t.searches for t in done] == [2, 2, 2]
    assert [len(t.turns) for t in done] == [3, 3, 3]
    assert [t.answer for t in done] == [None, None, "x"]
    assert [t.reward for t in done] == [0.0, 0.0, 0.0]
    assert tiny_retriever.queries == ["arda"] * 6
    assert len(generator.calls) == 3


def test_without_searches_there_is_one_generation(tiny_policy: Policy, tiny_retriever) -> None:
    script = {"one?": ["<search> arda </search>"], "two?": ["<answer> cor dun </answer>"], "three?": ["hm"]}
    done, _ = play(tiny_policy.tokenizer, tiny_retriever, script, LIMITS.model_copy(update={"max_searches": 0}))
    assert [t.stop_reason for t in done] == [StopReason.MAX_TURNS, StopReason.ANSWERED, StopReason.MALFORMED]
    assert [t.reward for t in done] == [0.0, 1.0, 0.0]
    assert tiny_retriever.queries == []
    assert all(not turn.observation_ids for t in done for turn in t.turns)


def test_a_malformed_action_costs_a_turn_and_is_corrected(tiny_policy: Policy, tiny_retriever) -> None:
    script = {"one?": ["hm", "<search> arda </search>", "<search> bel </search>"]}
    [t], _ = play(tiny_policy.tokenizer, tiny_retriever, script)
    assert [turn.kind for turn in t.turns] == [MALFORMED, SEARCH, SEARCH]
    assert t.turns[0].observation_text == CORRECTION
    assert tiny_policy.tokenizer.decode(t.turns[0].observation_ids) == CORRECTION
    assert t.action_mask[: 2 + len(CORRECTION)] == (1, 1) + (0,) * len(CORRECTION)
    assert (t.stop_reason, t.searches) == (StopReason.MAX_TURNS, 1)
    assert tiny_retriever.queries == ["arda"]


def test_a_search_that_finds_nothing_is_answered_so(tiny_policy: Policy, tiny_retriever) -> None:
    script = {"one?": ["<search> zzz </search>", "<answer> x </answer>"]}
    [t], _ = play(tiny_policy.tokenizer, tiny_retriever, script)
    assert t.turns[0].observation_text == "\n\n<information>\n\n</information>\n\n"
    assert t.turns[0].passage_ids == ()
    assert t.searches == 1


def test_no_room_for_another_token(tiny_policy: Policy, tiny_retriever) -> None:
    # "Q: one?\n" has 8 ids; "<search>arda</search>" 6; the observation more than the 30 that are left.
    script = {"one?": ["<search>arda</search>", "<answer> x </answer>"]}
    [t], _ = play(tiny_policy.tokenizer, tiny_retriever, script, LIMITS.model_copy(update={"max_tokens": 44}))
    assert t.stop_reason is StopReason.MAX_TOKENS
    assert t.answer is None
    assert len(t.turns) == 1
    assert t.turns[0].observation_ids == () == t.turns[0].passage_ids
    assert t.searches == 0


def test_a_row_with_less_room_keeps_what_fits(tiny_policy: Policy, tiny_retriever) -> None:
    script = {"one?": ["<answer>" + "a" * 20 + "</answer>"], "a longer two?": ["<answer>" + "a" * 20 + "</answer>"]}
    short, long = (len(f"Q: {text}\n") for text in script)
    limits = LIMITS.model_copy(update={"max_tokens": short + 22})
    done, generator = play(tiny_policy.tokenizer, tiny_retriever, script, limits)
    assert generator.calls[0]["max_new_tokens"] == [22, 22 - (long - short)]
    assert [t.stop_reason for t in done] == [StopReason.ANSWERED, StopReason.MAX_TOKENS]
    assert [t.sampled_tokens for t in done] == [22, 22 - (long - short)]
    assert len(done[1].turns[0].sampling_logprobs or ()) == 22 - (long - short)


def test_a_long_action_is_cut_and_corrected(tiny_policy: Policy, tiny_retriever) -> None:
    script = {"one?": ["x" * 100, "<answer> x </answer>"]}
    [t], _ = play(tiny_policy.tokenizer, tiny_retriever, script)
    assert [len(turn.action_ids) for turn in t.turns] == [64, 5]
    assert t.turns[0].kind is MALFORMED


def test_rows_end_at_different_times_and_keep_their_order(tiny_policy: Policy, tiny_retriever) -> None:
    script = {
        "slow?": ["<search> eth </search>", "<search> fen </search>", "<answer> Gil Hor </answer>"],
        "fast?": ["<answer> Cor Dun </answer>"],
        "middle?": ["<search> arda </search>", "<answer> Bel </answer>"],
    }
    ended: list[tuple[int, str | None]] = []
    done, generator = play(
        tiny_policy.tokenizer,
        tiny_retriever,
        script,
        on_trajectory=lambda i, t: ended.append((i, t.answer)),
    )
    assert [(t.question_id, t.answer) for t in done] == [("slow?", "Gil Hor"), ("fast?", "Cor Dun"), ("middle?", "Bel")]
    assert [len(call["prompts"]) for call in generator.calls] == [3, 2, 1]
    assert ended == [(1, "Cor Dun"), (2, "Bel"), (0, "Gil Hor")]
    assert tiny_retriever.queries == ["eth", "arda", "fen"]


def test_a_rollout_goes_on_from_turns_already_taken(tiny_policy: Policy, tiny_retriever) -> None:
    script = {"one?": ["<search> arda </search>", "<search> bel </search>", "<answer> Cor Dun </answer>"]}
    [whole], generator = play(tiny_policy.tokenizer, tiny_retriever, script)
    for taken in (1, 2):
        start = Start(*questions("one?"), whole.prompt_ids, whole.turns[:taken])
        [again] = rollout(generator, tiny_retriever, [start], LIMITS, temperature=0.7, seed=0, prompts=PROMPTS)
        assert again == whole


def test_siblings_stand_side_by_side(tiny_policy: Policy) -> None:
    begun = starts(tiny_policy.tokenizer, PROMPTS, questions("one?", "two?"), group_size=2)
    assert [start.question.id for start in begun] == ["one?", "one?", "two?", "two?"]
    assert begun[0].prompt_ids == begun[1].prompt_ids == tuple(tiny_policy.tokenizer.encode("Q: one?\n"))


def test_a_failing_retriever_ends_it(tiny_policy: Policy) -> None:
    class Broken:
        def search(self, queries, topk):
            raise RetrievalError("http://x: no passages after 4 attempts")

    with pytest.raises(RetrievalError, match="after 4 attempts"):
        play(tiny_policy.tokenizer, Broken(), {"one?": ["<search> arda </search>", "<answer> x </answer>"]})


def test_a_context_that_cannot_hold_the_prompt_is_refused(tiny_policy: Policy, tiny_retriever) -> None:
    with pytest.raises(ModelError, match=r"question 'one\?': a context of 8 tokens does not fit into 8"):
        play(tiny_policy.tokenizer, tiny_retriever, {"one?": ["hm"]}, LIMITS.model_copy(update={"max_tokens": 8}))


# The transformers generator.

TEXTS = ("Question: Arda?\n", "x", "Who is the mayor of Bel, and of Fen?\n", "Question: Ion?\n")


def encoded(policy: Policy, texts: tuple[str, ...] = TEXTS) -> list[list[int]]:
    return [policy.tokenizer.encode(text) for text in texts]


def forward_logprobs(model: Qwen2ForCausalLM, prompt: list[int], ids: tuple[int, ...], temperature: float) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].float() / temperature
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(ids)[:, None])[:, 0]


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_logprobs_are_those_of_a_forward_pass(tiny_policy: Policy, temperature: float) -> None:
    generator = TorchEngine(tiny_policy.model, tiny_policy.tokenizer, batch_size=3)
    prompts = encoded(tiny_policy)
    done = generate(generator, prompts, max_new_tokens=24, temperature=temperature, stop=STOP_STRINGS)
    for prompt, generation in zip(prompts, done, strict=True):
        expected = forward_logprobs(tiny_policy.model, prompt, generation.ids, temperature or 1.0)
        torch.testing.assert_close(torch.tensor(generation.logprobs), expected, atol=1e-5, rtol=0)


def test_greedy_ids_are_the_most_likely_ones(tiny_policy: Policy) -> None:
    generator = TorchEngine(tiny_policy.model, tiny_policy.tokenizer)
    for prompt, generation in zip(
        encoded(tiny_policy),
        generate(generator, encoded(tiny_policy), max_new_tokens=16, temperature=0.0, stop=()),
        strict=True,
    ):
        with torch.no_grad():
            logits = tiny_policy.model(torch.tensor([[*prompt, *generation.ids]])).logits[0, len(prompt) - 1 : -1]
        assert tuple(logits.argmax(-1).tolist()) == generation.ids


def test_greedy_output_does_not_depend_on_the_batch(tiny_policy: Policy) -> None:
    prompts = encoded(tiny_policy)

    def ids(order: list[int], batch_size: int) -> list[tuple[int, ...]]:
        generator = TorchEngine(tiny_policy.model, tiny_policy.tokenizer, batch_size=batch_size)
        done = generate(generator, [prompts[i] for i in order], max_new_tokens=20, temperature=0.0, stop=STOP_STRINGS)
        return [done[order.index(i)].ids for i in range(len(prompts))]

    expected = ids([0, 1, 2, 3], 1)
    assert ids([0, 1, 2, 3], 64) == expected
    assert ids([3, 1, 0, 2], 2) == expected


def test_sampling_is_seeded(tiny_policy: Policy) -> None:
    generator = TorchEngine(tiny_policy.model, tiny_policy.tokenizer)

    def sample(seed: int) -> list[tuple[int, ...]]:
        done = generate(generator, encoded(tiny_policy), max_new_tokens=12, temperature=1.0, stop=(), seed=100 * seed)
        return [generation.ids for generation in done]

    assert sample(0) == sample(0) != sample(1)


def test_the_models_own_sampling_defaults_are_ignored_and_kept(tiny_policy: Policy) -> None:
    own = GenerationConfig(repetition_penalty=5.0, top_k=1, temperature=0.1, do_sample=True)
    plain = TorchEngine(tiny_policy.model, tiny_policy.tokenizer)
    expected = generate(plain, encoded(tiny_policy), max_new_tokens=12, temperature=1.0, stop=())
    tiny_policy.model.generation_config = own
    assert generate(plain, encoded(tiny_policy), max_new_tokens=12, temperature=1.0, stop=()) == expected
    assert tiny_policy.model.generation_config is own
    assert own.repetition_penalty == 5.0


def test_train_mode_is_lent_and_given_back_even_on_failure(tiny_policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = TorchEngine(tiny_policy.model, tiny_policy.tokenizer)
    own = tiny_policy.model.generation_config
    tiny_policy.model.train()
    modes: list[bool] = []
    hook = tiny_policy.model.register_forward_pre_hook(lambda model, args: modes.append(model.training))
    generate(generator, encoded(tiny_policy), max_new_tokens=2, temperature=1.0, stop=())
    hook.remove()
    assert set(modes) == {False}
    assert tiny_policy.model.training
    monkeypatch.setattr(tiny_policy.model, "forward", _out_of_memory)
    with pytest.raises(RuntimeError, match="out of memory"):
        generate(generator, encoded(tiny_policy), max_new_tokens=2, temperature=1.0, stop=())
    assert tiny_policy.model.training
    assert tiny_policy.model.generation_config is own


def _out_of_memory(*args: object, **kwargs: object) -> None:
    raise RuntimeError("out of memory")


def chain_policy(successors: dict[str, str]) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerFast]:
    """A model whose next token is a function of its last one, over bytes and the merged tokens ``h>`` and ``h>!``."""
    vocab = {symbol: i for i, symbol in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "h>", "h>!"])}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=[("h", ">"), ("h>", "!")]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|pad|>")
    size = 512
    config = Qwen2Config(
        vocab_size=size, hidden_size=size, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=256, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.zero_()
        for a, b in successors.items():
            model.lm_head.weight[tokenizer.convert_tokens_to_ids(b), tokenizer.convert_tokens_to_ids(a)] = 10.0
    return model, tokenizer


def chain(*tokens: str) -> dict[str, str]:
    return dict(itertools.pairwise(tokens))


def test_a_token_that_straddles_the_end_of_a_tag_stays_whole() -> None:
    model, tokenizer = chain_policy(chain("Q", "<", "/", "s", "e", "a", "r", "c", "h>!", "Z", "Z"))
    [done] = generate(
        TorchEngine(model, tokenizer), [tokenizer.encode("Q")], max_new_tokens=20, temperature=0.0, stop=STOP_STRINGS
    )
    assert tokenizer.decode(done.ids) == "</search>!"
    assert done.ids[-1] == tokenizer.convert_tokens_to_ids("h>!")
    assert len(done.ids) == 8


def test_rows_end_apart_and_hold_no_padding() -> None:
    links = chain("Q", "<", "/", "s", "e", "a", "r", "c", "h>", "Z", "Z") | chain("A", "B", "<|end|>", "Z") | {"Y": "Y"}
    model, tokenizer = chain_policy(links)
    rows = generate(
        TorchEngine(model, tokenizer),
        [tokenizer.encode(text) for text in ("long prompt A", "Q", "Y")],
        max_new_tokens=12,
        temperature=0.0,
        stop=STOP_STRINGS,
    )
    assert [tokenizer.decode(row.ids) for row in rows] == ["B<|end|>", "</search>", "Y" * 12]
    assert [len(row.logprobs or ()) for row in rows] == [2, 8, 12]


@pytest.mark.parametrize(("prompt", "sampled"), [("</search>", "YYYYY"), ("</searc", "h>YYYY")])
def test_a_tag_in_the_prompt_does_not_stop_its_row(prompt: str, sampled: str) -> None:
    model, tokenizer = chain_policy({"c": "h>", "h>": "Y", "Y": "Y"})
    generator = TorchEngine(model, tokenizer)
    [done] = generate(generator, [tokenizer.encode(prompt)], max_new_tokens=5, temperature=0.0, stop=STOP_STRINGS)
    assert tokenizer.decode(done.ids) == sampled


def test_a_models_further_end_tokens_end_a_row() -> None:
    model, tokenizer = chain_policy(chain("A", "B", "C", "D", "D"))
    end = tokenizer.convert_tokens_to_ids("C")
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, end]
    [done] = generate(TorchEngine(model, tokenizer), [tokenizer.encode("A")], max_new_tokens=9, temperature=0.0, stop=())
    assert tokenizer.decode(done.ids) == "BC"


def test_rollouts_of_a_real_model_train_on_what_it_sampled(tiny_policy: Policy, tiny_retriever) -> None:
    """Ids and log-probabilities of a whole trajectory, recomputed in one pass over prompt and response."""
    generator = TorchEngine(tiny_policy.model, tiny_policy.tokenizer)
    limits = LIMITS.model_copy(update={"max_action_tokens": 12})
    begun = starts(tiny_policy.tokenizer, PROMPTS, questions("one?", "two, longer?"), 2)
    for t in rollout(generator, tiny_retriever, begun, limits, temperature=1.0, seed=0):
        recomputed = forward_logprobs(tiny_policy.model, list(t.prompt_ids), t.response_ids, 1.0)
        sampled = recomputed[torch.tensor(t.action_mask, dtype=torch.bool)]
        recorded = torch.tensor([x for turn in t.turns for x in turn.sampling_logprobs or ()])
        torch.testing.assert_close(recorded, sampled, atol=1e-5, rtol=0)
        assert [tiny_policy.tokenizer.decode(turn.action_ids) for turn in t.turns] == [turn.action_text for turn in t.turns]
