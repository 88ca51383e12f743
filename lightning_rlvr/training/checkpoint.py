"""What a checkpoint must hold to be continued."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_rlvr.types import UserError

# Attributes of the module that are saved.
COUNTS = ("rollouts_done", "batches_trained", "objective_state", "reference_moved", "recording_agrees")


def check_checkpoint(
    checkpoint: Mapping[str, Any], weights: Mapping[str, Tensor], objective_state: Mapping[str, float]
) -> None:
    """Compare a checkpoint with the weights and the objective's state at hand.

    Raises: UserError if weights of the policy are missing or have another shape, the checkpoint is not one of ours,
        it holds the state of another objective, or lacks a reference that is no longer the initial policy.
    """
    stored = checkpoint.get("state_dict", weights)  # a strategy of sharded weights has loaded and removed them
    mine = {name: weight for name, weight in weights.items() if name.startswith("policy.")}
    wrong = [name for name, weight in mine.items() if name not in stored or stored[name].shape != weight.shape]
    if wrong or not set(COUNTS) <= checkpoint.keys():
        example = f", such as {wrong[0]}" if wrong else ""
        raise UserError(
            f"the checkpoint is not of this policy: {len(wrong)} of {len(mine)} weights are missing or have another "
            f"shape{example}. Set ckpt_path, or model.policy."
        )
    if checkpoint["objective_state"].keys() != objective_state.keys():
        raise UserError(
            f"the checkpoint holds the state {checkpoint['objective_state']} of another objective. "
            "Set ckpt_path, or model.objective to the one that it was trained with."
        )
    referred = [name for name in weights if name.startswith("reference.")]
    if checkpoint["reference_moved"] and referred and referred[0] not in stored:
        raise UserError(
            "the checkpoint is of a run that restarted at a stage boundary with an objective that reads no reference, "
            "so the reference that this objective reads is lost. Set ckpt_path, or model.objective."
        )
