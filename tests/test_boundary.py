"""Where prompt and response meet: teacher and student read the same response ids, end tokens included, whatever the tokenizer.

The trajectories are rolled out, so that turns are made of ids as a policy samples them, not of text.
"""

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from conftest import PASSAGES, TINY_PROMPTS, TinyRetriever
from scripted import ScriptedEngine
from search_e1.config import PairsConfig, ReferenceConfig, RolloutConfig
from search_e1.errors import DataError
from search_e1.rollout.loop import rollout
from search_e1.rollout.starts import starts
from search_e1.selfdistill.files import check_tokenizer
from search_e1.selfdistill.pairs import select
from search_e1.selfdistill.samples import classes_of, sample_of
from search_e1.text.prompts import plain_prompt, privileged_prompt
from search_e1.text.reference import prompt_budget, render_reference
from search_e1.text.tokens import TokenClass
from search_e1.training.batch import make_batch
from search_e1.types import Group, Pair, Question

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WHOLE = ReferenceConfig()
QUESTION = Question(id="q", text="Mayor of Bel?", answers=("Cor Dun",))


def chatml() -> PreTrainedTokenizerFast:
    """Byte-level BPE; special tokens that the chat template writes, one of which ends a turn."""
    tokenizer = Tokenizer(models.BPE(vocab=_bytes(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in ("<|im_start|>", "<|im_end|>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=CHATML)


def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama's: spaces become ▁, bytes for what is unknown, <s> before every text, </s> at the end of a response."""
    letters = ["▁", *map(chr, range(33, 127))]
    vocab = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *letters])}
    merges = [("▁", "C"), ("o", "r"), ("▁", "D")]
    vocab |= {a + b: len(vocab) + i for i, (a, b) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def straddling() -> PreTrainedTokenizerFast:
    """Byte-level BPE whose tokens run over a tag's end: ``>.`` closes an answer and begins what follows it."""
    vocab = _bytes()
    merges = [(">", "."), ("<", "/"), ("s", "e"), (">", "Ċ")]
    vocab |= {a + b: len(vocab) + i for i, (a, b) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def _bytes() -> dict[str, int]:
    return {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


# Tokenizer, what follows a closing tag in the same generation, how that stands in the teacher's prompt.
FAMILIES = {
    "chatml": (chatml, "<|im_end|>", "(im_end)"),
    "sentencepiece": (sentencepiece, "</s>", "(/s)"),
    "straddling": (straddling, ".<|end|>", ".(end)"),
}


def mined(tokenizer, end: str, config: ReferenceConfig = WHOLE) -> Pair:
    """A correct and a wrong trajectory, each ending as a policy that knows its end token ends."""
    scripts = (
        [f"<think>a</think> <search> mayor Bel </search>{end}", f"So <answer> Cor Dun </answer>{end}"],
        [f"<search> Bel </search>{end}", f"<answer> Gil </answer>{end}"],
    )
    limits = RolloutConfig(max_action_tokens=80, max_tokens=900, topk=1)
    trajectories = [
        rollout(
            ScriptedEngine(tokenizer, {QUESTION.text: script}), TinyRetriever(PASSAGES),
            starts(tokenizer, TINY_PROMPTS, [QUESTION]), limits, temperature=1.0, seed=0,
        )[0]
        for script in scripts
    ]  # fmt: skip

    def render(question, reference, student):
        budget = prompt_budget(config, 10_000, len(student.response_ids))
        return render_reference(tokenizer, TINY_PROMPTS, question.text, reference, config, budget)

    ((pair,), _) = select([Group(question=QUESTION, trajectories=tuple(trajectories))], PairsConfig(), render)
    return pair


@pytest.fixture(params=FAMILIES)
def family(request):
    make, end, shown = FAMILIES[request.param]
    return make(), end, shown


def test_the_families_are_what_they_are_said_to_be():
    assert chatml().decode(plain_prompt(chatml(), TINY_PROMPTS, "Who?")).startswith("<|im_start|>user\nQuestion: Who?")
    assert sentencepiece().encode("Cor Dun é")[:1] == [sentencepiece().bos_token_id]
    assert sentencepiece().convert_ids_to_tokens(sentencepiece().encode("é"))[-2:] == ["<0xC3>", "<0xA9>"]
    assert straddling().tokenize("</answer>.") == ["</", "a", "n", "s", "w", "e", "r", ">."]


def test_teacher_and_student_read_the_same_response(family):
    tokenizer, end, _ = family
    pair = mined(tokenizer, end)
    classes = classes_of(tokenizer, TINY_PROMPTS, pair.student)
    sample = sample_of(pair, classes)
    response, student = pair.student.response_ids, pair.student.prompt_ids
    assert (sample.prompt_ids, sample.response_ids, sample.action_mask) == (student, response, pair.student.action_mask)
    assert student == plain_prompt(tokenizer, TINY_PROMPTS, QUESTION.text)
    teacher = privileged_prompt(tokenizer, TINY_PROMPTS, QUESTION.text, pair.reference.text)
    assert sample.teacher_prompt_ids == teacher
    # The end token is among what is learned, in both rows, and is the last of each action.
    assert response[-1] == tokenizer.eos_token_id
    assert [turn.action_ids[-1] for turn in pair.student.turns] == [tokenizer.eos_token_id] * 2
    assert classes[-1] is TokenClass.TAG
    sampled = [i for turn in pair.student.turns for i in turn.action_ids]
    for packed in (False, True):
        batch = make_batch([sample], [[1.0] * len(sampled)], packed=packed)
        assert batch.targets.tolist() == sampled
        for rows, prompt in ((batch.student, student), (batch.teacher, teacher)):
            assert rows.input_ids[0].tolist() == [*prompt, *response]
            assert rows.input_ids[0][rows.index + 1].tolist() == sampled
    # Nothing is inserted between prompt and response, and no text encoded twice: the teacher's prompt ends as a prompt does.
    tail = tuple(plain_prompt(tokenizer, TINY_PROMPTS, "x"))[-2:] if tokenizer.chat_template else ()
    assert teacher[len(teacher) - len(tail) :] == tail


def test_the_reference_is_shown_to_its_end(family):
    tokenizer, end, shown = family
    pair = mined(tokenizer, end)
    assert pair.reference.text.endswith(f"</answer>{end}")
    prompt = tokenizer.decode(pair.teacher_prompt_ids)
    # An end token that stays special would end the message that shows it; its name stands there instead.
    assert f"So <answer> Cor Dun </answer>{shown}\nYou:" in prompt
    special = tokenizer.eos_token_id
    plain = plain_prompt(tokenizer, TINY_PROMPTS, QUESTION.text)
    assert pair.teacher_prompt_ids.count(special) == plain.count(special)


@pytest.mark.parametrize("shows", ["searches", "searches_and_answer", "answer"])
def test_a_part_of_the_reference_ends_as_that_part_did(family, shows):
    tokenizer, end, _ = family
    pair = mined(tokenizer, end, ReferenceConfig(shows=shows))
    assert pair.reference_shown.endswith(f"</search>{end}" if shows == "searches" else f"</answer>{end}")


@pytest.mark.parametrize("shorten", ["passages", "evenly"])
def test_a_shortened_reference_fits_to_the_token_and_keeps_its_end(family, shorten):
    tokenizer, end, _ = family
    pair = mined(tokenizer, end)
    length = len(sample_of(pair, ()))
    assert length == len(pair.teacher_prompt_ids) + len(pair.student.response_ids)
    cut = mined(tokenizer, end, ReferenceConfig(shorten=shorten, max_tokens=length - 1))
    assert cut.shortened
    assert cut.reference_shown.endswith(f"</answer>{end}")
    assert len(sample_of(cut, ())) <= length - 1
    # What was measured is what is read: the lead, the profile and distillation take the prompt from the pair.
    assert cut.teacher_prompt_ids == privileged_prompt(tokenizer, TINY_PROMPTS, QUESTION.text, cut.reference_shown)


def test_each_familys_ids_are_refused_by_the_others():
    tokenizers = {name: make() for name, (make, _, _) in FAMILIES.items()}
    for name, (_, end, _) in FAMILIES.items():
        pair = mined(tokenizers[name], end)
        for other, tokenizer in tokenizers.items():
            if other == name:
                check_tokenizer(tokenizer, [pair.student, pair.reference], name)
            else:
                with pytest.raises(DataError, match="sampled with another tokenizer"):
                    check_tokenizer(tokenizer, [pair.student], name)
