"""No term of the loss is silently without effect."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

if TYPE_CHECKING:
    from lightning_rlvr.training.module import RLVRModule

PATIENCE = 3  # rollout batches: in the first the policy still is its reference


class InertTerms(Callback):
    """Warns of terms that cannot act with the settings given, and of terms that did not act so far.

    Each warning comes once and names the setting to change.
    """

    def __init__(self) -> None:
        self._idle: dict[str, int] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return for how many batches each term has been idle."""
        return {"idle": self._idle}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._idle = state_dict["idle"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn of what the settings rule out."""
        module = cast("RLVRModule", pl_module)
        for reason in module.objective.inert(module.updates_per_rollout):
            rank_zero_warn(reason)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Warn of what was measured to be idle."""
        if not outputs["samples"]:  # dynamic sampling is still collecting
            return
        values = {k: float(v) for k, v in trainer.callback_metrics.items()}
        shares = {
            k.removeprefix("train/grad_share/"): v for k, v in values.items() if k.startswith("train/grad_share/")
        }
        tied = values.get("train/tied_groups") == 1
        for term, share in {**shares, "tied": 0.0 if tied else 1.0}.items():
            self._idle[term] = self._idle.get(term, 0) + 1 if share == 0 else 0
            if self._idle[term] == PATIENCE:
                rank_zero_warn(self._explain(term))

    @staticmethod
    def _explain(term: str) -> str:
        if term in ("tied", "policy"):
            return (
                f"all groups of {PATIENCE} rollout batches had equal rewards, so there is nothing to learn from: the "
                "questions are too hard or too easy for the policy, or the reward never differs. See data.train, "
                "data.group_size, model.reward and samples.jsonl."
            )
        return (
            f"the {term} term of the loss had no gradient at any token in {PATIENCE} rollout batches: it does nothing. "
            "See model.objective and model.updates_per_rollout."
        )
