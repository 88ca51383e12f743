"""Engines that sample responses."""

from lightning_rlvr.rollout.batch import concatenate
from lightning_rlvr.rollout.sampling import seed_of
from lightning_rlvr.rollout.served import Served, ServedEngine
from lightning_rlvr.rollout.transformers_engine import TransformersEngine
from lightning_rlvr.rollout.vllm_engine import VLLM, VLLMEngine

__all__ = ["VLLM", "Served", "ServedEngine", "TransformersEngine", "VLLMEngine", "concatenate", "seed_of"]
