"""The LightningModule, the LightningDataModule and the Trainer."""

from lightning_rlvr.training.datamodule import RLVRDataModule
from lightning_rlvr.training.experience import PromptBatch
from lightning_rlvr.training.module import RLVRModule
from lightning_rlvr.training.trainer import Trainer

__all__ = ["PromptBatch", "RLVRDataModule", "RLVRModule", "Trainer"]
