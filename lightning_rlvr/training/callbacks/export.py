"""The trained policy as a Hugging Face folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, cast

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

if TYPE_CHECKING:
    from lightning_rlvr.training.module import RLVRModule


class ExportPolicy(Callback):
    """Writes policy and tokenizer to `policy/` in the run's folder when training ends, whole or not at all.

    `AutoModelForCausalLM.from_pretrained` loads it; weights are safetensors.
    """

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the folder."""
        root = Path(trainer.default_root_dir)
        partial, final = root / ".policy.partial", root / "policy"
        module = cast("RLVRModule", pl_module)
        module.policy.save_pretrained(partial)
        module.tokenizer.save_pretrained(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.replace(final)
