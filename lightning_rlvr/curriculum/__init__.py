"""Semantic entropy of questions and the curriculum it orders."""

from lightning_rlvr.curriculum.order import Adaptive, Curriculum
from lightning_rlvr.curriculum.sampler import AdaptiveSampler, CurriculumSampler
from lightning_rlvr.curriculum.score import Scoring

__all__ = ["Adaptive", "AdaptiveSampler", "Curriculum", "CurriculumSampler", "Scoring"]
