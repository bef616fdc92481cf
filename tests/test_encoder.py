import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, pre_tokenizers
from transformers import AutoModel, AutoTokenizer, T5Config, T5EncoderModel

from search_e1.errors import ModelError
from search_e1.retrieval.convention import Convention, Overrides
from search_e1.retrieval.encoder import Encoder, token_batches
from tiny_encoder import PROMPTS, make_tiny_encoder, write

TEXTS = ["Oslo", "", "the mayor of Bel", "x" * 200, "Zürich \u2028 \U0001f600", "Oslo"]


def by_hand(directory: Path, text: str, pooling: str, normalize: bool, max_length: int) -> np.ndarray:
    """One text alone: no batch, no padding, no mask."""
    ids = AutoTokenizer.from_pretrained(directory)(text)["input_ids"]
    ids = ids if len(ids) <= max_length else [*ids[: max_length - 1], ids[-1]]
    with torch.no_grad():
        states = AutoModel.from_pretrained(directory)(input_ids=torch.tensor([ids])).last_hidden_state[0].numpy()
    vector = {"mean": states.mean(0), "cls": states[0], "last": states[-1]}[pooling]
    return vector / np.sqrt((vector**2).sum()) if normalize else vector


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("normalize", [True, False])
def test_pooling_as_the_files_say(tmp_path: Path, pooling: str, normalize: bool) -> None:
    directory = make_tiny_encoder(tmp_path / "e", pooling=pooling, normalize=normalize)
    if not normalize:
        write(directory / "config_sentence_transformers.json", {"prompts": PROMPTS, "similarity_fn_name": "dot"})
    encoder = Encoder.open(directory, dtype="float32", batch_tokens=60)
    for prefix, encode in (("query: ", encoder.queries), ("passage: ", encoder.passages)):
        expected = np.stack([by_hand(directory, prefix + text, pooling, normalize, 24) for text in TEXTS])
        vectors = encode(TEXTS)
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(vectors, expected, atol=2e-6)
    assert encoder.queries([]).shape == (0, 16)


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
def test_the_newer_way_to_write_pooling(tmp_path: Path, pooling: str) -> None:
    directory = make_tiny_encoder(tmp_path / "e")
    write(directory / "1_Pooling" / "config.json", {"embedding_dimension": 16, "pooling_mode": pooling})
    assert Encoder.open(directory).convention.pooling == {"lasttoken": "last"}.get(pooling, pooling)


def test_what_the_files_say_and_what_overrides_it(tmp_path: Path) -> None:
    directory = make_tiny_encoder(tmp_path / "e", prompts={"query": "Q: ", "passage": "P: "})
    said = Convention(query_prefix="Q: ", passage_prefix="P: ", pooling="mean", normalize=True, max_length=24)
    assert Encoder.open(directory).convention == said
    other = Overrides(query_prefix="", pooling="cls", normalize=False, max_length=9)
    assert Encoder.open(directory, other).convention == Convention(
        query_prefix="", passage_prefix="P: ", pooling="cls", normalize=False, max_length=9
    )
    assert Encoder.open(directory, said).convention == said


def test_a_default_prompt_stands_for_both(tmp_path: Path) -> None:
    directory = make_tiny_encoder(tmp_path / "e")
    saved = {"prompts": {"both": "text: "}, "default_prompt_name": "both"}
    write(directory / "config_sentence_transformers.json", saved)
    convention = Encoder.open(directory).convention
    assert (convention.query_prefix, convention.passage_prefix) == ("text: ", "text: ")


@pytest.mark.parametrize(
    ("name", "query", "passage", "pooling"),
    [
        ("e5-base-v2", "query: ", "passage: ", "mean"),
        ("multilingual-e5-small", "query: ", "passage: ", "mean"),
        ("multilingual-e5-large-instruct", "Instruct: Given a web search", "", "mean"),
        ("bge-small-en-v1.5", "Represent this sentence for searching relevant passages: ", "", "cls"),
        ("bge-m3", "", "", "cls"),
        ("all_MiniLM_L6_v2", "", "", "mean"),
        ("models--intfloat--e5-large/snapshots/0a1b", "query: ", "passage: ", "mean"),
    ],
)
def test_families_that_say_it_in_prose_only(tmp_path: Path, name: str, query: str, passage: str, pooling: str) -> None:
    (tmp_path / name).mkdir(parents=True)
    directory = make_tiny_encoder(tmp_path / name, pooling=None, normalize=False, prompts=None, max_length=None)
    convention = Encoder.open(directory).convention
    assert convention.query_prefix.startswith(query)
    assert (convention.query_prefix == "") == (query == "")
    assert (convention.passage_prefix, convention.pooling, convention.normalize) == (passage, pooling, True)
    assert convention.max_length == 64


def test_empty_prompts_say_nothing(tmp_path: Path) -> None:
    empty = {"query": "", "document": ""}  # what sentence-transformers saves by itself
    known = make_tiny_encoder(tmp_path / "e5-base", prompts=empty)
    assert Encoder.open(known).convention.query_prefix == "query: "
    for i, prompts in enumerate((empty, {"query": None, "document": None})):
        unknown = make_tiny_encoder(tmp_path / f"mine-{i}", prompts=prompts)
        with pytest.raises(ModelError, match="give --query-prefix and --passage-prefix"):
            Encoder.open(unknown)


def test_an_encoder_that_says_too_little_must_be_told(tmp_path: Path) -> None:
    directory = make_tiny_encoder(tmp_path / "mine", pooling=None, prompts=None)
    with pytest.raises(ModelError, match="give --query-prefix and --passage-prefix"):
        Encoder.open(directory)
    with pytest.raises(ModelError, match="give --query-prefix and --passage-prefix"):
        Encoder.open(directory, Overrides(query_prefix="q: "))
    with pytest.raises(ModelError, match="give --pooling mean, cls or last"):
        Encoder.open(directory, Overrides(query_prefix="", passage_prefix=""))
    assert Encoder.open(directory, Overrides(query_prefix="", passage_prefix="", pooling="cls"))


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("modules.json", [{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}], "has a Dense module"),
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "pools by max_tokens; supported are mean"),
        ("1_Pooling/config.json", {"pooling_mode": ["mean", "cls"]}, "pools by mean and cls"),
        ("1_Pooling/config.json", {"pooling_mode": "mean", "include_prompt": False}, "leaves the prefix out"),
        ("sentence_bert_config.json", {"max_seq_length": 999}, "max_length 999, but the encoder reads 64 tokens"),
    ],
)
def test_what_is_not_supported_is_refused(tmp_path: Path, file: str, content: object, says: str) -> None:
    directory = make_tiny_encoder(tmp_path / "e")
    write(directory / file, content)
    with pytest.raises(ModelError, match=says):
        Encoder.open(directory)


def test_euclidean_distance_is_refused(tmp_path: Path) -> None:
    directory = make_tiny_encoder(tmp_path / "e", normalize=False)
    write(directory / "config_sentence_transformers.json", {"prompts": PROMPTS, "similarity_fn_name": "euclidean"})
    with pytest.raises(ModelError, match="trained for euclidean distance"):
        Encoder.open(directory)


def test_what_is_no_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such directory"):
        Encoder.open(tmp_path / "none")
    with pytest.raises(ModelError, match="no such directory"):
        Encoder.open("nonsense")
    with pytest.raises(ModelError, match=r"no config\.json"):
        Encoder.open(tmp_path)
    directory = make_tiny_encoder(tmp_path / "e")
    with pytest.raises(ModelError, match="device = 'warp': no such device"):
        Encoder.open(directory, device="warp")
    (directory / "modules.json").write_text("{")
    with pytest.raises(ModelError, match=r"modules\.json: not JSON"):
        Encoder.open(directory)
    (directory / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(ModelError, match="does not load"):
        Encoder.open(directory)
    (directory / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights in it"):
        Encoder.open(directory)
    (directory / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="pickles, which can run code"):
        Encoder.open(directory)


LAYER = "encoder.layer.0.output.dense.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop(LAYER), f"weights are missing: {LAYER}; give the directory of a whole encoder"),
        (
            lambda w: [w.update({f"_orig_mod.{key}": w.pop(key)}) for key in list(w)],
            "weights are missing: embeddings.LayerNorm.bias and 20 more; its files hold _orig_mod.embeddings.LayerNorm.bias",
        ),
        (
            lambda w: w.update({LAYER.replace("0", "1"): w[LAYER] + 1}),
            f"weights are left over: {LAYER.replace('0', '1')}; give",
        ),
        (lambda w: w.update({LAYER: w[LAYER][:3] + 1}), "does not load"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, change, said: str) -> None:
    directory = make_tiny_encoder(tmp_path / "e")
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError) as caught:
        Encoder.open(directory)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_token_without_a_row_is_refused(tmp_path: Path) -> None:
    directory = make_tiny_encoder(tmp_path / "e")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    rows = len(tokenizer)
    tokenizer.add_tokens(["norway"])
    tokenizer.save_pretrained(directory)
    said = rf"the tokenizer has {rows + 1} ids and the embedding {rows} rows \(no row for 'norway'\)"
    with pytest.raises(ModelError, match=said):
        Encoder.open(directory)


def test_a_special_token_without_a_row_matters_where_it_occurs(tmp_path: Path) -> None:
    """As in text models that were taken out of multimodal ones."""
    directory = make_tiny_encoder(tmp_path / "e")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(directory)
    encoder = Encoder.open(directory)
    assert np.isfinite(encoder.queries(TEXTS)).all()
    with pytest.raises(ModelError, match="no row for '<image>' in the embedding; remove it from the texts"):
        encoder.queries(["Oslo <image>"])


def test_a_pattern_that_does_not_come_to_an_end_is_one_line(tmp_path: Path) -> None:
    encoder = Encoder.open(make_tiny_encoder(tmp_path / "e"))
    splitting = pre_tokenizers.Split(Regex("(a|aa)+$"), "isolated")
    encoder._model.tokenizer.backend_tokenizer.pre_tokenizer = splitting
    with pytest.raises(ModelError, match=r"tokenizer\.json: its regular expression fails on a text") as caught:
        encoder.queries(["a" * 60 + "!"])
    assert "\n" not in str(caught.value)


def test_a_pooler_may_be_missing_and_a_head_left_over(tmp_path: Path, caplog) -> None:
    """Neither has a say in the vectors."""
    directory = make_tiny_encoder(tmp_path / "e")
    expected = Encoder.open(directory, dtype="float32").queries(TEXTS)
    weights = load_file(directory / "model.safetensors")
    weights = {key: value for key, value in weights.items() if "pooler" not in key} | {"cls.predictions.bias": torch.ones(3)}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    np.testing.assert_array_equal(Encoder.open(directory, dtype="float32").queries(TEXTS), expected)
    assert caplog.messages == []  # transformers' table of what does not fit is not for the user


@pytest.mark.parametrize(
    ("name", "held"),
    [("sentence_bert_config.json", {"max_seq_length": length}) for length in ("x", {"a": 1}, 1.5, -1)]
    + [("config_sentence_transformers.json", {"prompts": prompts}) for prompts in ("x", {"query": [1]}, {"document": None})]
    + [("tokenizer_config.json", {"pad_token": None, "tokenizer_class": "PreTrainedTokenizerFast"})],
)
def test_values_of_another_kind_are_one_line(tmp_path: Path, name: str, held: object) -> None:
    directory = make_tiny_encoder(tmp_path / "e")
    (directory / name).write_text(json.dumps(held))
    with pytest.raises(ModelError) as caught:
        Encoder.open(directory)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"])
@pytest.mark.parametrize("content", ["[" * 100_000, '"x"', "[1]", "7", "null"])
def test_files_of_another_kind_are_one_line_that_names_them(tmp_path: Path, name: str, content: str) -> None:
    directory = make_tiny_encoder(tmp_path / "e")
    (directory / name).write_text(content)
    with pytest.raises(ModelError) as caught:
        Encoder.open(directory)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_encoder_half_of_a_t5(tmp_path: Path) -> None:
    directory = make_tiny_encoder(tmp_path / "e", dimension=8)
    config = T5Config(vocab_size=300, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = T5EncoderModel(config).eval()
    model.save_pretrained(directory)
    changed = json.loads((directory / "config.json").read_text()) | {"is_encoder_decoder": True}
    write(directory / "config.json", changed)
    ids = AutoTokenizer.from_pretrained(directory)("query: Oslo", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        mean = model(input_ids=ids).last_hidden_state[0].mean(0).numpy()
    vectors = Encoder.open(directory, dtype="float32").queries(["Oslo"])
    np.testing.assert_allclose(vectors[0], mean / np.sqrt((mean**2).sum()), atol=2e-6)


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    encoder = Encoder.open(make_tiny_encoder(tmp_path / "e"), dtype="float32")
    with torch.no_grad():
        encoder._model[0].auto_model.embeddings.word_embeddings.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="not finite in float32"):
        encoder.queries(["Oslo"])


def test_the_checksum_is_of_weights_and_convention(tmp_path: Path) -> None:
    directory = make_tiny_encoder(tmp_path / "e")
    checksum = Encoder.open(directory).checksum
    assert Encoder.open(directory, dtype="bfloat16", batch_tokens=7).checksum == checksum
    assert Encoder.open(make_tiny_encoder(tmp_path / "same")).checksum == checksum
    assert Encoder.open(directory, Overrides(max_length=9)).checksum != checksum
    assert Encoder.open(make_tiny_encoder(tmp_path / "other", seed=1)).checksum != checksum


def test_bfloat16_changes_little(tmp_path: Path) -> None:
    directory = make_tiny_encoder(tmp_path / "e")
    a, b = (Encoder.open(directory, dtype=dtype).queries(TEXTS) for dtype in ("float32", "bfloat16"))
    assert 0.99 < (a * b).sum(1).min() < 1


def test_batches_by_hand() -> None:
    lengths = [3, 10, 9, 8, 1, 10, 4]
    assert list(token_batches(lengths, 20)) == [[1, 5], [2, 3], [6, 0], [4]]
    assert list(token_batches(lengths, 10)) == [[1], [5], [2], [3], [6, 0], [4]]
    assert list(token_batches(lengths, 1)) == [[1], [5], [2], [3], [6], [0], [4]]
    assert list(token_batches([], 20)) == []
