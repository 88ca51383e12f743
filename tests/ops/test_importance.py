import pytest
import torch

from lightning_rlvr.ops.importance import truncated_importance


def test_weights_make_the_mean_of_another_distribution_the_policys_where_none_is_cut():
    """E_mu[w f] = E_pi[f], over all outcomes."""
    mu, pi, f = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.5, 0.3]), torch.tensor([1.0, -2.0, 4.0])
    weight = truncated_importance(pi.log()[None], mu.log()[None], torch.ones(1, 3, dtype=torch.bool), most=10.0)
    torch.testing.assert_close((mu * weight[0] * f).sum(), (pi * f).sum())


def test_the_bound_holds_and_uncounted_positions_are_zero():
    logp, sampled = torch.tensor([[0.0, -1.0, -1000.0, 5.0]]), torch.tensor([[-50.0, -1.0, -1.0, 0.0]])
    mask = torch.tensor([[True, True, True, False]])
    assert truncated_importance(logp, sampled, mask, most=2.0).tolist() == [[2.0, 1.0, 0.0, 0.0]]


def test_a_bound_below_one_is_refused():
    one = torch.zeros(1, 1)
    with pytest.raises(ValueError, match=r"at least 1, got 0\.5"):
        truncated_importance(one, one, one.bool(), most=0.5)
