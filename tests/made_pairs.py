"""Pairs of a searching student and a reference, and small policies of other families to train on them."""

import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, Lfm2Config, Lfm2ForCausalLM

from conftest import make_tiny_policy
from search_e1.text.prompts import plain_prompt, privileged_prompt
from search_e1.training.policy import Policy
from search_e1.types import ActionKind, Pair, Question, StopReason, Trajectory, Turn

QUESTION = Question(id="q1", text="Mayor of Bel?", answers=("Cor Dun",))
SEARCH_TEXT = "<think>who</think> <search>bel</search>"
SEEN = "\n<information>\nDoc 1\n</information>\n"
ANSWER_TEXT = "so <answer>Fen</answer>"


def make_turn(tokenizer, text, kind, argument, seen=""):
    return Turn(
        action_ids=tokenizer.encode(text, add_special_tokens=False),
        action_text=text,
        kind=kind,
        argument=argument,
        observation_ids=tokenizer.encode(seen, add_special_tokens=False) if seen else (),
        observation_text=seen,
    )


def make_pair(policy, question=QUESTION, *, reference_searches=False):
    """The student searches and answers wrongly; the reference is right at once, or after the same search."""
    tokenizer = policy.tokenizer
    prompt = plain_prompt(tokenizer, policy.prompts, question.text)
    search = make_turn(tokenizer, SEARCH_TEXT, ActionKind.SEARCH, "bel", SEEN)
    right = make_turn(tokenizer, "<answer>Cor Dun</answer>", ActionKind.ANSWER, "Cor Dun")
    student = Trajectory(
        question_id=question.id,
        prompt_ids=prompt,
        turns=(search, make_turn(tokenizer, ANSWER_TEXT, ActionKind.ANSWER, "Fen")),
        stop_reason=StopReason.ANSWERED,
        answer="Fen",
    )
    reference = Trajectory(
        question_id=question.id,
        prompt_ids=prompt,
        turns=(search, right) if reference_searches else (right,),
        stop_reason=StopReason.ANSWERED,
        answer="Cor Dun",
        reward=1.0,
    )
    teacher = privileged_prompt(tokenizer, policy.prompts, question.text, reference.text)
    return Pair(question=question, reference=reference, student=student, teacher_prompt_ids=teacher)


def pairs_of(policy, count, **kwargs):
    names = [f"Mayor of Bel{' or so' * (i % 3)}, {i}?" for i in range(count)]
    questions = [Question(id=f"q{i}", text=text, answers=("Cor Dun",)) for i, text in enumerate(names)]
    return [make_pair(policy, question, **kwargs) for question in questions]


def lfm2_policy() -> Policy:
    """The hybrid of convolutions and attention, with the same tokenizer and prompts."""
    return _of_family(Lfm2Config, Lfm2ForCausalLM, layer_types=["conv", "full_attention"], tie_word_embeddings=True)


def gemma_policy() -> Policy:
    """Logits with a soft cap that bends them."""
    return _of_family(Gemma2Config, Gemma2ForCausalLM, head_dim=8, final_logit_softcapping=0.2)


def _of_family(config, model, **shape) -> Policy:
    policy = make_tiny_policy()
    made = config(
        vocab_size=len(policy.tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=policy.tokenizer.eos_token_id,
        pad_token_id=policy.tokenizer.pad_token_id,
        **shape,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy.model = model(made)
    return policy
