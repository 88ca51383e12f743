import math
import subprocess
import sys

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightning_rlvr.rollout import sampling as sampling_module
from lightning_rlvr.rollout.sampling import draw, seed_of, truncate, uniforms
from lightning_rlvr.types import Sampling, UserError

ROOM = settings(max_examples=60, deadline=None)
LOGIT = st.floats(-8, 8, width=32)
ALL = Sampling(max_new_tokens=1)


def rows(*values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def at(*values):
    return torch.tensor(values, dtype=torch.float64)


# --- seeds and uniforms ----------------------------------------------------------------------------


def test_seeds_tell_their_parts_apart():
    parts = [(), (1,), ("1",), (1, 2), (12,), ("1", "2"), ("12",), ("1, 2",), (2, 1), (1, "rollout", 0, "q")]
    assert len({seed_of(*p) for p in parts}) == len(parts)
    assert all(0 <= seed_of(*p) < 2**63 for p in parts)


def test_seeds_and_uniforms_are_the_same_in_another_process():
    code = (
        "from lightning_rlvr.rollout.sampling import seed_of, uniforms\n"
        "seed = seed_of(1, 'rollout', 0, 'gsm8k/17')\n"
        "print(seed, uniforms(seed, 2, 3).tolist())"
    )
    env = {"PYTHONHASHSEED": "4321", "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    seed = seed_of(1, "rollout", 0, "gsm8k/17")
    assert seed == 1767542403779973692  # what runs were recorded with: a change would make resumed runs differ
    assert done.stdout.strip() == f"{seed} {uniforms(seed, 2, 3).tolist()}"


def test_uniforms_are_uniform_and_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    u = uniforms(3, 100, 200)
    assert torch.equal(torch.get_rng_state(), before)
    assert u.shape == (100, 200)
    assert u.dtype == torch.float64
    assert u.min() >= 0
    assert u.max() < 1
    counts = torch.histc(u, bins=10, min=0, max=1)
    assert float(((counts - 2000) ** 2 / 2000).sum()) < 27.9  # chi-square, 9 degrees, 0.999
    assert len(u.unique()) == u.numel()


# --- draw ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [ALL, Sampling(1, temperature=0.5), Sampling(1, top_k=4), Sampling(1, top_p=0.8)])
def test_evenly_spread_uniforms_give_each_token_its_share(sampling):
    logits = torch.randn(7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
    n = 20_000
    drawn = draw(logits.expand(n, 7), (torch.arange(n, dtype=torch.float64) + 0.5) / n, sampling)
    p = plain_truncate((logits / sampling.temperature).softmax(0).tolist(), sampling.top_k, sampling.top_p)
    counts = torch.bincount(drawn.token, minlength=7)
    assert all(abs(float(c) - n * q) <= 1 for c, q in zip(counts, p, strict=True))
    expected = at(*[math.log(p[t]) for t in drawn.token.tolist()])
    torch.testing.assert_close(drawn.logp, expected, rtol=0, atol=1e-12)


def test_frequencies_follow_the_distribution():
    p = at(0.4, 0.25, 0.15, 0.1, 0.05, 0.04, 0.01)
    n = 50_000
    drawn = draw(p.log().expand(n, 7), uniforms(11, n, 1).squeeze(1), ALL)
    counts = torch.bincount(drawn.token, minlength=7)
    assert float(((counts - n * p) ** 2 / (n * p)).sum()) < 22.5  # chi-square, 6 degrees, 0.999


@ROOM
@given(
    st.lists(st.one_of(st.just(-math.inf), LOGIT), min_size=1, max_size=9).filter(lambda x: max(x) > -math.inf),
    st.one_of(st.sampled_from([0.0, math.nextafter(1, 0), 1 - 2**-24]), st.floats(0, 1, exclude_max=True)),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_draw_inverts_the_cumulative_distribution(logits, u, dtype):
    drawn = draw(rows(logits, dtype=dtype), at(u), ALL)
    token = int(drawn.token)
    p = rows(logits, dtype=dtype)[0].double().softmax(0).tolist()
    assert p[token] > 0
    slack = 1e-6 if dtype == torch.float32 else 1e-11
    assert sum(p[:token]) <= u + slack
    assert u <= sum(p[: token + 1]) + slack
    assert float(drawn.logp) == pytest.approx(math.log(p[token]), abs=1e-5)
    assert float(drawn.entropy) == pytest.approx(-sum(q * math.log(q) for q in p if q > 0), abs=1e-5)


@pytest.mark.parametrize("u", [0.0, 0.5, math.nextafter(1, 0)])
def test_tokens_of_no_probability_at_both_ends_are_never_drawn(u):
    no = -math.inf
    drawn = draw(rows([no, no, 1.0, 2.0, no, no], dtype=torch.float32), at(u), ALL)
    assert int(drawn.token) == (2 if u == 0.0 else 3)
    # a vocabulary as large as a real one, whose probabilities sum to 1 only up to rounding
    logits = torch.randn(1, 50_000, generator=torch.Generator().manual_seed(0))
    logits[:, :100] = logits[:, -100:] = no
    token = int(draw(logits, at(u), ALL).token)
    assert 100 <= token < 49_900
    if u != 0.5:
        assert token in (100, 49_899)


def test_greedy_is_a_point_mass_and_takes_the_first_of_equals():
    drawn = draw(rows([1.0, 3.0, 3.0], [0.0, -1.0, -2.0]), at(0.99, 0.99), Sampling(1, temperature=0.0))
    assert drawn.token.tolist() == [1, 0]
    assert drawn.logp.tolist() == drawn.entropy.tolist() == [0.0, 0.0]


def test_rows_are_drawn_apart():
    g = torch.Generator().manual_seed(5)
    logits, u = torch.randn(6, 11, generator=g, dtype=torch.float64), torch.rand(6, generator=g, dtype=torch.float64)
    sampling = Sampling(1, temperature=0.7, top_k=6, top_p=0.9)
    kept = logits.clone()
    whole = draw(logits, u, sampling)
    assert torch.equal(logits, kept)
    for i in range(6):
        for a, b in zip(draw(logits[i : i + 1], u[i : i + 1], sampling), whole, strict=True):
            torch.testing.assert_close(a, b[i : i + 1], rtol=0, atol=1e-14)


@pytest.mark.parametrize("vocabulary", [255, 256, 257, 900])
def test_vocabularies_of_several_chunks_are_inverted_exactly(vocabulary):
    g = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(5, vocabulary, generator=g, dtype=torch.float64) * 3
    logits[1, 200:700] = -math.inf  # whole chunks without probability
    logits[2, :-1] = -math.inf
    u = torch.rand(5, 400, generator=g, dtype=torch.float64)
    cumulative = logits.softmax(-1).cumsum(-1)
    expected = torch.searchsorted(cumulative / cumulative[:, -1:], u, right=True)
    drawn = draw(logits.repeat_interleave(400, 0), u.flatten(), ALL)
    assert torch.equal(drawn.token.view(5, 400), expected)
    logp = logits.log_softmax(-1)
    torch.testing.assert_close(drawn.logp.view(5, 400), logp.gather(1, expected), rtol=0, atol=1e-12)
    entropy = -(logp.exp() * logp.clamp(min=-1e9)).sum(-1)
    torch.testing.assert_close(drawn.entropy.view(5, 400), entropy[:, None].expand(5, 400), rtol=0, atol=1e-12)


def test_rows_are_worked_on_in_blocks_without_a_difference(monkeypatch):
    logits = torch.randn(7, 300, generator=torch.Generator().manual_seed(4))
    u = uniforms(5, 7, 1).squeeze(1)
    whole = draw(logits, u, ALL)
    monkeypatch.setattr(sampling_module, "BLOCK", 700)
    for a, b in zip(draw(logits, u, ALL), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_half_precision_logits_are_scored_in_float32():
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(2)).bfloat16()
    u = uniforms(1, 4, 1).squeeze(1)
    half, full = draw(logits, u, ALL), draw(logits.float(), u, ALL)
    assert half.logp.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(half, full, strict=True))


# --- top-k and top-p -------------------------------------------------------------------------------


def plain_truncate(p, top_k, top_p):
    order = sorted(range(len(p)), key=lambda v: (-p[v], v))
    if top_k:
        order = order[:top_k]
    total, before, kept = sum(p[v] for v in order), 0.0, []
    for v in order:
        if before >= top_p:
            break
        kept.append(v)
        before += p[v] / total
    mass = sum(p[v] for v in kept)
    return [p[v] / mass if v in kept else 0.0 for v in range(len(p))]


@ROOM
@given(
    st.lists(st.one_of(LOGIT, st.sampled_from([0.0, 1.0])), min_size=1, max_size=8),
    st.integers(0, 9),
    st.sampled_from([0.05, 0.3, 0.61, 0.9, 0.999, 1.0]),
)
def test_truncation_equals_a_plain_loop(logits, top_k, top_p):
    logp = rows(logits).log_softmax(-1)
    # where a sum of probabilities meets top_p but for a rounding, either set is right
    kept_by_k = sorted(plain_truncate(logp[0].exp().tolist(), top_k, 1.0), reverse=True)
    assume(all(abs(sum(kept_by_k[:i]) - top_p) > 1e-9 for i in range(len(logits) + 1)) or top_p == 1.0)
    got = truncate(logp, top_k, top_p)[0].exp()
    torch.testing.assert_close(got, at(*plain_truncate(logp[0].exp().tolist(), top_k, top_p)), rtol=0, atol=1e-12)
    assert float(got.sum()) == pytest.approx(1.0, abs=1e-12)
    assert got[logp[0].argmax()] > 0


def test_ties_leave_exactly_top_k_tokens_in_order_of_id():
    logp = torch.zeros(1, 6, dtype=torch.float64).log_softmax(-1)
    assert truncate(logp, 2, 1.0).exp().tolist()[0] == pytest.approx([0.5, 0.5, 0, 0, 0, 0])


@pytest.mark.parametrize(("top_p", "kept"), [(0.4, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (0.9, 4)])
def test_top_p_keeps_the_smallest_sufficient_set(top_p, kept):
    logp = at(0.125, 0.5, 0.125, 0.25).log()[None]
    got = truncate(logp, 0, top_p)[0]
    assert got.isfinite().tolist() == [kept >= 3, True, kept >= 4, kept >= 2]


def test_top_p_counts_the_mass_left_by_top_k():
    logp = at(0.4, 0.3, 0.2, 0.1).log()[None]  # after top_k 2 the first has 4/7 > 0.5 and stands alone
    assert truncate(logp, 2, 0.5)[0].exp().tolist() == pytest.approx([1.0, 0, 0, 0])
    assert truncate(logp, 0, 0.5)[0].exp().tolist() == pytest.approx([4 / 7, 3 / 7, 0, 0])


def test_nothing_asked_for_changes_nothing():
    logp = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    assert truncate(logp, 0, 1.0) is logp
    assert truncate(logp, 5, 1.0) is logp


# --- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_k", -1),
    ],
)
def test_bad_settings_name_the_key_and_the_value(key, value):
    with pytest.raises(UserError, match=rf"^{key} must be .*, got {value}\. Set sampling\.{key}\.$"):
        Sampling(**{"max_new_tokens": 4, key: value})
