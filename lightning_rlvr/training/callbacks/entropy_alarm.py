"""Warns, or ends the run, when the policy's entropy leaves a band."""

from __future__ import annotations

from typing import Any, Literal

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_rlvr.types import UserError


class EntropyAlarm(Callback):
    """Watches the mean token entropy of each rollout batch (train/entropy, nats).

    Below `collapse` the policy hardly samples anything but its likeliest tokens, and groups stop to differ; above
    `explosion` it writes noise. It is said when entropy leaves the band, and again only once it has been back.

    Args:
        collapse: the least entropy, in nats a token; 0 for none.
        explosion: the greatest, in nats a token; null for none.
        action: `warn`, or `stop`: end the run after this step, with its checkpoint, summary and exported policy.
        patience: rollout batches in a row outside the band before it is said.
    """

    def __init__(
        self,
        collapse: float = 0.01,
        explosion: float | None = 5.0,
        action: Literal["warn", "stop"] = "warn",
        patience: int = 3,
    ) -> None:
        top = float("inf") if explosion is None else explosion
        if not 0 <= collapse < top:
            raise UserError(
                f"collapse and explosion must be 0 <= collapse < explosion, got {collapse} and {explosion}: they bound "
                "the mean token entropy in nats. Set entropy_alarm.collapse or entropy_alarm.explosion."
            )
        if patience < 1:
            raise UserError(f"patience must be at least 1, got {patience}. Set entropy_alarm.patience.")
        self.collapse, self.explosion, self.action, self.patience = collapse, top, action, patience
        self._outside = 0  # rollout batches in a row

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run goes on counting from."""
        return {"outside": self._outside}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._outside = state_dict["outside"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the step's entropy, which is the same on all ranks."""
        if not outputs["samples"]:  # dynamic sampling is still collecting
            return
        entropy = float(trainer.callback_metrics["train/entropy"])
        self._outside = self._outside + 1 if entropy < self.collapse or entropy > self.explosion else 0
        if self._outside != self.patience:
            return
        low = entropy < self.collapse
        side, bound, key = ("below", self.collapse, "collapse") if low else ("above", self.explosion, "explosion")
        ending = " The run ends after this step." if self.action == "stop" else ""
        rank_zero_warn(
            f"the mean token entropy was {side} {bound} nats in {self.patience} rollout batches, now {entropy:.4g}: "
            f"see model.objective and model.optimizer. Set entropy_alarm.{key} or entropy_alarm.action.{ending}"
        )
        if self.action == "stop":
            trainer.should_stop = True
