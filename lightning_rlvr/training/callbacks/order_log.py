"""The order in which questions were really trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lightning import Callback, LightningModule, Trainer

from lightning_rlvr.training.datamodule import datamodule_of

if TYPE_CHECKING:
    from lightning_rlvr.training.module import RLVRModule


class OrderLog(Callback):
    """Writes curriculum.json, the stages as they were cut, and order.jsonl, a line for each rollout batch.

    A line holds the number of the batch in the run, its stage and pass, and the uids of its questions over all ranks.
    That each rank trains on its share of just these questions is asserted.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the stages."""
        module = cast("RLVRModule", pl_module)
        if module.sampler is None or not trainer.is_global_zero:
            return
        datamodule = datamodule_of(trainer)
        stages = [[datamodule.questions["train"][i].uid for i in stage] for stage in datamodule.stages]
        dropped = {k: int(v.sum()) for k, v in datamodule.curriculum.dropped(datamodule.score_table).items()}
        about = {"batches": len(module.sampler), "dropped": dropped, "sizes": list(map(len, stages)), "stages": stages}
        path = Path(trainer.default_root_dir) / "curriculum.json"
        path.write_text(json.dumps(about) + "\n", encoding="utf-8")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Check this rank's questions."""
        module = cast("RLVRModule", pl_module)
        sampler, number = module.sampler, module.rollouts_done
        if sampler is None:
            return
        uids = self._uids(trainer, sampler.batch(number).questions)
        mine = [prompt.uid for prompt in batch.prompts]
        if mine != uids[sampler.rank :: sampler.world]:
            raise RuntimeError(
                f"rollout batch {number} should train on {uids[sampler.rank :: sampler.world]}, got {mine}"
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write all ranks' questions."""
        module = cast("RLVRModule", pl_module)
        sampler, number = module.sampler, module.rollouts_done - 1
        if sampler is None or not trainer.is_global_zero:
            return
        stage, epoch, questions = sampler.batch(number)
        line = {"batch": number, "stage": stage, "epoch": epoch, "uids": self._uids(trainer, questions)}
        with (Path(trainer.default_root_dir) / "order.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    @staticmethod
    def _uids(trainer: Trainer, questions: list[int]) -> list[str]:
        return [datamodule_of(trainer).questions["train"][i].uid for i in questions]
