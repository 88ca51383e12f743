import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_rlvr.models.length import check_length
from lightning_rlvr.types import UserError

SMALL = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "pad_token_id": 0,
}
ROPE = {"rope_theta": 10000.0, "factor": 4.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0, 5.0, 6.0, 8.0],
    "original_max_position_embeddings": 12,
}


def build(family, **settings):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SMALL, **settings}))


FAMILIES = [
    pytest.param("gpt2", {"n_positions": 12}, "no more positions", id="learned"),
    pytest.param("llama", {"max_position_embeddings": 12}, "not trained for more", id="rotary"),
    pytest.param(
        "llama",
        {"max_position_embeddings": 12, "rope_parameters": {**ROPE, "rope_type": "dynamic"}},
        "dynamic positions change with the longest row",
        id="dynamic",
    ),
    pytest.param(
        "phi3",
        {"max_position_embeddings": 64, "original_max_position_embeddings": 12, "rope_parameters": LONG},
        "longrope positions change with the longest row",
        id="longrope",
    ),
    pytest.param(
        "llama",
        {
            "max_position_embeddings": 12,
            "rope_parameters": {**ROPE, "rope_type": "yarn", "original_max_position_embeddings": 3},
        },
        "not trained for more",
        id="yarn",
    ),
]


@pytest.mark.parametrize(("family", "settings", "why"), FAMILIES)
def test_more_tokens_than_a_model_can_take_are_refused(family, settings, why):
    model = build(family, **settings)
    check_length(model, 5, 7, "the.key")
    with pytest.raises(UserError, match=rf"at most 12 tokens.*got up to 6 and 7: .*{why}.*Set the\.key\."):
        check_length(model, 6, 7, "the.key")


def test_each_kind_of_layer_has_positions_of_its_own():
    rope = {"full_attention": {**ROPE, "rope_type": "dynamic"}, "sliding_attention": {"rope_type": "default"}}
    model = build("gemma3_text", max_position_embeddings=12, rope_parameters=rope, head_dim=8)
    with pytest.raises(UserError, match="dynamic positions"):
        check_length(model, 6, 7, "the.key")


def test_a_model_without_positions_takes_any_number():
    model = build("mamba")
    check_length(model, 10**6, 10**6, "the.key")
