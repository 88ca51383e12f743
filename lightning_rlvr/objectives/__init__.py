"""Objectives and surrogates: each a page of maths, chosen in YAML by class_path."""

from lightning_rlvr.objectives.covariance import ClipCov, KLCov
from lightning_rlvr.objectives.entropy_advantage import EntropyAdvantage
from lightning_rlvr.objectives.entropy_bonus import AdaptiveEntropy, EntropyBonus
from lightning_rlvr.objectives.grpo import CISPO, DAPO, GRPO, GSPO, DrGRPO
from lightning_rlvr.objectives.high_entropy_mask import HighEntropyMask
from lightning_rlvr.objectives.sent import SENT, HighEntropyKL
from lightning_rlvr.objectives.surrogates import Clipped, ClippedWeight, SequenceClipped, Unclipped

__all__ = [
    "CISPO",
    "DAPO",
    "GRPO",
    "GSPO",
    "SENT",
    "AdaptiveEntropy",
    "ClipCov",
    "Clipped",
    "ClippedWeight",
    "DrGRPO",
    "EntropyAdvantage",
    "EntropyBonus",
    "HighEntropyKL",
    "HighEntropyMask",
    "KLCov",
    "SequenceClipped",
    "Unclipped",
]
