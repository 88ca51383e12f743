"""Callbacks: one concern each."""

from lightning_rlvr.training.callbacks.evaluate_ends import EvaluateEnds
from lightning_rlvr.training.callbacks.export import ExportPolicy
from lightning_rlvr.training.callbacks.inert import InertTerms
from lightning_rlvr.training.callbacks.keep_last import KeepLastCheckpoint
from lightning_rlvr.training.callbacks.ledger import TokenLedger
from lightning_rlvr.training.callbacks.predictions import PredictionWriter
from lightning_rlvr.training.callbacks.sample_table import SampleTable
from lightning_rlvr.training.callbacks.save_rollouts import SaveRollouts
from lightning_rlvr.training.callbacks.summary import RunSummary

__all__ = [
    "EvaluateEnds",
    "ExportPolicy",
    "InertTerms",
    "KeepLastCheckpoint",
    "PredictionWriter",
    "RunSummary",
    "SampleTable",
    "SaveRollouts",
    "TokenLedger",
]
