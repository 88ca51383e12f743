from dataclasses import fields, replace

import pytest
import torch
from support import TinyPolicy

from lightning_rlvr.models.forward import response_logp
from lightning_rlvr.rollout.sampling import draw, uniforms
from lightning_rlvr.rollout.transformers_engine import TransformersEngine, left_pad
from lightning_rlvr.types import Rollouts, Sampling

PAD, NEVER = 0, 10_000
PROMPTS = [[40, 41, 42], [7], [5, 6, 7, 8, 9, 10, 11], [90, 3, 3, 20]]
SEEDS = [101, 202, 303, 404]
SAMPLING = Sampling(max_new_tokens=12)
ENDS = range(1, 25)  # about every fourth token ends a response, so rows end at different times


def sharp(dtype="float64"):
    """The tiny policy with logits that matter: as it is made, its distributions are nearly uniform."""
    model = TinyPolicy(0, dtype).load().model
    with torch.no_grad():
        model.lm_head.weight.mul_(15)
    return model


@pytest.fixture(scope="module")
def model():
    return sharp()


def engine(model, eos_ids=ENDS, **kwargs):
    return TransformersEngine(model, list(eos_ids), PAD, **kwargs)


def responses(rollouts):
    return [ids[mask].tolist() for ids, mask in zip(rollouts.response_ids, rollouts.mask, strict=True)]


def assert_same(got, expected):
    """The same responses, up to a rounding of what was recorded with them."""
    for field in fields(Rollouts):
        a, b = getattr(got, field.name), getattr(expected, field.name)
        if field.name in ("logp", "entropy"):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-10)
        elif field.name not in ("prompt_ids", "prompt_mask"):
            assert torch.equal(a, b), field.name


class Calls:
    """Records each pass of the model."""

    def __init__(self, model):
        self.rows, self.widths, self.training = [], [], []
        self.handle = model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, model, args, kwargs):
        self.rows.append(kwargs["input_ids"].shape[0])
        self.widths.append(kwargs["input_ids"].shape[1])
        self.training.append(model.training)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.handle.remove()


# --- what is sampled -------------------------------------------------------------------------------


@torch.no_grad()
def plain(model, prompt, seed, samples, sampling, eos_ids):
    """Each response by itself: no batch, no padding, no cache."""
    out = []
    for random in uniforms(seed, samples, sampling.max_new_tokens):
        ids, logp, entropy = list(prompt), [], []
        for u in random:
            drawn = draw(model(input_ids=torch.tensor([ids])).logits[:, -1], u[None], sampling)
            ids.append(int(drawn.token))
            logp.append(float(drawn.logp))
            entropy.append(float(drawn.entropy))
            if ids[-1] in eos_ids:
                break
        out.append((ids[len(prompt) :], logp, entropy))
    return out


@pytest.mark.parametrize(
    "sampling",
    [
        SAMPLING,
        Sampling(max_new_tokens=9, temperature=0.7),
        Sampling(max_new_tokens=6, temperature=1.3, top_k=5, top_p=0.9),
        Sampling(max_new_tokens=1),
        Sampling(max_new_tokens=8, temperature=0.0),
    ],
    ids=str,
)
def test_equals_a_plain_loop(model, sampling):
    got = engine(model).generate(PROMPTS, SEEDS, 3, sampling)
    expected = [
        row
        for prompt, seed in zip(PROMPTS, SEEDS, strict=True)
        for row in plain(model, prompt, seed, 3, sampling, ENDS)
    ]
    assert responses(got) == [ids for ids, _, _ in expected]
    for i, (ids, logp, entropy) in enumerate(expected):
        n = len(ids)
        for values, wanted in ((got.logp, logp), (got.entropy, entropy)):
            torch.testing.assert_close(values[i, :n], torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-10)
        assert bool(got.truncated[i]) == (ids[-1] not in ENDS)
    lengths = {len(ids) for ids, _, _ in expected}
    assert got.mask.shape[1] == max(lengths)
    assert sampling.max_new_tokens == 1 or len(lengths) > 2  # otherwise nothing was tested


def test_greedy_equals_transformers_generate(model):
    free = engine(model, [NEVER]).generate(PROMPTS, SEEDS, 1, Sampling(10, temperature=0.0))
    ids, mask = left_pad(PROMPTS, PAD)
    eos_ids = [int(free.response_ids[0, 3]), int(free.response_ids[2, 5])]
    for eos in ([NEVER], eos_ids):
        got = engine(model, eos).generate(PROMPTS, SEEDS, 1, Sampling(10, temperature=0.0))
        expected = model.generate(
            input_ids=ids,
            attention_mask=mask.long(),
            do_sample=False,
            max_new_tokens=10,
            eos_token_id=eos,
            pad_token_id=PAD,
        )[:, ids.shape[1] :]
        assert torch.equal(got.response_ids, expected)
        assert not got.logp.any()
        assert not got.entropy.any()
    assert got.mask[0].sum() <= 4
    assert len(set(map(len, responses(free)))) == 1


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-4)])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_what_is_recorded_is_met_again_in_the_training_pass(dtype, tolerance, temperature):
    model = sharp(dtype)
    rollouts = engine(model).generate(PROMPTS, SEEDS, 4, replace(SAMPLING, temperature=temperature))
    again = response_logp(model, rollouts, temperature, with_entropy=True)
    for got, expected in ((rollouts.logp, again.logp), (rollouts.entropy, again.entropy)):
        torch.testing.assert_close(got, expected.detach().to(got.dtype), rtol=0, atol=tolerance)
    assert rollouts.mask.any()


def test_layout(model):
    got = engine(model).generate(PROMPTS, SEEDS, 3, SAMPLING)
    ids, mask = left_pad(PROMPTS, PAD)
    assert torch.equal(got.prompt_ids, ids.repeat_interleave(3, dim=0))
    assert torch.equal(got.prompt_mask, mask.repeat_interleave(3, dim=0))
    assert got.mask[:, 0].all()  # each response has a token
    assert not (got.mask[:, 1:] & ~got.mask[:, :-1]).any()  # and no hole
    assert (got.response_ids[~got.mask] == PAD).all()
    assert not got.logp[~got.mask].any()
    assert not got.entropy[~got.mask].any()
    assert (got.logp[got.mask] < 0).all()
    assert not got.logp.requires_grad


def test_the_end_counts_and_nothing_after_it(model):
    got = engine(model).generate(PROMPTS, SEEDS, 8, SAMPLING)
    for ids, truncated in zip(responses(got), got.truncated.tolist(), strict=True):
        assert not set(ids[:-1]) & set(ENDS)
        assert (ids[-1] in ENDS) is not truncated
        assert not truncated or len(ids) == SAMPLING.max_new_tokens
    assert got.truncated.any()
    assert not got.truncated.all()


def test_an_end_at_the_very_last_token_is_no_truncation(model):
    free = engine(model, [NEVER]).generate([PROMPTS[0]], [1], 1, Sampling(max_new_tokens=5))
    assert free.truncated.all()
    last = responses(free)[0][-1]
    assert last not in responses(free)[0][:-1]
    got = engine(model, [last]).generate([PROMPTS[0]], [1], 1, Sampling(max_new_tokens=5))
    assert torch.equal(got.response_ids, free.response_ids)
    assert not got.truncated.any()


def test_any_of_several_ends_will_do(model):
    free = responses(engine(model, [NEVER]).generate(PROMPTS, SEEDS, 4, SAMPLING))
    ends = [free[0][2], free[5][4], free[0][2], NEVER]
    got = responses(engine(model, ends).generate(PROMPTS, SEEDS, 4, SAMPLING))
    for short, long in zip(got, free, strict=True):
        first = next((i for i, token in enumerate(long) if token in ends), len(long) - 1)
        assert short == long[: first + 1]
    assert len(got[0]) <= 3
    assert len(got[5]) <= 5


def test_a_pad_token_is_a_token_like_any_other_in_prompts_and_responses(model):
    prompts = [[PAD, 41, PAD, PAD], [7], [PAD]]
    got = engine(model).generate(prompts, [1, 2, 3], 2, SAMPLING)
    expected = [
        ids for p, s in zip(prompts, [1, 2, 3], strict=True) for ids, _, _ in plain(model, p, s, 2, SAMPLING, ENDS)
    ]
    assert responses(got) == expected
    assert got.prompt_mask.sum(dim=1).tolist() == [4, 4, 1, 1, 1, 1]
    as_end = TransformersEngine(model, [PAD, *ENDS], PAD)  # pad = eos, as where a tokenizer has no pad token
    for ids, whole in zip(responses(as_end.generate(prompts, [1, 2, 3], 2, SAMPLING)), expected, strict=True):
        assert ids == whole[: whole.index(PAD) + 1 if PAD in whole else None]


# --- a response depends on its prompt and seed alone -----------------------------------------------


def test_not_on_the_prompts_beside_it(model):
    whole = engine(model).generate(PROMPTS, SEEDS, 3, SAMPLING)
    for i, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        alone = engine(model).generate([prompt], [seed], 3, SAMPLING)
        assert responses(alone) == responses(whole)[3 * i : 3 * i + 3]


def test_not_on_the_order_of_prompts(model):
    order = [2, 0, 3, 1]
    whole = engine(model).generate(PROMPTS, SEEDS, 3, SAMPLING)
    got = engine(model).generate([PROMPTS[i] for i in order], [SEEDS[i] for i in order], 3, SAMPLING)
    assert_same(got, whole.rows(torch.tensor([3 * i + j for i in order for j in range(3)])))


@pytest.mark.parametrize(("max_rows", "largest"), [(1, 3), (3, 3), (5, 3), (6, 6), (11, 9), (12, 12)])
def test_not_on_max_rows(model, max_rows, largest):
    whole = engine(model).generate(PROMPTS, SEEDS, 3, SAMPLING)
    assert_same(engine(model, max_rows=max_rows).generate(PROMPTS, SEEDS, 3, SAMPLING), whole)
    with Calls(model) as calls:
        engine(model, [NEVER], max_rows=max_rows).generate(PROMPTS, SEEDS, 3, SAMPLING)
    assert max(calls.rows) == largest  # a group is never split


def test_equal_prompts_with_different_seeds_differ_and_with_equal_seeds_agree(model):
    got = responses(engine(model).generate([PROMPTS[0]] * 3, [1, 2, 1], 4, SAMPLING))
    assert got[:4] == got[8:]
    assert got[:4] != got[4:8]
    assert len({tuple(ids) for ids in got[:4]}) > 1  # samples of one prompt have randomness of their own


# --- how the batch is worked off -------------------------------------------------------------------


def test_rows_that_end_leave_the_batch(model):
    with Calls(model) as calls:
        got = engine(model).generate(PROMPTS, SEEDS, 6, SAMPLING)
    lengths = got.mask.sum(dim=1)
    assert calls.rows[0] == len(PROMPTS)  # a prompt is read once
    assert calls.widths == [max(map(len, PROMPTS))] + [1] * (int(lengths.max()) - 1)  # then a token at a time
    assert calls.rows[1:] == sorted(calls.rows[1:], reverse=True)
    assert len(set(calls.rows[1:])) >= 4
    for t, rows in enumerate(calls.rows[1:], start=1):  # this pass makes token t
        alive = int((lengths > t).sum())
        assert alive <= rows
        assert 0.75 * rows <= alive or rows == calls.rows[t - 1]


def test_decoding_stops_when_all_have_ended(model):
    with Calls(model) as calls:
        got = engine(model, range(len(model.lm_head.weight))).generate(PROMPTS, SEEDS, 2, SAMPLING)
    assert got.mask.shape == (8, 1)
    assert len(calls.rows) == 1
    assert not got.truncated.any()


# --- what it leaves behind -------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_samples_in_evaluation_mode_and_restores_the_mode(training):
    model = sharp().train(training)
    with Calls(model) as calls:
        engine(model).generate(PROMPTS[:1], [1], 2, SAMPLING)
    assert not any(calls.training)
    assert model.training is training
    assert all(m.training is training for m in model.modules())


@pytest.mark.parametrize("training", [True, False])
def test_restores_the_mode_after_an_exception(training):
    model = sharp().train(training)

    def broken(*_):
        raise RuntimeError("out of memory")

    handle = model.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        engine(model).generate(PROMPTS[:1], [1], 2, SAMPLING)
    assert all(m.training is training for m in model.modules())
    handle.remove()
    assert engine(model).generate(PROMPTS[:1], [1], 2, SAMPLING).mask.any()


def test_leaves_the_global_generator_and_gradients_alone(model):
    before = torch.get_rng_state()
    first = engine(model).generate(PROMPTS, SEEDS, 2, SAMPLING)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert_same(engine(model).generate(PROMPTS, SEEDS, 2, SAMPLING), first)
    assert torch.is_grad_enabled()
    assert all(p.grad is None for p in model.parameters())
    torch.set_rng_state(before)


# --- errors and padding ----------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [[], [[]], [[1], []]])
def test_prompts_must_not_be_empty(model, prompts):
    with pytest.raises(ValueError, match="at least one prompt, and each prompt at least one token"):
        engine(model).generate(prompts, [1] * len(prompts), 2, SAMPLING)


def test_a_policy_without_an_end_is_refused(model):
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        TransformersEngine(model, [], PAD)


def test_left_pad():
    ids, mask = left_pad([[5], [0, 6, 7], [8, 0]], pad_id=0)
    assert ids.tolist() == [[0, 0, 5], [0, 6, 7], [0, 8, 0]]
    assert mask.tolist() == [[False, False, True], [True, True, True], [False, True, True]]
