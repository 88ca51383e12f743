"""The two decoders: several model families, responses that join and leave, and what is left behind."""

from collections import Counter

import pytest
import torch
from attention import attended
from decoding import ENDS, OTHERS, PROMPTS, SAMPLING, SEEDS, SHARED, build, generate
from hypothesis import given
from hypothesis import strategies as st

from lightning_rlvr.rollout import decode_attention, decoder, transformers_engine
from lightning_rlvr.rollout import shared_prefix as shared
from lightning_rlvr.rollout.sampling import draw, uniforms
from lightning_rlvr.types import Sampling, UserError

FAMILIES = [(name, "shared") for name in SHARED] + [(name, "other") for name in OTHERS]


@pytest.fixture(autouse=True)
def few_columns(monkeypatch):
    """Lets responses outgrow the columns that they have at first."""
    monkeypatch.setattr(shared, "COLUMNS", 3)


@pytest.fixture(scope="module")
def llama():
    return build("llama")


class Eager:
    """Stands for CUDA graphs: the same sizes and tensors, with each step computed anew."""

    def __init__(self):
        self.rows, self.cleared = [], 0

    def run(self, rows, compute):
        self.rows.append(rows)
        compute()

    def clear(self):
        self.cleared += 1


@pytest.fixture
def graphs(monkeypatch):
    """The way of a GPU through the model's own layers, with a loop for its kernel."""
    eager = Eager()
    monkeypatch.setattr(shared.Graphs, "of", lambda model: eager)
    monkeypatch.setattr(shared, "available", lambda dtype, device: True)
    monkeypatch.setattr(decode_attention, "attend", attended)
    return eager


@torch.no_grad()
def plain(model, samples=3, sampling=SAMPLING, prompts=PROMPTS, seeds=SEEDS, ends=ENDS):
    """Each response by itself: no batch, no padding, no cache."""
    for prompt, seed in zip(prompts, seeds, strict=True):
        for random in uniforms(seed, samples, sampling.max_new_tokens):
            ids, values = list(prompt), []
            for u in random:
                drawn = draw(model(input_ids=torch.tensor([ids]), use_cache=False).logits[:, -1], u[None], sampling)
                ids.append(int(drawn.token))
                values.append((float(drawn.logp), float(drawn.entropy)))
                if ids[-1] in ends:
                    break
            yield ids[len(prompt) :], torch.tensor(values, dtype=torch.float64).T


def assert_equal_to_plain(got, expected):
    expected = list(expected)
    assert [ids[mask].tolist() for ids, mask in zip(got.response_ids, got.mask, strict=True)] == [
        e[0] for e in expected
    ]
    for i, (ids, (logp, entropy)) in enumerate(expected):
        torch.testing.assert_close(got.logp[i, : len(ids)], logp, rtol=0, atol=1e-10)
        torch.testing.assert_close(got.entropy[i, : len(ids)], entropy, rtol=0, atol=1e-10)
        assert bool(got.truncated[i]) == (ids[-1] not in ENDS)
    assert len({len(ids) for ids, _ in expected}) > 3  # otherwise little was tested


class Calls:
    """Records rows and width of each pass of the model, and the decoders that made them."""

    def __init__(self, model, monkeypatch):
        self.shapes, self.decoders = [], Counter()
        self.handle = model.register_forward_pre_hook(self._forward, with_kwargs=True)
        for kind in (shared.SharedPrefixDecoder, decoder.DynamicDecoder):
            monkeypatch.setattr(kind, "step", self._step(kind, kind.step))

    def _forward(self, model, args, kwargs):
        self.shapes.append(tuple(kwargs["input_ids"].shape))

    def _step(self, kind, step):
        def counted(decoder, token):
            logits = step(decoder, token)
            self.decoders[kind] += 1
            return logits

        return counted


# --- families --------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_rows", [256, 7])
@pytest.mark.parametrize(("name", "kind"), FAMILIES)
def test_equals_a_plain_loop(name, kind, max_rows, monkeypatch):
    model = build(name, kind)
    calls = Calls(model, monkeypatch)
    got = generate(model, max_rows=max_rows)
    calls.handle.remove()
    assert_equal_to_plain(got, plain(model))
    assert set(calls.decoders) == {shared.SharedPrefixDecoder if kind == "shared" else decoder.DynamicDecoder}


@pytest.mark.parametrize("max_rows", [256, 7])
@pytest.mark.parametrize("name", SHARED)
def test_graphs_give_the_same(name, max_rows, graphs):
    model = build(name)
    assert_equal_to_plain(generate(model, max_rows=max_rows), plain(model))
    assert set(graphs.rows) <= ({18, 16, 8, 4, 2, 1} if max_rows == 256 else {6, 4, 2, 1})
    assert len(graphs.rows) > len(set(graphs.rows)) > 2


def test_a_graph_has_room_for_what_joins(llama, graphs):
    prompts, seeds = PROMPTS * 6, list(range(36))
    got = generate(llama, 2, prompts=prompts, seeds=seeds, max_rows=12)
    assert_equal_to_plain(got, plain(llama, 2, prompts=prompts, seeds=seeds))
    assert len(graphs.rows) > 2 * SAMPLING.max_new_tokens, "the ring of columns went round"
    assert graphs.cleared > 1, "more prompts than at first were at work"


def test_a_step_that_cannot_be_a_graph_is_done_without(llama, graphs, monkeypatch):
    def run(rows, compute):
        compute()
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(graphs, "run", run)
    with pytest.warns(UserWarning, match="LlamaForCausalLM is sampled without CUDA graphs.*capturing$"):
        got = generate(llama)
    assert_equal_to_plain(got, plain(llama))


def test_attention_that_turns_out_not_to_be_plain_is_left_to_the_model(monkeypatch):
    monkeypatch.setattr(transformers_engine, "attends_plainly", lambda model: True)
    for name in OTHERS:
        model = build(name, "other")
        implementation = model.config._attn_implementation
        assert_equal_to_plain(generate(model), plain(model))
        assert model.config._attn_implementation == implementation


def test_attention_that_does_not_ask_is_noticed(llama, monkeypatch):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def deaf(*args, **kwargs):  # as a layer would that calls a kernel of its own
        return sdpa_attention_forward(*args, **kwargs)

    monkeypatch.setitem(shared.AttentionInterface._global_mapping, shared.NAME, deaf)
    assert_equal_to_plain(generate(llama), plain(llama))


@pytest.mark.parametrize("max_rows", [256, 7])
def test_states_follow_their_rows(max_rows):
    model = build("lfm2", "states")
    assert_equal_to_plain(generate(model, max_rows=max_rows), plain(model))


def test_states_beside_keys_in_one_layer_follow_their_rows():
    from lightning_rlvr.models.forward import response_logp

    model, short = build("falcon_h1", "states", torch.float32), Sampling(max_new_tokens=4)
    got = generate(model, 2, short, PROMPTS[:2], SEEDS[:2])
    assert not got.mask.all()
    torch.testing.assert_close(got.logp, response_logp(model, got, 1.0).logp.detach(), rtol=0, atol=1e-5)


def test_states_that_do_not_follow_their_rows_are_refused():
    model = build("recurrent_gemma", "states", torch.float32)
    with pytest.raises(UserError, match=r"RecurrentGemmaForCausalLM log-probabilities differ by .* Set model\.policy"):
        generate(model)


def test_attention_of_a_models_own_agrees_in_float32(monkeypatch):
    got = generate(build("llama", dtype=torch.float32))
    model = build("llama", dtype=torch.float32, attention="eager")
    calls = Calls(model, monkeypatch)
    expected = generate(model)
    assert set(calls.decoders) == {decoder.DynamicDecoder}
    assert torch.equal(got.response_ids, expected.response_ids)
    torch.testing.assert_close(got.logp, expected.logp, rtol=0, atol=1e-4)
    assert got.logp.dtype == torch.float32


def test_half_precision_is_met_by_the_training_pass():
    from lightning_rlvr.models.forward import response_logp

    model = build("llama", dtype=torch.bfloat16)
    got = generate(model)
    again = response_logp(model, got, 1.0).logp.detach()
    assert got.logp.dtype == torch.float32
    assert float((got.logp - again)[got.mask].abs().mean()) < 0.1


# --- joining and leaving ---------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("prompts", [PROMPTS * 4, [[12 + i, 5] for i in range(24)]], ids=["unequal", "equal"])
def test_waiting_prompts_take_the_places_of_ended_rows(llama, monkeypatch, samples, prompts):
    seeds = list(range(24))
    calls = Calls(llama, monkeypatch)
    got = generate(llama, samples, prompts=prompts, seeds=seeds, max_rows=3 * samples)
    calls.handle.remove()
    assert_equal_to_plain(got, plain(llama, samples, prompts=prompts, seeds=seeds))
    reads = [i for i, (_, width) in enumerate(calls.shapes) if width > 1 or i == 0]
    assert calls.shapes[reads[0]] == (3, max(map(len, prompts)))
    widths = [calls.shapes[i][1] for i in reads]
    assert widths == sorted(widths, reverse=True)  # longest first, and no wider than they are
    assert max(rows for rows, _ in calls.shapes) <= 3 * samples
    steps = [rows for rows, width in calls.shapes if width == 1][: reads[-1] - len(reads) + 1]
    assert sum(steps) > 0.6 * (3 * samples) * len(steps)  # places do not stay empty while prompts wait
    assert len(steps) > 2 * SAMPLING.max_new_tokens  # the ring of columns went round


def test_groups_that_shrink_do_not_keep_others_waiting_for_room(llama, monkeypatch):
    """Groups of which a row or two still run hold few rows, so more of them than max_rows / samples are at work."""
    most = 0
    append = shared.Layout.append

    def watched(layout, *args):
        nonlocal most
        append(layout, *args)
        most = max(most, len(layout.length))

    monkeypatch.setattr(shared.Layout, "append", watched)
    prompts, seeds = PROMPTS * 3, list(range(18))
    got = generate(llama, 4, prompts=prompts, seeds=seeds, max_rows=8)
    assert_equal_to_plain(got, plain(llama, 4, prompts=prompts, seeds=seeds))
    assert most > 2


def test_ended_rows_are_not_passed_through_the_model(llama, monkeypatch):
    calls = Calls(llama, monkeypatch)
    got = generate(llama)
    calls.handle.remove()
    lengths = got.mask.sum(dim=1)
    expected = [int((lengths > t).sum()) for t in range(1, int(lengths.max()))]
    assert [rows for rows, _ in calls.shapes[1:]] == expected


@given(st.lists(st.booleans(), max_size=12))
def test_filling_moves_no_more_than_it_must(alive):
    filling = shared.Filling(alive)
    kept = [i for i, lives in enumerate(alive) if lives]
    assert sorted(filling.order) == kept
    assert all(place == old or old >= len(kept) for place, old in enumerate(filling.order))
    values = torch.arange(len(alive))
    filling.apply(values)
    assert values[: len(kept)].tolist() == filling.order


# --- what is left behind ---------------------------------------------------------------------------


def snapshot(model):
    state = {name: value.clone() for name, value in (*model.named_parameters(), *model.named_buffers())}
    return state, [set(vars(m)) for m in model.modules()], model.config.to_dict(), model.config._attn_implementation


@pytest.mark.parametrize("fail_at", [None, 1, 3])
def test_nothing_stays_on_the_model(fail_at):
    model = build("qwen3")
    before, passes = snapshot(model), 0

    def fail(*_):
        nonlocal passes
        passes += 1
        if passes - 1 == fail_at:
            raise RuntimeError("out of memory")

    handle = model.model.norm.register_forward_pre_hook(fail)
    if fail_at is None:
        generate(model)
    else:
        with pytest.raises(RuntimeError, match="out of memory"):
            generate(model)
    handle.remove()
    after = snapshot(model)
    assert before[1:] == after[1:]
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert not any(x.is_inference() for x in (*model.parameters(), *model.buffers()))


def test_what_is_returned_can_take_part_in_training(llama):
    from dataclasses import fields

    from lightning_rlvr.models.forward import response_logp

    got = generate(llama, max_rows=6)
    assert not any(getattr(got, f.name).is_inference() for f in fields(got))
    loss = (response_logp(llama, got, 1.0).logp * got.entropy - got.logp).sum()
    assert torch.autograd.grad(loss, llama.lm_head.weight)[0].abs().sum() > 0


def test_under_autocast_weights_are_rounded_once_and_the_result_is_the_same(monkeypatch):
    from contextlib import nullcontext

    from lightning_rlvr.rollout import linear

    model = build("llama", dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        got = generate(model)
        monkeypatch.setattr(linear, "PreparedOnce", lambda *args: nullcontext())
        monkeypatch.setattr(shared, "_as_multiplied", lambda states: states)
        expected = generate(model)
    assert torch.equal(got.response_ids, expected.response_ids)
    assert torch.equal(got.logp, expected.logp)
    assert torch.equal(got.entropy, expected.entropy)


def test_rounded_weights_are_those_of_the_rollout():
    model = build("llama", dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        generate(model)
        with torch.no_grad():
            model.lm_head.weight.neg_()
        got = generate(model, sampling=Sampling(max_new_tokens=12, temperature=0.0))
        fresh = build("llama", dtype=torch.float32)
        with torch.no_grad():
            fresh.lm_head.weight.neg_()
        assert torch.equal(got.response_ids, generate(fresh, sampling=Sampling(12, 0.0)).response_ids)


def test_sampling_under_autocast_leaves_no_cast_weights_without_gradient():
    from lightning_rlvr.models.forward import response_logp

    model = build("llama", dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = generate(model)
        response_logp(model, got, 1.0).logp.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
