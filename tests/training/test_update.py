"""The update: the gradient of every objective as the plain way has it, and rows that are not run."""

from types import SimpleNamespace

import pytest
import torch
from support import Counting, ManyVowels, TinyPolicy

from lightning_rlvr.models.forward import _plain, packs
from lightning_rlvr.objectives import (
    CISPO,
    DAPO,
    GRPO,
    GSPO,
    SENT,
    AdaptiveEntropy,
    ClipCov,
    DrGRPO,
    EntropyAdvantage,
    EntropyBonus,
    HighEntropyKL,
    HighEntropyMask,
    KLCov,
    SequenceClipped,
)
from lightning_rlvr.training import PromptBatch, RLVRModule
from lightning_rlvr.training.parallel import Parallel
from lightning_rlvr.training.update import _backward, _Losses, idle_rows
from lightning_rlvr.types import Sampling, TokenBatch, TokenStats

SETTINGS = {"low_entropy_quantile": 0.6, "high_cov_fraction": 0.2, "beta_low": 0.25, "beta_high": 1.5}
OBJECTIVES = {
    "grpo": GRPO(),
    "grpo_old": GRPO(kl_coef=0.1, kl_to="old", kl_estimator="k2", aggregation="token_mean"),
    "dr_grpo_full": DrGRPO(fixed_length=9, kl_coef=0.3, kl_estimator="full"),
    "dapo": DAPO(),
    "gspo": GSPO(surrogate=SequenceClipped(low=0.05, high=0.08)),
    "cispo": CISPO(),
    "entropy_bonus": EntropyBonus(entropy_coef=0.2),
    "adaptive": AdaptiveEntropy(target=9.0, initial=0.5),
    "entropy_advantage": EntropyAdvantage(),
    "high_entropy_mask": HighEntropyMask(fraction=0.3, kl_coef=0.2),
    "clip_cov": ClipCov(cov_low=0.05, cov_high=2.0, fraction=0.15),
    "kl_cov": KLCov(fraction=0.2, beta=0.5, aggregation="token_mean"),
    "sent": SENT(**SETTINGS),
    "sent_release": SENT(**SETTINGS, variant="release"),
    "high_entropy_kl": HighEntropyKL(**SETTINGS),
}
GROUP, TEMPERATURE = 4, 0.7


@pytest.fixture(scope="module")
def sampled():
    """A policy and a reference that differ, and rollouts whose third question has taught nothing."""
    module = RLVRModule(TinyPolicy(dtype="float64"), GRPO(), ManyVowels(), Sampling(12, temperature=TEMPERATURE))
    module.configure_model()
    rollouts = module.experience(PromptBatch(Counting(12, 5).load(), GROUP), module.sampling, "test").rollouts
    reference = TinyPolicy(seed=1, dtype="float64").load().model
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        own, other = (_plain(model, rollouts, TEMPERATURE, True) for model in (module.policy, reference))
    rows = len(rollouts.mask)
    noise = torch.randn(rollouts.mask.shape, generator=g, dtype=torch.float64) / 5
    stats = TokenStats(
        logp=(own.logp + noise).masked_fill(~rollouts.mask, 0.0),
        entropy=own.entropy,
        advantage=torch.randn(rows, generator=g, dtype=torch.float64).index_fill(0, torch.arange(8, 12), 0.0),
        mask=rollouts.mask,
        row_id=torch.randperm(rows, generator=g),
        update=torch.zeros(rows, dtype=torch.long),
    )
    return SimpleNamespace(policy=module.policy, reference=reference, rollouts=rollouts, stats=stats, other=other.logp)


def gradients(policy, loss=None):
    if loss is not None:
        policy.zero_grad(set_to_none=True)
        loss.backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters()}


def setting(sampled, objective):
    """What `_backward` and `_Losses` read of a module and of a record."""
    plan = objective.plan(TokenStats(**{**vars(sampled.stats), "state": objective.initial_state()}))
    module = SimpleNamespace(
        policy=sampled.policy,
        reference=sampled.reference,
        objective=objective,
        sampling=Sampling(12, temperature=TEMPERATURE),
        manual_backward=lambda loss: loss.backward(),
        trainer=None,
    )
    module.parallel = Parallel(module)
    record = SimpleNamespace(
        experience=SimpleNamespace(rollouts=sampled.rollouts),
        stats=sampled.stats,
        plan=plan,
        ref_logp=sampled.other if objective.needs_reference else None,
    )
    sampled.policy.zero_grad(set_to_none=True)
    return module, record, _Losses(module, record)


def plainly(sampled, objective, record):
    """The loss of all rows at once, by materialised logits."""
    reference = sampled.reference if objective.needs_full_kl else None
    values = _plain(sampled.policy, sampled.rollouts, TEMPERATURE, True, reference)
    entropy = values.entropy if objective.needs_entropy else None
    mask, old = sampled.rollouts.mask, sampled.stats.logp
    tokens = TokenBatch(values.logp, old, mask, record.ref_logp, entropy, values.full_kl)
    return objective.loss(tokens, record.plan)


@pytest.mark.parametrize("size", [1, 3, 48])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradient_and_metrics_equal_those_of_all_rows_at_once(sampled, name, size):
    objective = OBJECTIVES[name]
    assert packs(sampled.policy)
    module, record, losses = setting(sampled, objective)
    losses.on_policy = False
    out = plainly(sampled, objective, record)
    wanted = gradients(sampled.policy, out.loss)
    sampled.policy.zero_grad(set_to_none=True)

    idle = idle_rows(objective, record.plan)
    assert idle[8:12].all() == (name in ("grpo", "dapo", "gspo", "cispo", "clip_cov", "entropy_advantage"))
    _backward(module, losses, (~idle).nonzero().squeeze(-1), size)
    got = gradients(sampled.policy)
    losses.of_idle(idle.nonzero().squeeze(-1))
    for key, gradient in wanted.items():
        torch.testing.assert_close(got[key], gradient, rtol=0, atol=1e-10)
    assert max(float(g.abs().max()) for g in wanted.values()) > 1e-3
    assert float(losses.step["loss"].numerator) == pytest.approx(float(out.loss.detach()), abs=1e-10)
    assert torch.equal(losses.clipped, out.clipped & ~idle[:, None])
    # Of idle rows the ratio is not known; CISPO cuts it without advantage too.
    of_run_rows = ("kl/", "clip_fraction") if name == "cispo" else ("kl/",)
    for key, ratio in out.metrics.items():
        if not (key.startswith(of_run_rows) and idle.any()):
            assert [float(x) for x in losses.step[key]] == pytest.approx([float(x) for x in ratio], abs=1e-9), key


def test_idle_rows_are_those_without_advantage_and_weights(sampled):
    third = torch.arange(48).div(GROUP, rounding_mode="floor") == 2
    for name in ("grpo", "dapo"):
        assert torch.equal(idle_rows(OBJECTIVES[name], setting(sampled, OBJECTIVES[name])[1].plan), third)
    for name in ("grpo_old", "entropy_bonus", "sent"):
        assert not idle_rows(OBJECTIVES[name], setting(sampled, OBJECTIVES[name])[1].plan).any()
    held = idle_rows(OBJECTIVES["kl_cov"], setting(sampled, OBJECTIVES["kl_cov"])[1].plan)
    assert not held[~third].any()


def test_on_policy_the_ratio_is_one_whatever_rounding_recorded(sampled):
    """With recorded log-probabilities |log r| would pull in the direction of their rounding errors."""
    module, _, losses = setting(sampled, OBJECTIVES["kl_cov"])
    _backward(module, losses, torch.arange(48), 5)
    assert float(losses.step["grad_share/drift"].numerator) == 0
    assert float(losses.step["kl/old"].numerator) == 0
    assert float(losses.step["grad_share/policy"].numerator) > 0
    numerator, denominator = losses.step["logp_gap"]
    with torch.no_grad():
        own = _plain(sampled.policy, sampled.rollouts, TEMPERATURE, False).logp
    gap = (sampled.rollouts.logp - own).abs()[sampled.rollouts.mask].sum()
    assert float(numerator) == pytest.approx(float(gap), abs=1e-9)
    assert int(denominator) == int(sampled.rollouts.mask.sum())
