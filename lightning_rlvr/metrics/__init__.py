"""torchmetrics classes over the functions in ops: sums as state, division in compute."""

from lightning_rlvr.metrics.evaluation import EvaluationMetrics
from lightning_rlvr.metrics.pass_at_k import AvgAtK, MajAtK, PassAtK

__all__ = ["AvgAtK", "EvaluationMetrics", "MajAtK", "PassAtK"]
