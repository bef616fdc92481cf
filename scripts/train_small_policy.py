"""Make the small policy from scratch: tokenizer, random weights, demonstrations in practice worlds, training, figures.

    python scripts/train_small_policy.py --out src/search_e1/data/small_policy

It is trained in worlds that share no entity and no name with the world of ``search-e1 world``, where it is measured.
"""

import argparse
import json
import re
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import Lfm2Config, Lfm2ForCausalLM, PreTrainedTokenizerFast

from search_e1.config import Prompts, TrainingConfig
from search_e1.data.world import RELATIONS, World, make_world, name_halves
from search_e1.retrieval.bm25 import Bm25Index
from search_e1.runs.context import StageContext
from search_e1.stages.coldstart import BatchSource
from search_e1.text.prompts import INFORMATION_CLOSE, INFORMATION_OPEN
from search_e1.training.loop import Schedule, train
from search_e1.training.objectives.sft import Sft
from search_e1.training.policy import Policy
from search_e1.training.trained import TrainedPolicy
from small_policy_figures import figures
from world_demonstrations import HABITS, PHRASES, WORDY, DemonstrationWriter, Slips, batches

PROMPTS = Prompts(
    instruction="{question}",
    privileged="Example:\n{reference}\n{instruction}",
    correction="\nInvalid action. Search or answer.\n",
)
TRAINING = TrainingConfig(optimizer="muon", betas=(0.9, 0.95), schedule="linear", warmup=0.05)
SPECIAL = {"pad_token": "<|pad|>", "eos_token": "<|end|>", "additional_special_tokens": ["<|user|>", "<|assistant|>"]}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Each protocol tag, "Title:" with its bracket, word or sign is one piece, together with the space before it.
_PIECE = r" ?</?(?:think|search|information|answer)>|\(Title:|'s\b| ?\w+|\n+| ?[^\w\s]+?|\s"
_TAGS = [
    f"{space}<{slash}{tag}>"
    for tag in ("think", "search", "information", "answer")
    for slash in ("", "/")
    for space in ("", " ")
]


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per piece in ``texts`` and per byte, so that any text can be encoded and decoded."""
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = {piece for text in texts for piece in re.findall(_PIECE, text)} | set(_TAGS)
    pieces |= {f" {half}" for halves in name_halves() for half in halves}
    words = sorted({to_bytes.pre_tokenize_str(piece)[0][0] for piece in pieces} - set(alphabet))
    vocabulary = {token: i for i, token in enumerate([*alphabet, *words])}
    # Without merges, a piece is either a single token or bytes.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_PIECE), "isolated"), to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE, clean_up_tokenization_spaces=False, **SPECIAL
    )


def vocabulary_texts(world: World, prompts: Prompts) -> Iterator[str]:
    """Texts that contain every word of prompts, observations and demonstrations."""
    yield prompts.privileged
    yield prompts.correction
    yield f" {PHRASES}"
    yield INFORMATION_OPEN + "".join(f"Doc {i}(Title: X) x\n" for i in range(1, 6)) + INFORMATION_CLOSE
    yield from (f" {relation} {about}" for relation, (about, _) in RELATIONS.items())
    yield from (p.text for p in world.passages)
    yield from (q.text for q in world.questions("train", 2000))


def build_model(tokenizer: PreTrainedTokenizerFast, hidden: int) -> Lfm2ForCausalLM:
    """A model with random weights. LFM2's convolutions let such a small model learn to copy names that it has never seen."""
    config = Lfm2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        layer_types=["conv", "full_attention", "conv", "full_attention"],
        block_auto_adjust_ff_dim=False,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Lfm2ForCausalLM(config)


def make_policy(arguments: argparse.Namespace, directory: Path) -> Policy:
    """Make the tokenizer and a random model, and train it in practice worlds, whose indexes go into ``directory``."""
    torch.manual_seed(arguments.seed)
    worlds = [make_world(seed, practice=True) for seed in range(1, arguments.worlds + 1)]
    tokenizer = build_tokenizer(vocabulary_texts(worlds[0], PROMPTS))
    policy = Policy(build_model(tokenizer, arguments.hidden), tokenizer, PROMPTS)
    print(f"{len(tokenizer)} tokens, {sum(p.numel() for p in policy.model.parameters()):,} weights", flush=True)
    indexes = [Bm25Index.build(world.passages, directory / str(i)) for i, world in enumerate(worlds)]
    writers = [DemonstrationWriter(w, i, tokenizer, PROMPTS) for w, i in zip(worlds, indexes, strict=True)]
    started = time.perf_counter()

    def report(done: int, total: int, figure: str = "") -> None:
        if done % 50 == 0:
            print(f"step {done}/{total}  {figure}  {time.perf_counter() - started:.0f} s", flush=True)

    # Phases: reading, searching and following examples; then bad habits, which are quickly learned and unlearned; then padding
    # thoughts with words.
    for steps, drills, slips, off_track, rate, seed in (
        (arguments.steps, arguments.drills, Slips(), 0.6, arguments.learning_rate, arguments.seed),
        (arguments.habit_steps, 0, HABITS, 0.75, arguments.learning_rate * 0.4, arguments.seed),
        (arguments.wordy_steps, 0, WORDY, 0.75, arguments.learning_rate * 0.4, arguments.seed + 1),
    ):
        demonstrations = batches(writers, size=arguments.batch, drills=drills, slips=slips, seed=seed, off_track=off_track)
        trained = TrainedPolicy(policy.model, TRAINING, frozen_start=False)
        source = BatchSource(demonstrations, policy.model.config.max_position_embeddings)
        context = StageContext(directory, seed, report)
        train(trained, source, {"sft": Sft()}, TRAINING, Schedule(steps, rate), context)
        policy.model = trained.finish()
    return policy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for the policy")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--habit-steps", type=int, default=300, help="steps after --steps that teach bad habits")
    parser.add_argument("--wordy-steps", type=int, default=200, help="steps after --habit-steps that teach padded thoughts")
    parser.add_argument("--drills", type=int, default=150, help="how many of --steps are reading drills")
    parser.add_argument("--batch", type=int, default=16, help="demonstrations per step")
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--hidden", type=int, default=112)
    parser.add_argument("--worlds", type=int, default=3, help="practice worlds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--questions", type=int, default=300, help="dev questions to measure on; 0 for none")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        policy = make_policy(arguments, Path(directory))
        policy.save(arguments.out)
        if arguments.questions:
            print(json.dumps(figures(policy, arguments.questions, Path(directory) / "dev"), indent=2))


if __name__ == "__main__":
    main()
