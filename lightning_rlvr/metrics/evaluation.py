"""What validation and test report: correctness over problems, and how the responses were."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from lightning_rlvr.metrics.pass_at_k import AvgAtK, PassAtK
from lightning_rlvr.types import Rollouts, Status, Verdict


class EvaluationMetrics(nn.Module):
    """avg@n and unbiased pass@k over problems, mean token entropy (nats), length, truncated and unparsable shares.

    Args:
        pass_at: the k of each pass@k; no more than the samples of a problem.
    """

    def __init__(self, pass_at: Sequence[int]) -> None:
        super().__init__()
        self.avg = AvgAtK()
        self.passes = nn.ModuleList(PassAtK(k) for k in pass_at)
        self.entropy = MeanMetric(nan_strategy="disable")
        self.response_length = MeanMetric()
        self.truncated = MeanMetric()
        self.unparsable = MeanMetric()
        self.samples = 0

    def update(self, rollouts: Rollouts, verdicts: Sequence[Verdict], samples: int) -> None:
        """Add the responses to some problems, `samples` a problem, prompt-major."""
        self.samples = samples
        correct = torch.tensor([v.correct for v in verdicts]).view(-1, samples).to(rollouts.mask.device)
        self.avg.update(correct)
        for metric in self._passes():
            metric.update(correct)
        lengths = rollouts.mask.sum(dim=1)
        self.entropy.update(rollouts.entropy.sum() / lengths.sum(), weight=lengths.sum())
        self.response_length.update(lengths.float())
        self.truncated.update(rollouts.truncated.float())
        self.unparsable.update(torch.tensor([float(v.status is Status.UNPARSABLE) for v in verdicts]))

    def compute(self) -> dict[str, Tensor]:
        """Return all values by name, over all ranks; an entropy that the engine does not tell is nan."""
        means = ("entropy", "response_length", "truncated", "unparsable")
        return {
            f"avg@{self.samples}": self.avg.compute(),
            **{f"pass@{metric.k}": metric.compute() for metric in self._passes()},
            **{name: getattr(self, name).compute() for name in means},
        }

    def reset(self) -> None:
        """Forget all problems."""
        for metric in self.modules():
            if isinstance(metric, Metric):
                metric.reset()

    def _passes(self) -> list[PassAtK]:
        return [metric for metric in self.passes if isinstance(metric, PassAtK)]
