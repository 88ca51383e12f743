"""Policies: where they come from, how a question becomes a prompt, and the training pass."""

from lightning_rlvr.models.chat import PromptFormat
from lightning_rlvr.models.checkpoint import Checkpoint
from lightning_rlvr.models.embedded import Embedded
from lightning_rlvr.models.lora import LoRA
from lightning_rlvr.models.pretrained import Pretrained
from lightning_rlvr.models.source import Policy, PolicySource, finish_model

__all__ = ["Checkpoint", "Embedded", "LoRA", "Policy", "PolicySource", "Pretrained", "PromptFormat", "finish_model"]
