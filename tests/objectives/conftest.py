"""Random rollout batches with ties in every statistic, shared as fixtures: tests draw from them."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import strategies as st

from lightning_rlvr.types import TokenBatch, TokenPlan, TokenStats


@st.composite
def _batches(draw):
    """Draw a batch whose numbers come from few distinct ones: ties in entropy and covariance are the rule."""
    n, width = draw(st.integers(1, 5)), draw(st.integers(1, 4))

    def grid(*values):
        drawn = draw(st.binary(min_size=n * width, max_size=n * width))  # one draw: much faster than one for each
        return torch.tensor([values[byte % len(values)] for byte in drawn], dtype=torch.float64).view(n, width)

    def column(strategy, **kwargs):
        return torch.tensor(draw(st.lists(strategy, min_size=n, max_size=n, **kwargs)))

    mask = grid(0.0, 1.0, 1.0, 1.0) > 0
    old_logp = grid(-0.3, -1.1, -2.0)
    stats = TokenStats(
        logp=old_logp,
        entropy=grid(0.2, 0.7, 1.3),
        advantage=column(st.sampled_from([-1.0, 0.0, 0.7])).double(),
        mask=mask,
        row_id=column(st.integers(-99, 99), unique=True),
        update=column(st.sampled_from([0, 1, 5])),
        state={"entropy_coef": 0.3},
    )
    return SimpleNamespace(
        stats=stats,
        tokens=TokenBatch(
            logp=old_logp + grid(-0.5, -0.1, 0.0, 0.1, 0.5),
            old_logp=old_logp,
            mask=mask,
            ref_logp=old_logp + grid(-1.0, 0.0, 0.4),
            entropy=grid(0.1, 0.6, 1.2),
            full_kl=grid(0.0, 0.05, 0.9),
        ),
    )


@pytest.fixture(scope="session")
def batches():
    return _batches()


def _map(value, change):
    """Apply `change` to every tensor of a TokenStats, TokenBatch or TokenPlan."""

    def walk(item):
        if isinstance(item, dict):
            return {key: walk(x) for key, x in item.items()}
        return change(item) if isinstance(item, torch.Tensor) else item

    return replace(value, **{key: walk(item) for key, item in vars(value).items()})


@pytest.fixture(scope="session")
def rows():
    return lambda value, index: _map(value, lambda x: x[index])


@pytest.fixture(scope="session")
def pad():
    """Add columns that do not count and hold `junk`."""

    def pad(value, columns, junk=0.0):
        def widen(x):
            if x.dim() == 1:
                return x
            new = torch.full((len(x), columns), False if x.dtype == torch.bool else junk, dtype=x.dtype)
            return torch.cat([x, new], dim=1)

        return _map(value, widen)

    return pad


@pytest.fixture(scope="session")
def evaluate():
    """Return loss, gradients and metrics of an objective on a batch, under a plan or its own.

    `gradient` is that in logp; `gradients` has those in entropy and full_kl too, 0 where the loss does not read them.
    """

    def evaluate(objective, batch, plan=None):
        values = {name: getattr(batch.tokens, name) for name in ("logp", "entropy", "full_kl")}
        leaves = {name: x.detach().clone().requires_grad_() for name, x in values.items() if x is not None}
        plan = objective.plan(batch.stats) if plan is None else plan
        out = objective.loss(replace(batch.tokens, **leaves), plan)
        slopes = torch.autograd.grad(out.loss, tuple(leaves.values()), allow_unused=True, materialize_grads=True)
        gradients = dict(zip(leaves, slopes, strict=True))
        return SimpleNamespace(
            loss=out.loss.detach(),
            gradient=gradients["logp"],
            gradients=gradients,
            metrics=out.metrics,
            plan=plan,
        )

    return evaluate


@pytest.fixture(scope="session")
def same_plan():
    """Assert that two plans are equal to the bit."""

    def same_plan(a: TokenPlan, b: TokenPlan):
        for name in ("advantage", "weight", "kl_weight", "policy_mask", "drift_weight", "entropy_weight"):
            one, other = getattr(a, name), getattr(b, name)
            assert (one is None) == (other is None), name
            assert one is None or torch.equal(one, other), name
        assert set(a.classes) == set(b.classes)
        for name in a.classes:
            assert torch.equal(a.classes[name], b.classes[name]), name

    return same_plan


@pytest.fixture(scope="session")
def make():
    """Build a one-update batch from rows of numbers: what is not given is 0, and every token counts.

    `entropy` is both what was recorded and what the policy has now.
    """

    def make(logp, old_logp=None, ref_logp=None, advantage=None, entropy=None, mask=None, full_kl=None, state=None):
        logp = torch.tensor(logp, dtype=torch.float64)
        n = len(logp)

        def grid(values):
            return torch.zeros_like(logp) if values is None else torch.tensor(values, dtype=torch.float64)

        old = logp if old_logp is None else grid(old_logp)
        mask = torch.ones_like(logp, dtype=torch.bool) if mask is None else torch.tensor(mask)
        advantage = torch.zeros(n).double() if advantage is None else torch.tensor(advantage, dtype=torch.float64)
        ids = torch.arange(n)
        ref = logp if ref_logp is None else grid(ref_logp)
        return SimpleNamespace(
            stats=TokenStats(old, grid(entropy), advantage, mask, ids, torch.zeros_like(ids), state or {}),
            tokens=TokenBatch(logp, old, mask, ref, entropy=grid(entropy), full_kl=grid(full_kl)),
        )

    return make
