"""Engines that sample responses."""

from lightning_rlvr.rollout.sampling import seed_of
from lightning_rlvr.rollout.transformers_engine import TransformersEngine

__all__ = ["TransformersEngine", "seed_of"]
