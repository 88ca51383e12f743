"""Callbacks: one concern each."""

from lightning_rlvr.training.callbacks.adaptive_order import AdaptiveOrder
from lightning_rlvr.training.callbacks.checkpoints import RunCheckpoints
from lightning_rlvr.training.callbacks.entropy_alarm import EntropyAlarm
from lightning_rlvr.training.callbacks.evaluate_ends import EvaluateEnds
from lightning_rlvr.training.callbacks.export import ExportPolicy
from lightning_rlvr.training.callbacks.inert import InertTerms
from lightning_rlvr.training.callbacks.ledger import TokenLedger
from lightning_rlvr.training.callbacks.order_log import OrderLog
from lightning_rlvr.training.callbacks.predictions import PredictionWriter
from lightning_rlvr.training.callbacks.run_folder import RunFolder
from lightning_rlvr.training.callbacks.sample_table import SampleTable
from lightning_rlvr.training.callbacks.save_rollouts import SaveRollouts
from lightning_rlvr.training.callbacks.stage_boundary import StageBoundary
from lightning_rlvr.training.callbacks.summary import RunSummary

__all__ = [
    "AdaptiveOrder",
    "EntropyAlarm",
    "EvaluateEnds",
    "ExportPolicy",
    "InertTerms",
    "OrderLog",
    "PredictionWriter",
    "RunCheckpoints",
    "RunFolder",
    "RunSummary",
    "SampleTable",
    "SaveRollouts",
    "StageBoundary",
    "TokenLedger",
]
