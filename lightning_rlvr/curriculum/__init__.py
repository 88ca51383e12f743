"""Semantic entropy of questions and the curriculum it orders."""

from lightning_rlvr.curriculum.sampler import Curriculum, CurriculumSampler
from lightning_rlvr.curriculum.score import Scoring

__all__ = ["Curriculum", "CurriculumSampler", "Scoring"]
