"""Traces of fake tensors count what real ones take."""

from functools import partial

import pytest
import torch
from support import TinyPolicy
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_rlvr.preflight.placement import Placement
from lightning_rlvr.preflight.trace import LiveBytes, optimizer_step, prompt_pass, update_pass

KEYS_OF_A_TOKEN = 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, their size, bytes


@pytest.fixture(scope="module")
def skeleton():
    return TinyPolicy().load().model.to("meta")


def test_live_bytes_are_those_that_live():
    before = torch.ones(100)
    with LiveBytes() as live:
        kept = before * 2
        (before + 1).sum()
        view = kept[:50]
        before.mul_(2)
    assert live.now == 400
    assert 800 <= live.peak <= 804 + 4
    del kept
    assert live.now == 400, "a view holds its storage"
    del view
    assert live.now == 0


def test_prompts_leave_their_keys_and_values(skeleton):
    read = prompt_pass(skeleton, prompts=3, prompt=7, autocast=None)
    assert read.cache == 3 * 7 * KEYS_OF_A_TOKEN
    assert read.peak > read.cache


def test_recurrent_layers_leave_their_states():
    sizes = {"vocab_size": 20, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model("lfm2", **sizes, num_hidden_layers=2, layer_types=["conv", "full_attention"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    keys, states = 7 * 2 * 2 * 8, 32 * config.conv_L_cache  # of tokens, keys and values, heads, their size
    assert prompt_pass(model, prompts=3, prompt=7, autocast=None).cache == 3 * 4 * (keys + states)


def test_a_shared_prompt_is_held_once(skeleton):
    apart, shared = (update_pass(skeleton, n, 8, (40, 9), False, Placement()) for n in (8, 1))
    joined = update_pass(skeleton, 8, 8, (40, 9), True, Placement())
    assert shared.activations < apart.activations
    assert joined.activations > shared.activations
    assert shared.peak >= shared.activations > 0


def test_activations_grow_with_rows(skeleton):
    one, two = (update_pass(skeleton, n, n, (5, 20), True, Placement()).activations for n in (4, 8))
    assert two == pytest.approx(2 * one, rel=0.05)


def test_mixed_precision_is_smaller_in_activations_only(skeleton):
    wide, mixed = (
        update_pass(skeleton, 64, 64, (9, 20), True, Placement(autocast=dtype)) for dtype in (None, torch.bfloat16)
    )
    assert mixed.activations < 0.9 * wide.activations


def test_an_optimizer_has_the_state_that_it_makes(skeleton):
    weights = sum(parameter.nbytes for parameter in skeleton.parameters())
    assert optimizer_step(skeleton, torch.optim.AdamW, False).state == 2 * weights
    assert optimizer_step(skeleton, partial(torch.optim.SGD, lr=1.0), False).state == 0
    alone, together = (optimizer_step(skeleton, torch.optim.AdamW, gpu).extra for gpu in (False, True))
    assert alone < weights <= together


def test_an_optimizer_that_cannot_be_traced_is_said_so(skeleton):
    def broken(parameters):
        raise RuntimeError("kernels only")

    assert optimizer_step(skeleton, broken, False) is None
