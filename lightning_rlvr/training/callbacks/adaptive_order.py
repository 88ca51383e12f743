"""The curriculum learns from training: every group of responses is a fresh estimate of its question."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd
from lightning.pytorch.utilities import rank_zero_info

from lightning_rlvr.curriculum import AdaptiveSampler
from lightning_rlvr.curriculum.score import score_batch
from lightning_rlvr.training.datamodule import datamodule_of
from lightning_rlvr.training.distributed import gather_shares
from lightning_rlvr.training.experience import Experience, PromptBatch, StepObserver

if TYPE_CHECKING:
    from lightning_rlvr.training.module import RLVRModule


class AdaptiveOrder(StepObserver):
    """Hands the estimates of each rollout batch to the curriculum, if it is an adaptive one.

    Logs their mean as train/semantic_entropy (nats; by the curriculum's estimator) or, where the order is by pass rate,
    nothing: that is train/accuracy.
    """

    def on_sampled(self, module: RLVRModule, batch: PromptBatch, experience: Experience) -> None:
        """Estimate the questions of the batch as scoring does, over all ranks."""
        sampler = module.sampler
        if not isinstance(sampler, AdaptiveSampler):
            return
        curriculum = datamodule_of(module.trainer).curriculum
        scores = pd.DataFrame(score_batch(batch.prompts, experience.rollouts, experience.verdicts, module.reward))
        if curriculum.order != "pass_rate":
            entropy = float(scores[f"semantic_entropy_{curriculum.estimator}"].mean())
            module.log("train/semantic_entropy", entropy, batch_size=1, sync_dist=True)
        fresh = gather_shares(curriculum.key(batch.prompts, scores).tolist())
        if sampler.observe(module.rollouts_done, fresh):
            rank_zero_info(f"curriculum: re-ordered what is left after rollout batch {module.rollouts_done + 1}")
