"""The shapes of models against numbers that are published or counted by hand."""

from pathlib import Path

import pytest
from transformers import AutoConfig

from planned import TINY, tiny
from search_e1.errors import ModelError
from search_e1.lab.plan.shapes import SHAPES, read_config, shape_of


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen2.5-3b", 3_085_938_688),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen3-4b", 4_022_468_096),
        ("llama-3.2-3b", 3_212_749_824),
        ("llama-3.1-8b", 8_030_261_248),
    ],
)
def test_known_shapes_have_the_published_number_of_weights(name: str, parameters: int) -> None:
    assert shape_of(read_config(name)).parameters == parameters


def test_a_shape_is_counted_as_by_hand() -> None:
    shape = shape_of(read_config("qwen2.5-3b"))
    assert shape.embeddings == shape.head == 151_936 * 2048  # tied
    # Queries and output 2048 x 2048, keys and values 2048 x 256, three matrices of the MLP.
    assert shape.active == 36 * (2 * 2048 * 2048 + 2 * 2048 * 256 + 3 * 2048 * 11_008)
    assert shape.cached == 36 * 2 * 2 * 128  # layers, keys and values, groups, width of a head
    assert shape.attention_width == 36 * 16 * 128
    apart = shape_of(read_config("qwen2.5-7b"))
    assert apart.embeddings == 2 * apart.head
    assert apart.parameters - apart.active > 2 * apart.head


def test_fused_projections_cache_only_their_keys_and_values() -> None:
    shape = shape_of(AutoConfig.for_model("phi3", **dict(TINY, pad_token_id=0)))
    assert shape.cached == 2 * 2 * 2 * 16  # layers, keys and values, groups, width of a head


def test_of_experts_only_those_that_a_token_passes_count() -> None:
    dense = dict(TINY, head_dim=16, tie_word_embeddings=False)
    experts = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, decoder_sparse_step=1, mlp_only_layers=[])
    shape = shape_of(AutoConfig.for_model("qwen3_moe", **dense, **experts))
    attention = 64 * 64 * 2 + 64 * 32 * 2
    router, expert = 64 * 8, 3 * 64 * 32
    assert shape.active == 2 * (attention + router + 2 * expert)


@pytest.mark.parametrize(
    ("model", "like"),
    [
        ("Qwen/Qwen2.5-3B-Instruct", "qwen2.5-3b"),
        ("Qwen/Qwen3-4B-Instruct-2507", "qwen3-4b"),
        ("qwen2.5-7b", "qwen2.5-7b"),
    ],
)
def test_a_hub_id_has_the_shape_that_it_begins_with(model: str, like: str) -> None:
    assert read_config(model).to_dict() == AutoConfig.for_model(**SHAPES[like]).to_dict()


def test_a_config_json_or_a_directory_is_enough(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    for model in (tmp_path / "config.json",):
        assert shape_of(read_config(str(model))) == shape_of(tiny())
    assert shape_of(read_config("small")).parameters == 568_400


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("someone/unheard-of", "neither on this machine nor a known shape; give the directory"),
        ("qwen2.5-33b", "neither on this machine nor a known shape"),
    ],
)
def test_an_unknown_model_is_refused(model: str, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        read_config(model)


@pytest.mark.parametrize("text", ["{", "[]", '{"no": "type"}', '{"model_type": "unheard_of"}'])
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ModelError, match=r"not the config\.json of a model"):
        read_config(str(path))
