"""The token ledger: every token of a rollout batch with all that was known and decided about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pandas as pd
import torch

from lightning_rlvr.ops.covariance import token_covariance
from lightning_rlvr.store import whole_file
from lightning_rlvr.training.experience import StepObserver, StepRecord
from lightning_rlvr.training.gathering import on_first_rank
from lightning_rlvr.types import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from lightning_rlvr.training.module import RLVRModule

PAGE = Path(__file__).with_name("ledger.html")
NUMBERS = ("entropy", "logp", "ref_logp", "covariance", "advantage", "kl_weight", "drift_weight", "clipped")


class TokenLedger(StepObserver):
    """Writes ledger/N.parquet, a row for each counted token, and ledger/N.html, responses coloured by any column.

    Columns: uid, response (number in its group), position, token_id, text, class (the last of the plan's classes that
    holds the token, or ""), entropy, logp, ref_logp and covariance (nats; the covariance's means run over the whole
    rollout batch), advantage (as the plan shaped it), kl_weight, drift_weight, clipped.

    Args:
        every_n_batches: write every n-th rollout batch; 0 writes none.
        responses: how many responses the page shows; the parquet file has all.
    """

    def __init__(self, every_n_batches: int = 0, responses: int = 64) -> None:
        if every_n_batches < 0:
            raise UserError(f"every_n_batches must be 0 or more, got {every_n_batches}. Set ledger.every_n_batches.")
        self.every_n_batches, self.responses = every_n_batches, responses

    def on_updated(self, module: RLVRModule, record: StepRecord, clipped: Tensor) -> None:
        """Write the batch if it is its turn."""
        if not self.every_n_batches or record.number % self.every_n_batches:
            return
        whole = on_first_rank((record, clipped))
        if whole is not None:
            self._write(module, *whole)

    def _write(self, module: RLVRModule, record: StepRecord, clipped: Tensor) -> None:
        table = ledger_table(record, clipped, module.tokenizer)
        folder = Path(module.trainer.default_root_dir) / "ledger"
        folder.mkdir(exist_ok=True)
        stem = folder / f"{record.number:06d}"
        with whole_file(stem.with_suffix(".parquet")) as file:
            table.to_parquet(file, index=False)
        prompts = {(p.uid, i % record.group_size): p.text for i, p in enumerate(record.experience.prompts)}
        page = ledger_page(table, prompts, self.responses)
        with whole_file(stem.with_suffix(".html")) as file:
            file.write(page.encode())


def ledger_table(record: StepRecord, clipped: Tensor, tokenizer: PreTrainedTokenizerBase) -> pd.DataFrame:
    """Return one row for each counted token, by row and position; `record` is of all ranks."""
    stats, plan = record.stats, record.plan
    counted = stats.counted()
    covariance = token_covariance(stats.logp.flatten()[counted], stats.token_advantage().flatten()[counted])
    rows, positions = stats.mask.nonzero(as_tuple=True)
    ids = record.experience.rollouts.response_ids[rows, positions].tolist()
    names = ["", *plan.classes]
    kind = torch.zeros_like(stats.mask, dtype=torch.long)
    for number, chosen in enumerate(plan.classes.values(), start=1):
        kind[chosen] = number
    absent = torch.full_like(stats.logp, torch.nan)
    grids = {
        "entropy": stats.entropy,
        "logp": stats.logp,
        "ref_logp": absent if record.ref_logp is None else record.ref_logp,
        "covariance": stats.spread(covariance),
        "advantage": plan.advantage,
        "kl_weight": plan.kl_weight,
        "drift_weight": torch.zeros_like(stats.logp) if plan.drift_weight is None else plan.drift_weight,
        "clipped": clipped,
    }
    return pd.DataFrame(
        {
            "uid": [record.experience.prompts[row].uid for row in rows.tolist()],
            "response": (rows % record.group_size).tolist(),
            "position": positions.tolist(),
            "token_id": ids,
            "text": [tokenizer.decode([token]) for token in ids],
            "class": [names[k] for k in kind[rows, positions].tolist()],
            **{name: grid[rows, positions].tolist() for name, grid in grids.items()},
        }
    )


def ledger_page(table: pd.DataFrame, prompts: dict[tuple[str, int], str], responses: int) -> str:
    """Return a self-contained page that shows the first `responses` responses, coloured by a column of choice.

    Text of the model stands in it as data and is never read as markup. The part of the address after # chooses the
    column, as the menu does.
    """
    groups = []
    for key, part in list(table.groupby(["uid", "response"], sort=False))[:responses]:
        uid, number = cast("tuple[str, int]", key)
        tokens = part[["text", "class", *NUMBERS]].astype({"clipped": float})
        rows = [[None if value != value else value for value in row] for row in tokens.itertuples(index=False)]
        groups.append({"uid": uid, "response": int(number), "prompt": prompts[(uid, number)], "tokens": rows})
    data = json.dumps({"columns": list(NUMBERS), "responses": groups}).replace("<", "\\u003c")
    return PAGE.read_text(encoding="utf-8").replace("/*DATA*/null", data)
