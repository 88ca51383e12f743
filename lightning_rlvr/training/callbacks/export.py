"""The trained policy as a Hugging Face folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, cast

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from lightning_rlvr.models.lora import save_model

if TYPE_CHECKING:
    from lightning_rlvr.training.module import RLVRModule


class ExportPolicy(Callback):
    """Writes policy and tokenizer to `policy/` in the run's folder when training ends, whole or not at all.

    `AutoModelForCausalLM.from_pretrained` loads it; weights are safetensors, whole and with adapters added to them.
    """

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the folder."""
        module = cast("RLVRModule", pl_module)
        self._write(module, module.parallel.full_state(module.policy), Path(trainer.default_root_dir))

    @rank_zero_only
    def _write(self, module: RLVRModule, state: dict[str, Tensor], root: Path) -> None:
        partial, final = root / ".policy.partial", root / "policy"
        save_model(module.policy, state, partial)
        module.tokenizer.save_pretrained(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.replace(final)
