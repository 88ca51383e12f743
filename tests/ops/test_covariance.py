import torch

from lightning_rlvr.ops.covariance import token_covariance


def test_computed_in_float64_from_float32():
    # in float32 the sum of these log-probabilities loses the small one
    logp = torch.tensor([-1e8, -1.0, -1e8, -1.0])
    got = token_covariance(logp, torch.tensor([1.0, -1.0, 1.0, -1.0]))
    assert got.dtype == torch.float64
    half = (1e8 - 1.0) / 2
    assert got.tolist() == [-half] * 4


def test_scope_alone_sets_the_means():
    logp = torch.tensor([-1.0, -3.0], dtype=torch.float64)
    advantage = torch.tensor([2.0, 0.0], dtype=torch.float64)
    got = token_covariance(logp, advantage, torch.tensor([False, True]))
    assert got.tolist() == [2.0 * 2.0, 0.0]


def test_passing_the_tokens_as_their_own_scope_changes_nothing():
    logp, advantage = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        token_covariance(logp, advantage), token_covariance(logp, advantage, torch.ones(9, dtype=torch.bool))
    )


def test_equal_advantages_have_no_covariance():
    assert token_covariance(torch.tensor([-1.0, -2.0]), torch.tensor([0.5, 0.5])).tolist() == [0.0, 0.0]


def test_mean_over_the_scope_is_the_population_covariance():
    pairs = torch.randn(2, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.cov(pairs, correction=0)[0, 1]
    torch.testing.assert_close(token_covariance(*pairs).mean(), expected, rtol=1e-12, atol=1e-14)
