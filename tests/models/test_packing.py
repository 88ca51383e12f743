"""The flat and the packed way against the plain one: the same values and gradients, computed once."""

import gc
import os
import warnings
import weakref
from dataclasses import replace

import pytest
import torch
from packed import ROWS, batch, built, distance, gpt2, gradients
from support import TinyPolicy, exact

from lightning_rlvr.models import finish_model, flat, forward, packing
from lightning_rlvr.models.forward import (
    _plain,
    batch_logp,
    joins,
    micro_batches,
    packs,
    response_logp,
    response_loss,
)
from lightning_rlvr.models.packing import COPIED, distinct_prompts, parts_of, passes
from lightning_rlvr.preflight.trace import LiveBytes

pytestmark = pytest.mark.usefixtures("lean_however_small")
MODELS = {
    "qwen3": lambda: TinyPolicy().load().model,
    "llama, grouped queries": lambda: built("Llama", tie_word_embeddings=False),
    "llama, tied": lambda: built("Llama", tie_word_embeddings=True),
    "qwen2, biases": lambda: built("Qwen2"),
    "mistral, window shorter than prompts": lambda: built("Mistral", sliding_window=4),
    "gpt2, learned positions": lambda: gpt2(),
}


@pytest.fixture
def packed_only(monkeypatch):
    """Lets no model take the flat way."""
    monkeypatch.setattr(forward, "attends_plainly", lambda model: False)


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


def objective(values, weight):
    """A loss that couples the tokens of a row and pulls on both values."""
    rows = (values.logp * weight).sum(dim=1)
    return rows.sum() + rows.square().sum() / 9 - (values.entropy * weight.square()).sum()


@pytest.mark.parametrize(
    ("dtype", "bound", "way"),
    [
        (torch.float64, 1e-10, "flat"),
        (torch.float32, 1e-5, "flat"),
        (torch.float64, 1e-10, "packed"),
        (torch.float32, 1e-5, "packed"),
        (torch.float64, 1e-10, "joined"),
    ],
)
def test_values_and_gradients_equal_those_of_the_plain_way(model, dtype, bound, way, monkeypatch):
    monkeypatch.setattr(packing, "CPU_PADDING", 3)  # several passes
    monkeypatch.setattr(flat, "CPU_PADDING", 3)  # several calls of attention
    if way == "packed":
        monkeypatch.setattr(forward, "attends_plainly", lambda model: False)
    recompute = way == "joined"
    model = exact(model.to(dtype))
    if recompute:
        finish_model(model).gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    assert joins(model) == recompute
    assert packs(model)
    windowed = getattr(model.config, "sliding_window", None) is not None
    assert (model in forward._FLAT) == (way == "flat" and not windowed)
    rollouts = batch()
    weight = torch.randn(rollouts.mask.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    plain = _plain(model, rollouts, 0.7, True)
    wanted = gradients(model, objective(plain, weight))

    values = response_logp(model, rollouts, 0.7, with_entropy=True)
    torch.testing.assert_close(values[:2], plain[:2], rtol=0, atol=10 * bound)
    assert distance(gradients(model, objective(values, weight)), wanted) < bound

    for size in (1, 2, 5, 9):
        parts = micro_batches(model, rollouts, torch.arange(len(ROWS)), size)
        model.zero_grad(set_to_none=True)
        for part in parts:
            loss = response_loss(
                model,
                rollouts.rows(part),
                0.7,
                lambda v, rows, part=part: objective(v, weight[part[rows]]),
                True,
            )
            loss.backward()
        assert distance({n: p.grad for n, p in model.named_parameters()}, wanted) < bound
        alone = batch_logp(model, rollouts, 0.7, parts, with_entropy=True)
        torch.testing.assert_close(alone[:2], plain[:2], rtol=0, atol=10 * bound)
        assert not alone.logp.requires_grad


def tokens_of_passes(rollouts):
    model, seen = TinyPolicy().load().model, []
    packs(model)
    hook = model.model.embed_tokens.register_forward_hook(lambda _, args, out: seen.append(args[0].numel()))
    response_logp(model, rollouts, 1.0)
    hook.remove()
    return seen


def test_all_tokens_that_count_are_computed_once_in_one_pass():
    inputs = sum(max(0, response - 1) for _, _, response in ROWS)
    assert tokens_of_passes(batch()) == [3 + 7 + 1 + 5 + inputs]


@pytest.mark.usefixtures("packed_only")
def test_a_prompt_is_computed_once_for_its_responses_and_no_token_without_need():
    rollouts = batch()
    seen = tokens_of_passes(rollouts)
    prompts, inputs = 4 * 7, int((rollouts.mask.sum(1) - 1).clamp(min=0).sum())
    assert seen[0] == prompts
    assert inputs <= sum(seen[1:]) <= inputs + packing.CPU_PADDING


def test_attention_takes_keys_without_copies_for_each_query_head(monkeypatch):
    """4 query heads share 2 of keys; where responses go on from prompts there is a mask."""
    heads, attend = [], torch.nn.functional.scaled_dot_product_attention

    def recorded(query, key, value, *args, **kwargs):
        heads.append((query.shape[1], key.shape[1], value.shape[1]))
        return attend(query, key, value, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    monkeypatch.setenv(packing.GROUPED, "0")
    model = MODELS["llama, grouped queries"]()
    for states_of in (packing.packed_states, flat.flat_states):
        heads.clear()
        states_of(model.get_decoder(), batch())
        assert set(heads) == {(4, 2, 2)}
    assert os.environ[packing.GROUPED] == "0"
    monkeypatch.delenv(packing.GROUPED)
    packing.packed_states(model.get_decoder(), batch())
    assert packing.GROUPED not in os.environ


@pytest.mark.parametrize("filler", [0, 98])
@pytest.mark.parametrize("way", ["flat", "packed"])
def test_what_stands_in_padding_does_not_matter(filler, way, monkeypatch):
    if way == "packed":
        monkeypatch.setattr(forward, "attends_plainly", lambda model: False)
    model = TinyPolicy().load().model
    a, b = (response_logp(model, r, 1.0, True) for r in (batch(), batch(filler=filler)))
    assert torch.equal(a.logp, b.logp)
    assert torch.equal(a.entropy, b.entropy)


@pytest.mark.parametrize("name", ["mistral, window shorter than prompts", "gpt2, learned positions"])
def test_attention_that_turns_out_not_to_be_plain_takes_the_packed_way(name, monkeypatch):
    monkeypatch.setattr(forward, "attends_plainly", lambda model: True)
    model = MODELS[name]()
    before = model.config._attn_implementation
    assert packs(model)
    assert (model in forward._FLAT) == name.startswith("gpt2")
    assert model.config._attn_implementation == before


def test_attention_that_does_not_ask_is_noticed(monkeypatch):
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    model, rollouts = exact(built("Llama").double()), batch()
    monkeypatch.setitem(AttentionInterface._global_mapping, flat.NAME, sdpa_attention_forward)
    values = response_logp(model, rollouts, 1.0)
    assert packs(model)
    assert model not in forward._FLAT
    torch.testing.assert_close(values.logp, _plain(model, rollouts, 1.0, False).logp, rtol=0, atol=1e-9)


def test_a_policy_equals_itself_to_the_bit_with_gradients_and_without():
    model, rollouts, seen = TinyPolicy().load().model, batch(), torch.zeros(9, 10)
    part = torch.arange(9)

    def loss_of(values, rows):
        seen[rows] = values.logp.detach()
        return values.logp.sum()

    response_loss(model, rollouts, 1.0, loss_of)
    assert torch.equal(seen, batch_logp(model, rollouts, 1.0, [part]).logp)


@pytest.mark.parametrize("name", ["qwen3", "llama, grouped queries", "qwen2, biases"])
def test_under_autocast_the_flat_way_is_as_near_as_the_packed_one(name, monkeypatch):
    model, rollouts = MODELS[name](), batch()
    wanted = _plain(model, rollouts, 1.0, False).logp
    gaps = []
    for takes in (True, False):
        monkeypatch.setattr(forward, "attends_plainly", lambda model, takes=takes: takes)
        forward._PACKS.pop(model, None)
        forward._FLAT.discard(model)
        assert packs(model)
        with torch.autocast("cpu", torch.bfloat16):
            loss = response_loss(model, rollouts, 1.0, lambda v, rows: v.logp.sum())
            values = response_logp(model, rollouts, 1.0).logp
        loss.backward()
        gaps.append(float((values - wanted).abs().mean()))
    assert 0 < gaps[0] < 1.5 * gaps[1]


def soft_capped():
    """Logits as small as those of random weights, under a cap so high that it hardly changes them."""
    model = TinyPolicy().load().model
    whole = model.forward

    def forward(**inputs):
        output = whole(**inputs)
        output.logits = 30 * torch.tanh(output.logits / 30)
        return output

    model.forward = forward
    return model


@pytest.mark.parametrize(
    "made",
    [soft_capped, lambda: built("Cohere", logit_scale=0.5), lambda: built("Granite", logits_scaling=2.0)],
    ids=["soft cap", "scaled down", "divided"],
)
def test_models_with_other_heads_take_the_plain_way(made):
    model, rollouts = made().double(), batch()
    with pytest.warns(UserWarning, match="plain way"):
        assert not packs(model)
    values, plain = response_logp(model, rollouts, 1.0, True), _plain(model, rollouts, 1.0, True)
    assert torch.equal(values.logp, plain.logp)
    loss = response_loss(model, rollouts, 1.0, lambda v, rows: v.logp[rows.argsort()].sum())
    assert torch.equal(loss, plain.logp.sum())
    assert [len(part) for part in micro_batches(model, rollouts, torch.arange(9), 4)] == [4, 4, 1]


@pytest.mark.parametrize(("made", "packed"), [(lambda: TinyPolicy().load().model, True), (soft_capped, False)])
def test_states_near_the_end_of_float16_are_compared_within_it(made, packed):
    model = made().half()
    with torch.no_grad():
        model.model.norm.weight.fill_(40)
    rollouts = batch()
    assert _plain(model, rollouts, 1.0, False).logp.isfinite().all()
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        assert packs(model) == packed


def test_a_changed_output_layer_takes_the_plain_way():
    class Shifted(torch.nn.Linear):
        pass

    model = TinyPolicy().load().model
    model.lm_head = Shifted(32, 99, bias=False)
    with pytest.warns(UserWarning, match="not a plain linear layer"):
        assert not packs(model)


def test_a_bias_of_the_output_layer_counts():
    model = exact(TinyPolicy(dtype="float64").load().model)
    model.lm_head = torch.nn.Linear(32, 99, bias=True, dtype=torch.float64)
    assert packs(model)
    rollouts = batch()
    wanted = gradients(model, _plain(model, rollouts, 1.0, False).logp.sum())
    assert distance(gradients(model, response_logp(model, rollouts, 1.0).logp.sum()), wanted) < 1e-10
    assert wanted["lm_head.bias"].any()


def test_distinct_prompts_are_runs_of_equal_rows():
    rollouts = batch()
    first, run = distinct_prompts(rollouts)
    assert first.tolist() == [0, 3, 5, 6]
    assert run.tolist() == [number for number, _, _ in ROWS]
    shuffled = rollouts.rows(torch.tensor([0, 3, 1]))
    assert distinct_prompts(shuffled)[1].tolist() == [0, 1, 2]
    dressed = replace(rollouts, prompt_ids=rollouts.prompt_ids.masked_fill(~rollouts.prompt_mask, 50) + 0)
    dressed.prompt_ids[1, 0] = 7  # padding
    assert distinct_prompts(dressed)[1].tolist() == run.tolist()


@pytest.mark.parametrize("size", [1, 2, 3, 5, 9])
def test_parts_hold_each_row_once_within_the_budget(size):
    rollouts = batch()
    prompt, response = rollouts.prompt_mask.sum(1), rollouts.mask.sum(1)
    own = (COPIED * prompt).ceil().long() + response
    rows = torch.tensor([0, 1, 2, 3, 5, 6, 7, 8])
    parts = parts_of(rollouts, rows, size)
    assert sorted(torch.cat(parts).tolist()) == rows.tolist()
    for part in parts:
        shared = {ROWS[row][0]: ROWS[row][1] for row in part.tolist()}
        taken = sum(shared.values()) + int(own[part].sum())
        assert taken <= size * int((prompt + own)[rows].max())
    if size > 1:
        homes = [{ROWS[row][0] for row in part.tolist()} for part in parts]
        assert sum(map(len, homes)) == 4, "rows that share a prompt stay together"


def test_rows_of_different_prompts_fill_a_part_to_its_size():
    rollouts = batch().rows(torch.tensor([0, 3, 6, 0, 3, 6]))
    alike = replace(rollouts, mask=torch.ones_like(rollouts.mask), prompt_mask=torch.ones_like(rollouts.prompt_mask))
    assert [len(part) for part in parts_of(alike, torch.arange(6), 3)] == [3, 3]


@pytest.mark.parametrize(
    ("lengths", "cut"),
    [([9, 9, 9], [3]), ([100, 90, 40, 40, 39], [2, 3]), ([300, 1], [1, 1]), ([5], [1]), ([0, 0], [2])],
)
def test_passes_hold_rows_of_like_length(lengths, cut):
    parts = list(passes(lengths, packing.CPU_PADDING))
    assert [part.stop - part.start for part in parts] == cut
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(len(lengths)))


def test_a_flat_pass_leaves_nothing_for_the_garbage_collector(monkeypatch):
    gone, init = [], flat.Layout.__init__

    def watched(layout, *args):
        init(layout, *args)
        gone.append(weakref.ref(layout))

    monkeypatch.setattr(flat.Layout, "__init__", watched)
    model = TinyPolicy().load().model
    packs(model)
    gc.disable()
    try:
        loss_of(model, batch()).backward()
        assert gone
        assert all(layout() is None for layout in gone)
    finally:
        gc.enable()


def loss_of(model, rollouts):
    return response_loss(model, rollouts, 1.0, lambda values, rows: values.logp.sum())


def test_in_one_pass_no_gradient_waits_for_those_of_other_layers():
    model = built("Llama", tie_word_embeddings=False, num_hidden_layers=8)
    layers = sum(p.nbytes for p in model.model.layers.parameters())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with LiveBytes() as live:
        loss = loss_of(model, batch())
        before = live.peak = live.now
        loss.backward()
    assert live.peak - before < 0.3 * layers


@pytest.mark.parametrize("way", ["flat", "packed"])
def test_what_is_trained_is_reached_and_nothing_else(way, monkeypatch):
    monkeypatch.setattr(packing, "CPU_PADDING", 3)
    if way == "packed":
        monkeypatch.setattr(forward, "attends_plainly", lambda model: False)
    model = exact(built("Llama", tie_word_embeddings=False).double())
    everything = gradients(model, loss_of(model, batch()))
    for trained in (["lm_head"], ["layers.1.mlp"], ["layers.0.self_attn.q_proj", "lm_head"]):
        for name, p in model.named_parameters():
            p.requires_grad_(any(part in name for part in trained))
        wanted = {name: everything[name] for name, p in model.named_parameters() if p.requires_grad}
        assert distance(gradients(model, loss_of(model, batch())), wanted) < 1e-10
