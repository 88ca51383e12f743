"""What validation reports."""

import math
import warnings

import torch

from lightning_rlvr.metrics import EvaluationMetrics
from lightning_rlvr.types import Rollouts, Status, Verdict


def test_an_entropy_that_is_not_told_is_nan_without_a_warning():
    mask, tokens = torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.long)
    values = torch.zeros(2, 3)
    rollouts = Rollouts(tokens, mask, tokens, mask, values, values.fill_(math.nan), torch.zeros(2, dtype=torch.bool))
    metrics = EvaluationMetrics([1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics.update(rollouts, [Verdict(1.0, Status.CORRECT), Verdict(0.0, Status.WRONG)], samples=2)
        found = metrics.compute()
    assert math.isnan(found["entropy"])
    assert found["avg@2"] == 0.5
    assert found["response_length"] == 3
