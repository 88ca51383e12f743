"""Verifiers: what a response is worth. Importing this loads neither math-verify nor reasoning_gym."""

from lightning_rlvr.rewards.chain import ChainAnswer
from lightning_rlvr.rewards.checked import verdicts_of
from lightning_rlvr.rewards.code_tests import CodeTests
from lightning_rlvr.rewards.exact import ExactMatch
from lightning_rlvr.rewards.format import FormatMatch
from lightning_rlvr.rewards.math import MathAnswer
from lightning_rlvr.rewards.overlong import SoftOverlong
from lightning_rlvr.rewards.reasoning_gym import ReasoningGymScore
from lightning_rlvr.rewards.weighted import Part, WeightedSum

__all__ = [
    "ChainAnswer",
    "CodeTests",
    "ExactMatch",
    "FormatMatch",
    "MathAnswer",
    "Part",
    "ReasoningGymScore",
    "SoftOverlong",
    "WeightedSum",
    "verdicts_of",
]
