"""Objectives: each a page of maths, chosen in YAML by class_path."""

from lightning_rlvr.objectives.grpo import GRPO
from lightning_rlvr.objectives.sent import SENT

__all__ = ["GRPO", "SENT"]
