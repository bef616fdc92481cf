"""A small untrained policy: a byte-level tokenizer trained on the user's texts, and random weights."""

from collections.abc import Iterable

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Lfm2Config, Lfm2ForCausalLM, PreTrainedTokenizerFast

from search_e1.config import NewPolicyConfig, Prompts
from search_e1.errors import ConfigError
from search_e1.training.policy import Policy

PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
TAGS = tuple(f"<{slash}{tag}>" for tag in ("think", "search", "information", "answer") for slash in ("", "/"))
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most ``vocabulary`` ids, trained on ``texts``, with a ChatML template.

    Each protocol tag is one ordinary token, decoded like any text.

    Raises:
        ConfigError: ``vocabulary`` has no room for the bytes and tags.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocabulary < (least := len(alphabet) + len(TAGS) + 3):
        raise ConfigError(
            f"coldstart.new_policy.vocabulary = {vocabulary} has no room for bytes and tags; give at least {least}"
        )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(TAGS),
        special_tokens=[PAD, START, END],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=PAD, eos_token=END, additional_special_tokens=[START], padding_side="left"
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def policy(texts: Iterable[str], config: NewPolicyConfig, prompts: Prompts, seed: int) -> Policy:
    """An untrained policy of the sizes in ``config``, with a tokenizer trained on ``texts``.

    The architecture is LFM2, which alternates convolution and attention layers: at this size it learns to copy unseen names
    from far fewer tokens than a pure attention model.
    """
    words = tokenizer(texts, config.vocabulary)
    torch.manual_seed(seed)
    shape = Lfm2Config(
        vocab_size=len(words),
        hidden_size=config.hidden_size,
        intermediate_size=3 * config.hidden_size,
        block_auto_adjust_ff_dim=False,
        num_hidden_layers=config.layers,
        layer_types=["full_attention" if layer % 2 else "conv" for layer in range(config.layers)],
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        max_position_embeddings=config.context_length,
        tie_word_embeddings=True,
        pad_token_id=words.pad_token_id,
        bos_token_id=None,
        eos_token_id=words.eos_token_id,
    )
    return Policy(Lfm2ForCausalLM(shape), words, prompts)
