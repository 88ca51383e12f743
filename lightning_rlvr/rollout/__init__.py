"""Engines that sample responses."""

from lightning_rlvr.rollout.batch import concatenate
from lightning_rlvr.rollout.sampling import seed_of
from lightning_rlvr.rollout.transformers_engine import TransformersEngine

__all__ = ["TransformersEngine", "concatenate", "seed_of"]
